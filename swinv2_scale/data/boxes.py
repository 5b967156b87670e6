"""One image with objects -> one training example, and such examples -> a batch.

A sample is a dictionary: "image" an EncodedImage, "record" what COCO says of it (see coco.py), "semantic" the bytes of
a PNG or None, "label" -1, "key", "draw", "chance", "corrupt". A transform returns it with "image" float32 (3, Y, X),
normalised, and "target": boxes, labels, crowd, and as far as they are known masks, has_mask and semantic, all of the
new image.
Randomness comes out of torch's default generator, as in transforms.py.
"""

import io
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from swinv2_scale.data import coco
from swinv2_scale.data.folder import MASK_EXTENSION
from swinv2_scale.data.images import CorruptSampleError
from swinv2_scale.data.jitter import IGNORED, ObjectJitter, around
from swinv2_scale.data.shards import open_sample
from swinv2_scale.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Sample, collate

DIVISOR = 32  # images of a batch are padded to a multiple of it
SMALLEST = 1.0  # pixels of a side; smaller objects are left out after a crop
Target = dict[str, torch.Tensor]


def with_record(members: dict[str, bytes], classes: Sequence[str]) -> Sample:
    """A sample of an image, its COCO record, and a map of classes where it has one (`seg.png`: 0 none, v class v - 1).

    Raises CorruptSampleError for a sample without a record.
    """
    image, _ = open_sample(members, ())
    try:
        record = json.loads(members["json"])
        labels = [annotation["label"] for annotation in record["annotations"]]
        record["image_id"], record["width"], record["height"]
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptSampleError(f"no COCO record among its members ({type(error).__name__}: {error})") from error
    if classes and not all(0 <= label < len(classes) for label in labels):
        raise CorruptSampleError(f"labels {labels} are not all one of 0 to {len(classes) - 1}")
    return {"image": image, "record": record, "semantic": members.get(MASK_EXTENSION), "label": -1}


def decoded(sample: Sample, *, masks: bool) -> tuple[torch.Tensor, Target]:
    """The image, uint8 (3, Y, X), and the target of a sample, as they are stored.

    Raises CorruptSampleError for an image that does not decode or is of another size than its record says, and
    ValueError for annotations that are wrong.
    """
    image, record = sample["image"].pixels(), sample["record"]
    size = (record["height"], record["width"])
    if tuple(image.shape[1:]) != size:
        raise CorruptSampleError(
            f"image has {image.shape[1]} x {image.shape[2]} pixels, its record {size[0]} x {size[1]}"
        )
    target = coco.target(record, f"{sample['key']} ({record['file_name']})", masks=masks)
    if sample["semantic"] is not None:
        target["semantic"] = semantic_map(sample["semantic"], size)
    return image, target


def semantic_map(content: bytes, size: tuple[int, int]) -> torch.Tensor:
    """The classes of pixels, int64 (Y, X), of a PNG with one value per pixel: 0 is IGNORED, v is class v - 1."""
    try:
        with Image.open(io.BytesIO(content)) as picture:
            values = np.array(picture)
    except Exception as error:  # PIL's readers raise whatever their parsing runs into
        raise CorruptSampleError(f"map of classes does not decode ({error})") from error
    if values.shape != size or values.dtype != np.uint8:
        raise CorruptSampleError(f"map of classes is {values.dtype} {values.shape}, and not uint8 {size} as its image")
    return torch.from_numpy(values - np.uint8(1)).long()  # 0 becomes 255


class DetectionTransform:
    """Scale jitter on a square, and mirroring: the wide multi-scale training of HTC++.

    Each object is moved inside its image with probability `object_jitter`, see jitter.py. The image is made to fit a
    square of `image_size`, times a factor out of `scale`, which the sample's "chance" chooses: images of a batch have
    similar sizes, and little padding. Of what is larger than the square a random part is cut out. `flip` is a
    probability. Objects of which less than a pixel is left are left out. masks: whether they are read. Raises
    ValueError for a range of factors that is none.
    """

    def __init__(
        self, *, image_size: int, scale: Sequence[float], flip: float, masks: bool, object_jitter: float
    ) -> None:
        if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale {list(scale)} must be two factors above 0, the smaller one first")
        self.image_size, self.scale, self.masks = image_size, tuple(scale), masks
        self.jitter = ObjectJitter(object_jitter)
        self.then = [AtMost(image_size), v2.RandomHorizontalFlip(flip)]

    def __call__(self, sample: Sample) -> Sample:
        low, high = self.scale
        factor = low + sample["chance"] * (high - low)
        resize = v2.ScaleJitter((self.image_size, self.image_size), (factor, factor), antialias=True)
        image, target = self.jitter(*decoded(sample, masks=self.masks))
        image, target = transformed(v2.Compose([resize, *self.then]), image, target)
        return {**without_sources(sample), "image": normalised(image), "target": target}


