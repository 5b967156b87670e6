"""One sample -> one training example, and samples -> a batch.

A sample is a dictionary: "image" an EncodedImage, "label" int, "key" str, "draw" int, "chance" float (see order.py),
"corrupt" list of str. A transform returns it with "image" as float32 (3, S, S), normalised. All of its randomness comes
out of torch's default generator, which the stream seeds with the sample's `draw` first; torchvision.transforms.v2 uses
no other (looked up in torchvision 0.29).
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torchvision.transforms import v2

from swinv2_scale.data.images import EncodedImage

Sample = dict[str, Any]

PATCH = 4  # pixels; the patch embedding of every Swin Transformer V2, and so the unit in which masks are given
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class RandomResizedCrop(v2.RandomResizedCrop):
    """torchvision's, of an EncodedImage: the same rectangle is drawn, and decoded at the scale that it needs."""

    def forward(self, image: EncodedImage) -> torch.Tensor:
        """uint8 (3, S, S)."""
        box = self.make_params([image.header])
        return image.resized_crop(**box, size=list(self.size), interpolation=v2.InterpolationMode(self.interpolation))


class Decode(torch.nn.Module):
    """An EncodedImage as uint8 (3, Y, X), whole: evaluation is not to depend on how an image is decoded."""

    def forward(self, image: EncodedImage) -> torch.Tensor:
        """uint8 (3, Y, X)."""
        return image.pixels()


class SimMIMTransform:
    """Random crop, flip, and a random mask for masked image modelling (SimMIM, arXiv 2111.09886, section 4.1.2).

    Adds "mask", bool (S/4, S/4) per 4-pixel patch, True where the image is hidden: squares of `mask_unit` pixels, of
    which `mask_ratio` (rounded up) are hidden. `flip` is a probability.
    """

    def __init__(
        self,
        *,
        image_size: int,
        crop_scale: Sequence[float],
        crop_ratio: Sequence[float],
        flip: float,
        mask_unit: int,
        mask_ratio: float,
    ) -> None:
        _check_mask(image_size, mask_unit, mask_ratio)
        self.image_size, self.mask_unit, self.mask_ratio = image_size, mask_unit, mask_ratio
        self.image = v2.Compose(
            [
                RandomResizedCrop(image_size, tuple(crop_scale), tuple(crop_ratio)),
                v2.RandomHorizontalFlip(flip),
                *normalisation(),
            ]
        )

    def __call__(self, sample: Sample) -> Sample:
        mask = random_mask(self.image_size, self.mask_unit, self.mask_ratio)
        return {**sample, "image": self.image(sample["image"]), "mask": mask}


class SimMIMEvaluationTransform:
    """Resize of the short side to `image_size`, centre crop, and a mask, the same one at every evaluation."""

    def __init__(self, *, image_size: int, mask_unit: int, mask_ratio: float) -> None:
        _check_mask(image_size, mask_unit, mask_ratio)
        self.image_size, self.mask_unit, self.mask_ratio = image_size, mask_unit, mask_ratio
        resize = v2.Resize(image_size, antialias=True)
        self.image = v2.Compose([Decode(), resize, v2.CenterCrop(image_size), *normalisation()])

    def __call__(self, sample: Sample) -> Sample:
        mask = random_mask(self.image_size, self.mask_unit, self.mask_ratio)
        return {**sample, "image": self.image(sample["image"]), "mask": mask}


class ClassificationTransform:
    """Random crop, flip, RandAugment and erasing, in the order of the released fine-tuning recipes.

    `flip` and `erase_probability` are probabilities. `randaugment_ops` operations per image (0: off) at
    `randaugment_magnitude` tenths of each operation's range, so that 9 is the recipes' m9. Erased rectangles are filled
    with normal noise per pixel, as the images are normalised by then.
    """

    def __init__(
        self,
        *,
        image_size: int,
        crop_scale: Sequence[float],
        crop_ratio: Sequence[float],
        flip: float,
        interpolation: str,
        randaugment_ops: int,
        randaugment_magnitude: int,
        erase_probability: float,
    ) -> None:
        self.image = v2.Compose(
            [
                RandomResizedCrop(image_size, tuple(crop_scale), tuple(crop_ratio), interpolation_mode(interpolation)),
                *augmentation(flip, randaugment_ops, randaugment_magnitude, erase_probability),
            ]
        )

    def __call__(self, sample: Sample) -> Sample:
        return {**sample, "image": self.image(sample["image"])}


