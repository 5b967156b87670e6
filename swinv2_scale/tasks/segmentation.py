"""Semantic segmentation with UPerNet, by the conventions of ADE20K: the class of every pixel."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinv2_scale import distributed, drawing
from swinv2_scale.config import instantiate
from swinv2_scale.data.images import EncodedImage
from swinv2_scale.data.segmentation import (
    IGNORED,
    SegmentationEvaluationTransform,
    collate_whole,
)
from swinv2_scale.data.shards import with_map
from swinv2_scale.data.stream import Batch
from swinv2_scale.data.transforms import collate, to_uint8
from swinv2_scale.models.swin_v2 import SwinTransformerV2
from swinv2_scale.models.upernet import UPerNet, resized
from swinv2_scale.tasks.classification import check_class_names
from swinv2_scale.telemetry import Picture
from swinv2_scale.train import Evaluation, Prediction

INFERENCE = ("whole", "sliding")
# Probabilities of a picture to predict, 1 GB; with more of them, pixels are judged at the size that the model sees.
LARGEST = 2**28


class Segmentation:
    """Cross-entropy of the pixels that have a class, with the auxiliary head's times auxiliary_weight.

    channels, auxiliary_channels, pool_scales, dropout   of models.upernet.UPerNet
    inference   "whole": an image at a time; "sliding": in windows of the training's image size, two thirds of it apart,
                whose logits are averaged where they overlap
    flip        judge by the mean of the probabilities of an image and of its mirror image; those of several
                evaluation_transform.ratios are averaged too
    num_classes does not count what has none. Raises ValueError for fewer than two classes and other settings.
    """

    open_sample = staticmethod(with_map)
    metrics = ()
    num_classes = 0  # of samples; a pixel has one
    shown = 8

    def __init__(
        self,
        *,
        train_transform: Callable,
        evaluation_transform: SegmentationEvaluationTransform,
        num_classes: int,
        channels: int,
        auxiliary_channels: int,
        auxiliary_weight: float,
        pool_scales: Sequence[int],
        dropout: float,
        inference: str,
        flip: bool,
    ) -> None:
        if not 2 <= num_classes < IGNORED:
            raise ValueError(
                f"segmentation needs model.num_classes of 2 to {IGNORED - 1}, got {num_classes} (0: a checkpoint "
                "without such a head)"
            )
        if inference not in INFERENCE:
            raise ValueError(f"task.inference={inference} is not one of {', '.join(INFERENCE)}")
        self.train_transform, self.evaluation_transform = train_transform, evaluation_transform
        self.train_collate, self.evaluation_collate = collate, collate_whole
        self.classes, self.inference, self.flip = num_classes, inference, flip
        self.heads: dict[str, Any] = {
            "channels": channels,
            "auxiliary_channels": auxiliary_channels,
            "pool_scales": pool_scales,
            "dropout": dropout,
        }
        self.auxiliary_weight = auxiliary_weight
        self.tallies = {"pixels": (3, num_classes), "surprise": (1,)}
        of = evaluation_transform
        self.window = of.image_size
        self.settings = {
            "image_size": of.image_size,
            "long_side": of.long_side,
            "ratios": of.ratios,
            "inference": inference,
            "flip": flip,
        }

    def build(self, model: Any) -> UPerNet:
        """The model to train, from a configuration of the backbone."""
        return UPerNet(instantiate(model, num_classes=0), num_classes=self.classes, **self.heads)

    def backbone(self, model: nn.Module) -> SwinTransformerV2:
        """The part of a built model that `checkpoint=` fills."""
        assert isinstance(model, UPerNet)
        return model.encoder

    def check_classes(self, *classes: Sequence[str], highest_label: int | None = None) -> None:
        """Raises ValueError unless all data have the same classes, as many as the model, and samples have none."""
        if highest_label is not None:
            raise ValueError(
                "the data has classes of images, and segmentation needs maps: pack it with --format ade20k"
            )
        check_class_names(self.classes, *classes)

    def loss(self, model: Callable, batch: Batch) -> Tensor:
        """Cross-entropy in float32, the auxiliary head's times its weight, as a mean over all pixels of a micro-batch.

        Pixels without a class count as 0, as in OpenMMLab's: a mean over the others would give those of an image
        another weight on another number of ranks.
        """
        target = batch["map"].long()
        main, auxiliary = (
            F.cross_entropy(logits, target, ignore_index=IGNORED, reduction="sum") for logits in model(batch["image"])
        )
        return (main + self.auxiliary_weight * auxiliary) / target.numel()

    def scores(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Sums over the batch's classified pixels.

        pixels      (3, classes): where prediction and truth are the class, where the prediction is, where the truth is
        surprise    (1,): -log of the true class's probability
        """
        sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in self.tallies.items()}
        sums = distributed.to_device(sums)
        for views, own in zip(batch["image"], batch["map"], strict=True):
            truth = own.to(distributed.device()).long()
            log_p = self.log_probabilities(model, views, truth.shape)
            known = truth != IGNORED
            sums["pixels"] += counts(log_p.argmax(dim=0)[known], truth[known], self.classes)
            sums["surprise"] += F.nll_loss(log_p[None], truth[None], ignore_index=IGNORED, reduction="sum")
        return sums

    def log_probabilities(self, model: nn.Module, views: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Views of one image, (3, Y, X) each, to the classes' log probabilities at `size`: float32 (classes, *size)."""
        total, number = torch.zeros(()), 0
        for logits in self.logits_of_views(model, views):
            own = F.log_softmax(resized(logits, size)[0], dim=0)
            total = own if number == 0 else torch.logaddexp(total, own)
            number += 1
        return total - torch.log(torch.tensor(float(number)))

    def logits_of_views(self, model: nn.Module, views: Sequence[Tensor]) -> Iterator[Tensor]:
        """(1, classes, Y, X) of each view, and of its mirror image, turned back."""
        assert isinstance(model, UPerNet)
        for view in views:
            image = view.to(distributed.device())[None]
            for mirrored in (False, True) if self.flip else (False,):
                turned = image.flip(3) if mirrored else image
                logits = (
                    sliding(model.segment, turned, self.window)
                    if self.inference == "sliding"
                    else model.segment(turned)
                )
                yield logits.flip(3) if mirrored else logits

    def derived(self, tallies: dict[str, Tensor]) -> dict[str, float]:
        """loss: mean over pixels; miou, mean_accuracy: over classes that occur; pixel_accuracy."""
        both, _, truth = tallies["pixels"]
        iou, accuracy = shares(tallies["pixels"])
        pixels = truth.sum()
        return {
            "loss": float(tallies["surprise"][0] / pixels),
            "miou": float(iou.nanmean()),
            "pixel_accuracy": float(both.sum() / pixels),
            "mean_accuracy": float(accuracy.nanmean()),
        }

    def per_class(self, outcome: Evaluation) -> dict[str, list[float]]:
        """Pixels of each class, intersection over union, and the share of its pixels that were found."""
        iou, accuracy = shares(outcome.tallies["pixels"])
        pixels = outcome.tallies["pixels"][2]
        return {"pixels": pixels.tolist(), "iou": iou.tolist(), "accuracy": accuracy.tolist()}

    def pictures(self, model: nn.Module, batch: Batch, classes: Sequence[str]) -> tuple[str, list[Picture]]:
        """Prediction and truth side by side, for images of a held-out batch, with a legend of the classes in them.

        Wrong by the share of the classified pixels that are taken for another class.
        """
        names = dict(enumerate(classes))
        pictures = []
        for views, own, key in zip(batch["image"], batch["map"], batch["key"], strict=True):
            image = to_uint8(views[0]).cpu()
            log_p = self.log_probabilities(model, views, image.shape[1:])
            found = log_p.argmax(dim=0).cpu()
            truth = F.interpolate(own[None, None].float(), image.shape[1:], mode="nearest-exact")[0, 0].long().cpu()
            known = truth != IGNORED
            wrong = float((found != truth)[known].float().mean()) if known.any() else 0.0
            shown = drawing.beside(drawing.with_classes(image, found), drawing.with_classes(image, truth))
            seen = torch.cat([found.flatten(), truth[known]]).unique().tolist()
            legend = [(drawing.colour(number), str(names.get(number, number))) for number in seen]
            caption = f"{key}: {wrong:.1%} of the pixels wrong"
            pictures.append(Picture(drawing.with_legend(shown, legend), caption, wrong=wrong))
        return "segmentations", pictures

    def predict(self, model: nn.Module, image: EncodedImage, classes: Sequence[str]) -> Prediction:
        """The class of every pixel, in colours over the picture; below it what they mean, the largest part first."""
        pixels = image.pixels()
        size, views = pixels.shape[1:], self.evaluation_transform.views(pixels)
        judged = size if self.classes * math.prod(size) <= LARGEST else views[0].shape[1:]
        found = self.log_probabilities(model, views, judged).argmax(dim=0).cpu()
        found = F.interpolate(found[None, None].float(), size, mode="nearest-exact")[0, 0].long()
        names = dict(enumerate(classes))
        shares = found.flatten().bincount(minlength=self.classes).double() / found.numel()
        parts = [
            {"class": str(names.get(label, label)), "label": label, "share": float(shares[label])}
            for label in shares.argsort(descending=True, stable=True).tolist()
            if shares[label] > 0
        ]
        lines = [f"{part['class']} {part['share']:.1%}" for part in parts]
        legend = [(drawing.colour(part["label"]), line) for part, line in zip(parts, lines, strict=True)]
        picture = drawing.with_legend(drawing.with_classes(pixels, found), legend)
        return Prediction(picture, ", ".join(lines), {"segments": parts}, (found + 1).to(torch.uint8))


def sliding(model: Callable[[Tensor], Tensor], images: Tensor, window: int) -> Tensor:
    """(B, 3, Y, X) -> (B, classes, Y, X): `model` on windows, two thirds of a window apart, the last ones at the edges.

    Logits are averaged where windows overlap. Where an image is smaller than the window, its windows are too.
    """
    rows, columns = (
        [*range(0, max(size - window, 0), max(1, window * 2 // 3)), max(size - window, 0)] for size in images.shape[2:]
    )
    total, times = torch.zeros(()), images.new_zeros(images.shape[2:])
    for top in rows:
        for left in columns:
            place = (..., slice(top, top + window), slice(left, left + window))
            logits = model(images[place])
            if not total.dim():
                total = logits.new_zeros(*logits.shape[:2], *images.shape[2:])
            total[place] += logits
            times[place] += 1
    return total / times


def counts(predicted: Tensor, truth: Tensor, classes: int) -> Tensor:
    """Of pixels' classes, (N,) each: int64 (3, classes), intersections, predictions, truths."""
    return torch.stack([values.bincount(minlength=classes) for values in (truth[predicted == truth], predicted, truth)])


def shares(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """From counts (3, classes): intersection over union and accuracy of each class, nan for 0 of 0."""
    both, predicted, truth = pixels
    return both / (predicted + truth - both), both / truth