class DetectionEvaluationTransform:
    """The whole image, as large as fits a square of `image_size`; its record says what was there."""

    def __init__(self, *, image_size: int) -> None:
        self.image_size = image_size

    def __call__(self, sample: Sample) -> Sample:
        image = sample["image"].pixels()
        factor = self.image_size / max(image.shape[1:])
        size = [max(1, round(side * factor)) for side in image.shape[1:]]
        image = v2.functional.resize(image, size, antialias=True)
        return {**without_sources(sample), "image": normalised(image), "target": {}}


class AtMost(v2.Transform):
    """A random part of what is larger than size x size pixels."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Where the part lies in the image among the inputs."""
        rows, columns = next(one.shape[-2:] for one in flat_inputs if isinstance(one, tv_tensors.Image))
        height, width = min(rows, self.size), min(columns, self.size)
        top = int(torch.randint(rows - height + 1, ()))
        left = int(torch.randint(columns - width + 1, ()))
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """That part of an image, of boxes, or of masks."""
        return v2.functional.crop(inpt, **params)


def transformed(joint: v2.Transform, image: torch.Tensor, target: Target) -> tuple[torch.Tensor, Target]:
    """An image (3, Y, X) and its target after the same geometric transform; what has left the image is left out."""
    size = (image.shape[1], image.shape[2])
    parts: dict[str, Any] = {"image": tv_tensors.Image(image)}
    for name in ("boxes", "crowd"):
        parts[name] = tv_tensors.BoundingBoxes(target[name], format="XYXY", canvas_size=size)
    for name in ("masks", "semantic"):
        if name in target:
            parts[name] = tv_tensors.Mask(target[name])
    parts = {name: torch.Tensor.as_subclass(part, torch.Tensor) for name, part in joint(parts).items()}
    image = parts.pop("image")
    sides = parts["boxes"][:, 2:] - parts["boxes"][:, :2]
    kept = (sides >= SMALLEST).all(dim=1)
    new = {"boxes": parts["boxes"][kept], "labels": target["labels"][kept], "crowd": parts["crowd"]}
    new["crowd"] = new["crowd"][(new["crowd"][:, 2:] > new["crowd"][:, :2]).all(dim=1)]
    if "masks" in parts:
        new["masks"] = parts["masks"][kept]
        new["has_mask"] = target["has_mask"][kept] & _any(new["masks"])
    if "semantic" in parts:
        new["semantic"] = parts["semantic"]
    return image, new


def normalised(image: torch.Tensor) -> torch.Tensor:
    """uint8 (3, Y, X) -> float32, as the backbone was trained with."""
    return v2.functional.normalize(
        v2.functional.to_dtype(image, torch.float32, scale=True), IMAGENET_MEAN, IMAGENET_STD
    )


def without_sources(sample: Sample) -> Sample:
    """A sample without what was only there to be decoded."""
    return {name: value for name, value in sample.items() if name != "semantic"}