class EvaluationTransform:
    """What the released evaluation does to an image, which decides a few tenths of a per cent of accuracy.

    With `crop`, the short side is resized to 256/224 of `image_size` and the centre cut out. Without, all of the image
    is squashed into the square. None means with crop up to 256 pixels, as the released models were evaluated. The
    arithmetic is that of tensors, which differs from PIL's by a level of 255 in a few values of a thousand.
    """

    def __init__(self, *, image_size: int, crop: bool | None, interpolation: str) -> None:
        crop = image_size <= 256 if crop is None else crop
        self.resize = [int(256 / 224 * image_size)] if crop else [image_size, image_size]
        self.settings = {"image_size": image_size, "crop": crop, "resize": self.resize, "interpolation": interpolation}
        self.image = v2.Compose(
            [
                Decode(),
                v2.Resize(self.resize, interpolation_mode(interpolation), antialias=True),
                v2.CenterCrop(image_size),
                *normalisation(),
            ]
        )

    def __call__(self, sample: Sample) -> Sample:
        return {**sample, "image": self.image(sample["image"])}


def augmentation(
    flip: float, randaugment_ops: int, randaugment_magnitude: int, erase_probability: float
) -> list[v2.Transform]:
    """What ClassificationTransform does after its crop, normalisation included. Frames of a clip are treated alike."""
    if not 0 <= randaugment_magnitude <= 10:
        raise ValueError(f"randaugment_magnitude {randaugment_magnitude} is not one of 0 to 10 (tenths of the range)")
    fill = [round(255 * mean) for mean in IMAGENET_MEAN]
    bilinear = v2.InterpolationMode.BILINEAR
    return [
        v2.RandomHorizontalFlip(flip),
        v2.RandAugment(randaugment_ops, randaugment_magnitude, 11, interpolation=bilinear, fill=fill),
        *normalisation(),
        v2.RandomErasing(erase_probability, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value="random"),
    ]


