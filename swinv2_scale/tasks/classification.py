"""Image classification: supervised pretraining and fine-tuning."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinv2_scale import distributed, drawing
from swinv2_scale.config import instantiate
from swinv2_scale.data.clips import ClipEvaluationTransform
from swinv2_scale.data.images import EncodedImage
from swinv2_scale.data.shards import labelled
from swinv2_scale.data.stream import Batch
from swinv2_scale.data.transforms import EvaluationTransform, Mix, to_uint8
from swinv2_scale.models.swin_v2 import SwinTransformerV2
from swinv2_scale.telemetry import Picture
from swinv2_scale.train import Evaluation, Prediction


class Classification:
    """Cross-entropy against the soft targets that train_collate makes (mixing, label smoothing).

    num_classes must be that of the model. With evaluation_flip, held-out images are judged by the mean of their logits
    and those of their mirror images. Raises ValueError for fewer than two classes.
    """

    open_sample = staticmethod(labelled)
    metrics = ("loss", "top1", "top5")
    tallies: ClassVar[dict[str, tuple[int, ...]]] = {}
    shown = 24

    def __init__(
        self,
        *,
        train_transform: Callable,
        evaluation_transform: EvaluationTransform | ClipEvaluationTransform,
        evaluation_flip: bool,
        train_collate: Callable,
        num_classes: int,
    ) -> None:
        if num_classes < 2:
            raise ValueError(
                f"classification needs model.num_classes of 2 or more, got {num_classes} (0: a checkpoint without head)"
            )
        self.train_transform, self.evaluation_transform = train_transform, evaluation_transform
        self.num_classes, self.evaluation_flip = num_classes, evaluation_flip
        self.settings = {**evaluation_transform.settings, "flip": evaluation_flip}
        self.train_collate = train_collate
        # Mixes nothing: it is there for its check of the labels.
        self.evaluation_collate = Mix(
            mixup_alpha=0.0,
            cutmix_alpha=0.0,
            probability=0.0,
            switch_probability=0.0,
            label_smoothing=0.0,
            num_classes=num_classes,
        )

    def build(self, model: Any) -> SwinTransformerV2:
        """The model to train, from its configuration."""
        built = instantiate(model)
        assert isinstance(built, SwinTransformerV2)
        return built

    def backbone(self, model: nn.Module) -> SwinTransformerV2:
        """The part of a built model that `checkpoint=` fills."""
        assert isinstance(model, SwinTransformerV2)
        return model

    def check_classes(self, *classes: Sequence[str], highest_label: int | None = None) -> None:
        """Raises ValueError unless all data have the same classes, as many as the model, or numbers of its classes."""
        if highest_label is not None and highest_label >= self.num_classes:
            raise ValueError(
                f"the data's class directories are numbers, which are its labels, up to {highest_label}, and the model "
                f"has classes 0 to {self.num_classes - 1}: set model.num_classes to what it was trained with, or "
                "rename the directories (and pack them again)"
            )
        check_class_names(self.num_classes, *classes)

    def loss(self, model: Callable, batch: Batch) -> Tensor:
        """Mean cross-entropy of the micro-batch, computed in float32."""
        return F.cross_entropy(model(batch["image"]).float(), batch["target"])

    def scores(self, model: Callable, batch: Batch) -> dict[str, Tensor]:
        """Of each image of a held-out batch, (B,): cross-entropy, and whether it was hit at 1 and at 5."""
        logits, label = self.logits(model, batch), batch["label"]
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == label[:, None]
        return {
            "loss": F.cross_entropy(logits, label, reduction="none"),
            "top1": best[:, 0],
            "top5": best.any(dim=1),
        }

    def logits(self, model: Callable, batch: Batch) -> Tensor:
        """What a held-out batch is judged by: float32 (B, classes)."""
        logits = model(batch["image"]).float()
        return (logits + model(batch["image"].flip(-1)).float()) / 2 if self.evaluation_flip else logits

    def derived(self, tallies: dict[str, Tensor]) -> dict[str, float]:
        """Nothing but the means of `metrics`."""
        return {}

    def per_class(self, outcome: Evaluation) -> dict[str, list[float]]:
        """The number of samples of each class, and the mean of each metric over them."""
        samples, *sums = outcome.per_class.T
        means = {name: (total / samples).tolist() for name, total in zip(self.metrics, sums, strict=True)}
        return {"samples": samples.tolist(), **means}

    def pictures(self, model: nn.Module, batch: Batch, classes: Sequence[str]) -> tuple[str, list[Picture]]:
        """Images of a held-out batch with what the model says.

        Wrong by how far the most probable of the other classes is ahead of the true one, in probability.
        """
        shares = torch.softmax(self.logits(model, batch), dim=1)
        share, predicted = shares.max(dim=1)
        name = dict(enumerate(classes))  # empty for shards without a manifest
        said = [f"{name.get(i, i)} ({p:.0%})" for i, p in zip(predicted.tolist(), share.tolist(), strict=True)]
        is_class = [name.get(i, i) for i in batch["label"].tolist()]
        right = (predicted == batch["label"]).tolist()
        true = shares.gather(1, batch["label"][:, None])
        ahead = shares.scatter(1, batch["label"][:, None], 0.0).max(dim=1).values - true[:, 0]
        return "predictions", [
            Picture(self.picture(image), said[i] if right[i] else f"{said[i]}, is {is_class[i]}", right[i], wrong)
            for i, (image, wrong) in enumerate(zip(batch["image"], ahead.tolist(), strict=True))
        ]

    def picture(self, image: Tensor) -> Tensor:
        """A held-out sample's "image" to look at: uint8 (3, Y, X)."""
        return to_uint8(image)

    def predict(self, model: nn.Module, image: EncodedImage, classes: Sequence[str]) -> Prediction:
        """The five most probable classes, written below the picture."""
        seen = self.evaluation_transform({"image": image})["image"][None].to(distributed.device())
        logits = model(seen).float()
        if self.evaluation_flip:
            logits = (logits + model(seen.flip(-1)).float()) / 2
        shares, labels = torch.softmax(logits[0], dim=0).topk(min(5, logits.shape[1]))
        name = dict(enumerate(classes))
        found = [
            {"class": str(name.get(label, label)), "label": label, "probability": share}
            for label, share in zip(labels.tolist(), shares.tolist(), strict=True)
        ]
        lines = [f"{one['class']} {one['probability']:.1%}" for one in found]
        entries: list[drawing.Entry] = [(None, line) for line in lines]
        picture = drawing.with_legend(image.pixels(), entries, one_a_line=True)
        return Prediction(picture, ", ".join(lines), {"classes": found})


def check_class_names(num_classes: int, *classes: Sequence[str]) -> None:
    """Raises ValueError unless all data whose classes have names have the same, as many as the model."""
    known = [list(names) for names in classes if names]
    for names in known:
        if len(names) != num_classes:
            raise ValueError(
                f"the data has {len(names)} classes and the model {num_classes}: set model.num_classes={len(names)}"
            )
        if names != known[0]:
            odd = sorted(set(names) ^ set(known[0]))[:3] or "the same ones in another order"
            raise ValueError(
                f"the data sets of training and evaluation number their classes differently ({odd}): pack all "
                "from trees with the same class directories"
            )