class Paste:
    """Collates samples, and pastes objects of one image into its neighbour: simple copy-paste (arXiv 2012.07177).

    With `probability` an image receives a random half, on average, of the objects of the image before it that have
    masks, where they were. They cover what is there: masks and boxes of covered objects shrink, and those of which
    nothing is left are left out. An image takes part if all of its objects have masks. All draws of an image come from
    its `draw`, but who its neighbour is depends on the batch. Raises ValueError for what is no probability, and for an
    image without neighbour.
    """

    def __init__(self, *, probability: float) -> None:
        if not 0 <= probability <= 1:
            raise ValueError(f"the probability of pasting must be from 0 to 1, got {probability}")
        self.probability = probability

    def __call__(self, samples: list[Sample]) -> dict[str, Any]:
        if self.probability > 0 and len(samples) == 1:
            raise ValueError(
                "objects are pasted from a neighbour and the micro-batch has 1 image; choose micro_batch=2 or more, or "
                "switch pasting off with task.train_collate.probability=0"
            )
        pasted = []
        for sample, other in zip(samples, samples[-1:] + samples[:-1], strict=True):
            random = np.random.default_rng([sample["draw"], 2])  # its own stream: the crop used `draw` itself
            if random.random() < self.probability and _all_drawn(sample) and _all_drawn(other):
                chosen = torch.from_numpy(random.random(len(other["target"]["boxes"])) < 0.5)
                image, target = paste(sample["image"], sample["target"], other["image"], other["target"], chosen)
                sample = {**sample, "image": image, "target": target}  # noqa: PLW2901
            pasted.append(sample)
        return collate_boxes(pasted)


def _all_drawn(sample: Sample) -> bool:
    return "masks" in sample["target"] and bool(sample["target"]["has_mask"].all())


def paste(
    image: torch.Tensor, target: Target, source: torch.Tensor, objects: Target, chosen: torch.Tensor
) -> tuple[torch.Tensor, Target]:
    """An image (3, Y, X) and its target with the `chosen` objects, bool (N,), of a source image of any size.

    Both have masks. The source lies corner on corner; what is beside the image is cut off. Boxes of objects of which
    something was covered are drawn anew around what is left.
    """
    rows, columns = image.shape[1:]
    space = (0, columns - source.shape[2], 0, rows - source.shape[1])  # negative: cut off
    masks = F.pad(objects["masks"][chosen], space)
    shown = _any(masks)
    masks, labels = masks[shown], objects["labels"][chosen][shown]
    if not len(masks):
        return image, target
    above = (masks > 0).any(dim=0)
    left = target["masks"] * ~above
    covered = _any(left != target["masks"])
    kept = _any(left)
    boxes = target["boxes"].clone()
    for number in torch.where(covered & kept)[0].tolist():
        boxes[number] = around(left[number : number + 1])[0]
    new = {
        "boxes": torch.cat([boxes[kept], around(masks)]),
        "labels": torch.cat([target["labels"][kept], labels]),
        "crowd": target["crowd"],
        "masks": torch.cat([left[kept], masks]),
        "has_mask": torch.ones(int(kept.sum()) + len(masks), dtype=torch.bool),
    }
    if "semantic" in target and "semantic" in objects:
        new["semantic"] = torch.where(above, F.pad(objects["semantic"], space, value=IGNORED), target["semantic"])
    return torch.where(above, F.pad(source, space), image), new


def _any(masks: torch.Tensor) -> torch.Tensor:
    """Whether each of masks (N, Y, X) has pixels, bool (N,): .any() of uint8 is uint8, which does not index."""
    return (masks > 0).flatten(1).any(dim=1)


def collate_boxes(samples: list[Sample]) -> dict[str, Any]:
    """A batch: "image" (B, 3, Y, X) padded with zeros, "size" a list of (rows, columns), "target" and "record" lists.

    Y and X are the smallest multiples of 32 that hold all images. Masks are padded like the images, semantic maps with
    IGNORED. All else is collated as in transforms.py.
    """
    apart = ("image", "target", "record")
    batch = collate([{name: value for name, value in sample.items() if name not in apart} for sample in samples])
    sizes = [(sample["image"].shape[1], sample["image"].shape[2]) for sample in samples]
    rows, columns = (math.ceil(max(size[axis] for size in sizes) / DIVISOR) * DIVISOR for axis in (0, 1))
    spaces = [(0, columns - size[1], 0, rows - size[0]) for size in sizes]
    batch["image"] = torch.stack([F.pad(sample["image"], s) for sample, s in zip(samples, spaces, strict=True)])
    batch["size"] = sizes
    batch["target"] = [_padded(sample["target"], space) for sample, space in zip(samples, spaces, strict=True)]
    batch["record"] = [sample["record"] for sample in samples]
    return batch


def _padded(target: Target, space: Sequence[int]) -> Target:
    padded = dict(target)
    if "masks" in target:
        padded["masks"] = F.pad(target["masks"], list(space))
    if "semantic" in target:
        padded["semantic"] = F.pad(target["semantic"], list(space), value=IGNORED)
    return padded
