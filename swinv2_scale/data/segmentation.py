"""Images with the class of each pixel -> training examples: what is done to one is done to the other.

A sample has "image", an EncodedImage, and "map", an EncodedMap, of the same size. ADE20K's value 0 ("other objects") is
no class: in the map of a transformed sample, uint8, the value v has become v - 1, and IGNORED where there is no class.
Images are resized bilinearly with antialiasing, maps to the nearest value; both keep their centres in place. As in
transforms.py all randomness comes out of torch's default generator.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from swinv2_scale.data.images import CorruptSampleError
from swinv2_scale.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Sample, collate

IGNORED = 255  # in a map: no class, neither learnt nor counted
_TRIES = 10  # crops that are drawn for one with more than a single class


class SegmentationTransform:
    """ADE20K's training augmentation, as OpenMMLab publishes it for UPerNet.

    1  resize by a random ratio: the short side to ratio x image_size, the long one to ratio x long_side at most
    2  a random crop of image_size x image_size, drawn again while one class covers more than `largest_share` of the
       pixels that have one, up to 10 times
    3  mirror with probability `flip`
    4  brightness, contrast, saturation and hue, each with probability 1/2, unless photometric is false
    5  normalise; then complete what is smaller than the crop, with the mean colour and IGNORED, on the right and below

    Raises ValueError for numbers that make no sense.
    """

    def __init__(
        self,
        *,
        image_size: int,
        ratio: Sequence[float],
        long_side: int,
        largest_share: float,
        flip: float,
        photometric: bool,
        num_classes: int,
    ) -> None:
        low, high = ratio
        if not 0 < low <= high:
            raise ValueError(f"ratio={list(ratio)} must be two positive numbers, the smaller one first")
        _check_sizes(image_size, long_side)
        if not 0 < largest_share <= 1:
            raise ValueError(f"largest_share={largest_share} must be above 0 and at most 1")
        self.num_classes = num_classes
        self.both = v2.Compose(
            [
                RandomRatio(image_size, long_side, (low, high)),
                ClassCrop(image_size, largest_share),
                v2.RandomHorizontalFlip(flip),
                *([PhotometricDistortion()] if photometric else []),
                v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
                v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
                Complete(image_size),
            ]
        )

    def __call__(self, sample: Sample) -> Sample:
        image, classes = self.both(*decoded(sample, self.num_classes))
        return {**sample, "image": image.as_subclass(Tensor), "map": classes.as_subclass(Tensor)[0]}


class SegmentationEvaluationTransform:
    """The whole image, resized so that the short side is image_size and the long one at most long_side.

    "image" becomes a list of float32 (3, Y, X), one for each of `ratios`, by which both sides are multiplied; "map"
    stays as large as it was, (Y0, X0): that is where a result is judged.
    """

    def __init__(self, *, image_size: int, long_side: int, ratios: Sequence[float], num_classes: int) -> None:
        if not ratios or min(ratios) <= 0:
            raise ValueError(f"ratios={list(ratios)} must be positive numbers, one or more")
        _check_sizes(image_size, long_side)
        self.image_size, self.long_side, self.ratios = image_size, long_side, list(ratios)
        self.num_classes = num_classes
        self.normalise = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)])

    def __call__(self, sample: Sample) -> Sample:
        image, classes = decoded(sample, self.num_classes)
        return {**sample, "image": self.views(image), "map": classes.as_subclass(Tensor)[0]}

    def views(self, image: Tensor) -> list[Tensor]:
        """An image, uint8 (3, Y, X), as a model sees it: float32, at each of the ratios."""
        image = tv_tensors.Image(image)
        sizes = [fitted_size(image.shape[1:], self.image_size, self.long_side, ratio) for ratio in self.ratios]
        return [self.normalise(F.resize(image, size, antialias=True)).as_subclass(Tensor) for size in sizes]


def decoded(sample: Sample, num_classes: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """A sample's image, uint8 (3, Y, X), and map, (1, Y, X), with 0 … num_classes - 1 and IGNORED.

    Raises CorruptSampleError when one does not decode, when they are of different sizes, and for values above
    num_classes.
    """
    image, values = sample["image"].pixels(), sample["map"].values(num_classes)
    if image.shape[1:] != values.shape:
        raise CorruptSampleError(
            f"image has {image.shape[1]} x {image.shape[2]} pixels, its map {values.shape[0]} x {values.shape[1]}"
        )
    # In eight bits 0 - 1 is 255; the 255 that some tools write for "no class" stays.
    classes = torch.where(values == IGNORED, IGNORED, values - 1)
    return tv_tensors.Image(image), tv_tensors.Mask(classes[None])


def fitted_size(size: Sequence[int], short_side: int, long_side: int, ratio: float) -> list[int]:
    """(Y, X) enlarged or shrunk to `ratio` times what fits: the short side short_side, or the long one long_side."""
    scale = ratio * min(short_side / min(size), long_side / max(size))
    return [max(1, int(side * scale + 0.5)) for side in size]


def collate_whole(samples: list[Sample]) -> dict[str, Any]:
    """As `collate`, but images (each a list) and maps, which have different sizes, stay lists."""
    rest = [{name: sample[name] for name in sample if name not in ("image", "map")} for sample in samples]
    return {**collate(rest), "image": [sample["image"] for sample in samples], "map": [s["map"] for s in samples]}


class RandomRatio(v2.Transform):
    """Resize as `fitted_size`, by a ratio drawn from a range."""

    def __init__(self, short_side: int, long_side: int, ratio: tuple[float, float]) -> None:
        super().__init__()
        self.short_side, self.long_side, self.ratio = short_side, long_side, ratio

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        ratio = float(torch.empty(()).uniform_(*self.ratio))
        return {"size": fitted_size(flat_inputs[0].shape[-2:], self.short_side, self.long_side, ratio)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        # torch's "nearest" takes the pixel left of the centre, half a pixel off what is done to the image.
        is_map = isinstance(inpt, tv_tensors.Mask)
        mode = v2.InterpolationMode.NEAREST_EXACT if is_map else v2.InterpolationMode.BILINEAR
        return F.resize(inpt, params["size"], mode, antialias=True)


class ClassCrop(v2.Transform):
    """A random crop of at most size x size, in which no class has more than `largest_share` of the pixels with one."""

    def __init__(self, size: int, largest_share: float) -> None:
        super().__init__()
        self.size, self.largest_share = size, largest_share

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        (classes,) = (value for value in flat_inputs if isinstance(value, tv_tensors.Mask))
        rows, columns = classes.shape[-2:]
        height, width = min(self.size, rows), min(self.size, columns)
        for _ in range(_TRIES):
            top = int(torch.randint(rows - height + 1, ()))
            left = int(torch.randint(columns - width + 1, ()))
            box = {"top": top, "left": left, "height": height, "width": width}
            counts = classes[..., top : top + height, left : left + width].flatten().long().bincount(minlength=256)
            counts[IGNORED] = 0
            if 0 < counts.max() <= self.largest_share * counts.sum():
                break
        return box

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.crop(inpt, **params)


class PhotometricDistortion(v2.RandomPhotometricDistort):
    """torchvision's, without its exchange of colours, in the ranges of OpenMMLab's (18 of 180 degrees of hue)."""

    def __init__(self) -> None:
        super().__init__(hue=(-0.1, 0.1))

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {**super().make_params(flat_inputs), "channel_permutation": None}


class Complete(v2.Transform):
    """Pads to size x size on the right and below: a normalised image with 0, a map with IGNORED."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        rows, columns = inpt.shape[-2:]
        fill = IGNORED if isinstance(inpt, tv_tensors.Mask) else 0
        return F.pad(inpt, [0, 0, self.size - columns, self.size - rows], fill=fill)


def _check_sizes(image_size: int, long_side: int) -> None:
    if not isinstance(image_size, int) or not 0 < image_size <= long_side:
        raise ValueError(
            f"image_size={image_size} must be an integer, the edge of a square crop, and long_side={long_side} no less"
        )