def random_mask(image_size: int, mask_unit: int, mask_ratio: float) -> torch.Tensor:
    """bool (S/4, S/4): ceil(ratio x units) squares of `mask_unit` pixels are True (MaskGenerator of SimMIM)."""
    side = image_size // mask_unit
    hidden = math.ceil(mask_ratio * side**2)
    mask = (torch.randperm(side**2) < hidden).view(side, side)
    return mask.repeat_interleave(mask_unit // PATCH, 0).repeat_interleave(mask_unit // PATCH, 1)


def collate(samples: list[Sample]) -> dict[str, Any]:
    """Samples as one batch: tensors are stacked, integers become int64 (B,), lists are joined, strings are listed."""
    batch: dict[str, Any] = {}
    for name, first in samples[0].items():
        values = [sample[name] for sample in samples]
        if isinstance(first, torch.Tensor):
            batch[name] = torch.stack(values)
        elif isinstance(first, int):
            batch[name] = torch.tensor(values, dtype=torch.int64)
        else:
            batch[name] = [entry for value in values for entry in value] if isinstance(first, list) else values
    return batch


class Mix:
    """Collates samples for training a classifier: mixup or CutMix of neighbours, label smoothing, soft targets.

    Samples 0 and 1, 2 and 3, … are mixed with each other (arXiv 1710.09412, 1905.04899). All draws of a pair come from
    the `draw` of its first sample, so a pair does not depend on ranks or workers, nor on where a batch is cut between
    pairs. With probability `probability` a pair is mixed: by CutMix with probability `switch_probability` when both are
    on. An alpha of 0 switches that mix off. Adds "target", float32 (B, num_classes), whose rows sum to 1.

    Raises ValueError for an odd number of samples when a mix is on, and for labels outside the classes.
    """

    def __init__(
        self,
        *,
        mixup_alpha: float,
        cutmix_alpha: float,
        probability: float,
        switch_probability: float,
        label_smoothing: float,
        num_classes: int,
    ) -> None:
        self.mixup_alpha, self.cutmix_alpha = mixup_alpha, cutmix_alpha
        self.probability, self.switch_probability = probability, switch_probability
        self.label_smoothing, self.num_classes = label_smoothing, num_classes
        self.on = probability > 0 and (mixup_alpha > 0 or cutmix_alpha > 0)

    def __call__(self, samples: list[Sample]) -> dict[str, Any]:
        batch = collate(samples)
        wrong = [sample for sample in samples if not 0 <= sample["label"] < self.num_classes]
        if wrong:
            raise ValueError(
                f"sample {wrong[0]['key']} has label {wrong[0]['label']}, outside of num_classes={self.num_classes}; "
                "set num_classes to the data's number of classes, and use data with labels"
            )
        spread = self.label_smoothing / self.num_classes
        batch["target"] = torch.full((len(samples), self.num_classes), spread)
        batch["target"].scatter_(1, batch["label"][:, None], 1 - self.label_smoothing + spread)
        if self.on and len(samples) % 2:
            raise ValueError(
                f"mixing pairs neighbours and the micro-batch has {len(samples)} samples; "
                "choose an even micro-batch, or switch mixing off with task.train_collate.probability=0"
            )
        if self.on:
            for first in range(0, len(samples), 2):
                self._mix(batch["image"][first : first + 2], batch["target"][first : first + 2], samples[first]["draw"])
        return batch

    def _mix(self, pair: torch.Tensor, targets: torch.Tensor, draw: int) -> None:
        """Mixes the pair's images (2, 3, Y, X) and targets (2, classes) in place."""
        random = np.random.default_rng([draw, 1])  # its own stream: the first sample's crop used `draw` itself
        mixed, switch = random.random(2)
        if mixed >= self.probability:
            return
        cut = self.cutmix_alpha > 0 and (self.mixup_alpha == 0 or switch < self.switch_probability)
        alpha = self.cutmix_alpha if cut else self.mixup_alpha
        weight = random.beta(alpha, alpha)
        if cut:
            top, bottom, left, right = _box(pair.shape[-2], pair.shape[-1], weight, random)
            pair[..., top:bottom, left:right] = pair[..., top:bottom, left:right].flip(0)
            weight = 1 - (bottom - top) * (right - left) / (pair.shape[-2] * pair.shape[-1])
        else:
            pair.copy_(weight * pair + (1 - weight) * pair.flip(0))
        targets.copy_(weight * targets + (1 - weight) * targets.flip(0))


def to_uint8(image: torch.Tensor) -> torch.Tensor:
    """A normalised image (3, Y, X) back to uint8, to look at."""
    mean, std = (image.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((image * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)


def interpolation_mode(name: str) -> v2.InterpolationMode:
    """torchvision's interpolation of that name; raises ValueError for others than bilinear and bicubic."""
    if name not in ("bilinear", "bicubic"):
        raise ValueError(f"interpolation {name!r} is not one of bilinear, bicubic")
    return v2.InterpolationMode(name)


def _box(height: int, width: int, weight: float, random: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of a rectangle of 1 - weight of the area around a uniform centre, clipped."""
    half = 0.5 * math.sqrt(1 - weight)
    y, x = random.integers(height), random.integers(width)
    half_height, half_width = int(half * height), int(half * width)
    return (
        max(int(y) - half_height, 0),
        min(int(y) + half_height, height),
        max(int(x) - half_width, 0),
        min(int(x) + half_width, width),
    )


def normalisation() -> list[v2.Transform]:
    """uint8 to float32 with the mean and spread of ImageNet."""
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]


def _check_mask(image_size: int, mask_unit: int, mask_ratio: float) -> None:
    if mask_unit % PATCH or mask_unit <= 0:
        raise ValueError(f"mask_unit {mask_unit} is not a positive multiple of the patch of {PATCH} pixels; take 32")
    if image_size % mask_unit:
        lower = image_size // mask_unit * mask_unit
        raise ValueError(
            f"image_size {image_size} is not a multiple of mask_unit {mask_unit}; "
            f"take {lower or mask_unit} or {lower + mask_unit}, or another mask_unit"
        )
    if not 0 < mask_ratio < 1:
        raise ValueError(f"mask_ratio {mask_ratio} is not between 0 and 1; SimMIM hides 0.6")
