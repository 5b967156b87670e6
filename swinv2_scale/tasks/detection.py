"""Object detection and instance segmentation, by the conventions of COCO."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import box_iou
from torchvision.transforms.v2 import functional as F

from swinv2_scale import distributed, drawing
from swinv2_scale.config import instantiate
from swinv2_scale.data import coco
from swinv2_scale.data.boxes import DetectionEvaluationTransform, collate_boxes, with_record
from swinv2_scale.data.images import EncodedImage
from swinv2_scale.data.stream import Batch
from swinv2_scale.data.transforms import to_uint8
from swinv2_scale.models.detection.cascade import CascadeRCNN, Detections
from swinv2_scale.models.detection.matching import on_crowd
from swinv2_scale.models.detection.views import pad
from swinv2_scale.models.swin_v2 import SwinTransformerV2
from swinv2_scale.telemetry import Picture
from swinv2_scale.train import Prediction

log = logging.getLogger(__name__)

FOUND = 0.5  # overlap of a box with an object, from which on a picture counts it as found


class Detection:
    """The sum of a detector's losses, and COCO's average precision of boxes and masks.

    detector      makes a CascadeRCNN of a backbone
    scales, flip  of held-out images: each is seen at these multiples of its size, and mirrored too; see CascadeRCNN
    results       file for the detections of an evaluation in COCO's format, or None
    shown_from    score from which objects are shown in pictures
    category_ids  of the classes, for that file; None: as the annotations say, without classes that no image has
    Raises ValueError for fewer than one class.
    """

    open_sample = staticmethod(with_record)
    metrics: tuple[str, ...] = ()
    tallies: ClassVar[dict[str, tuple[int, ...]]] = {}
    num_classes = 0  # of samples; an object has one
    shown = 8

    def __init__(
        self,
        *,
        train_transform: Callable,
        evaluation_transform: DetectionEvaluationTransform,
        train_collate: Callable,
        num_classes: int,
        detector: Callable[..., CascadeRCNN],
        scales: Sequence[float],
        flip: bool,
        shown_from: float,
        results: str | None,
        category_ids: Sequence[int] | None,
    ) -> None:
        if num_classes < 1:
            raise ValueError(
                f"detection needs model.num_classes of 1 or more, got {num_classes} (0: of a checkpoint without heads)"
            )
        if category_ids is not None and len(category_ids) != num_classes:
            raise ValueError(
                f"task.category_ids has {len(category_ids)} entries; give one for each of {num_classes} classes"
            )
        self.train_transform, self.evaluation_transform = train_transform, evaluation_transform
        self.train_collate, self.evaluation_collate = train_collate, collate_boxes
        self.classes, self.detector = num_classes, detector
        self.scales, self.flip = list(scales), flip
        self.shown_from = shown_from
        self.results, self.category_ids = results, category_ids
        self.settings = {"image_size": evaluation_transform.image_size, "scales": self.scales, "flip": flip}
        self._seen: dict[Any, tuple[coco.Record, list[coco.Result]]] = {}  # by image_id, since the last `derived`
        self._masks = False

    def build(self, model: Any) -> CascadeRCNN:
        """The model to train, from a configuration of the backbone."""
        return self.detector(instantiate(model, num_classes=0), num_classes=self.classes)

    def backbone(self, model: nn.Module) -> SwinTransformerV2:
        """The part of a built model that `checkpoint=` fills."""
        assert isinstance(model, CascadeRCNN)
        return model.encoder

    def check_classes(self, *classes: Sequence[str], highest_label: int | None = None) -> None:
        """Raises ValueError unless all data have the same classes, as many as the model, and samples have none."""
        if highest_label is not None:
            raise ValueError("the data has classes of images, and detection needs boxes: pack it with --format coco")
        known = [list(names) for names in classes if names]
        for names in known:
            if len(names) != self.classes:
                raise ValueError(
                    f"the data has {len(names)} classes and the model {self.classes}: "
                    f"set model.num_classes={len(names)}"
                )
            if names != known[0]:
                raise ValueError("the data sets of training and evaluation have different categories: pack both anew")

    def loss(self, model: Callable, batch: Batch) -> Tensor:
        """Sum of the losses of a micro-batch, float32: scalar."""
        losses = model(batch["image"], batch["size"], targets_of(batch))
        return torch.stack([value.float() for value in losses.values()]).sum()

    def scores(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Nothing of single images: what is found in them is kept for `derived`, once for each image."""
        assert isinstance(model, CascadeRCNN)
        found = model.detect(batch["image"], batch["size"], scales=self.scales, flip=self.flip)
        for own, size, record in zip(found, batch["size"], batch["record"], strict=True):
            if record["image_id"] not in self._seen:
                self._seen[record["image_id"]] = (record, as_results(own, size, record))
        self._masks = bool(model.decoder.mask_heads)
        return {}

    def derived(self, tallies: dict[str, Tensor]) -> dict[str, float]:
        """COCO's numbers over the images that all ranks have seen since the last time, box_ap, mask_ap, …; and how many
        images these are, each counted once. Collective; rank 0 evaluates."""
        parts = distributed.gathered(self._seen)
        self._seen = {}
        numbers: dict[str, float] = {}
        if distributed.rank() == 0:
            numbers = merged_numbers(
                parts,
                self.classes,
                masks=self._masks,
                file=Path(self.results) if self.results else None,
                category_ids=self.category_ids,
            )
        return distributed.from_rank_0(numbers)

    def per_class(self, outcome: Any) -> dict[str, list[float]]:
        """No table."""
        return {}

    def pictures(self, model: nn.Module, batch: Batch, classes: Sequence[str]) -> tuple[str, list[Picture]]:
        """What is found, from shown_from on, and what is there side by side, for images of a held-out batch, in their
        published sizes. Wrong by the number of mistakes."""
        assert isinstance(model, CascadeRCNN)
        pictures = []
        found = model.detect(batch["image"], batch["size"], scales=self.scales, flip=self.flip)
        for image, size, own, record in zip(batch["image"], batch["size"], found, batch["record"], strict=True):
            published = (record["height"], record["width"])
            seen = to_uint8(image[:, : size[0], : size[1]].float()).cpu()
            picture = F.resize(seen, list(published), antialias=True)
            shown = self._shown(own, size, published, classes)
            truth = coco.target(record, str(record["file_name"]), masks=bool(model.decoder.mask_heads))
            missed, false = mistakes(shown.boxes, shown.labels, truth)
            name = dict(enumerate(classes))
            there = drawing.Objects(
                truth["boxes"],
                truth["labels"],
                [str(name.get(label, label)) for label in truth["labels"].tolist()],
                truth["masks"].bool() if "masks" in truth else None,
            )
            panels = (drawing.with_objects(picture, objects) for objects in (shown, there))
            caption = f"{record['file_name']}: {missed} of {len(truth['boxes'])} missed, {false} false"
            pictures.append(Picture(drawing.beside(*panels), caption, not missed + false, missed + false))
        return "detections", pictures

    def predict(self, model: nn.Module, image: EncodedImage, classes: Sequence[str]) -> Prediction:
        """Boxes, classes, scores and masks of the objects from shown_from on, best first."""
        assert isinstance(model, CascadeRCNN)
        pixels = image.pixels()
        images, sizes = pad([self.evaluation_transform({"image": image})["image"]])
        (found,) = model.detect(images.to(distributed.device()), sizes, scales=self.scales, flip=self.flip)
        shown = self._shown(found, sizes[0], (pixels.shape[1], pixels.shape[2]), classes)
        scores = found.scores[: len(shown.boxes)].cpu()
        name = dict(enumerate(classes))
        labels = range(self.classes)
        objects = [
            {"class": str(name.get(one["category_id"], one["category_id"])), "label": one["category_id"]}
            | {key: one[key] for key in ("score", "bbox", "segmentation") if key in one}
            for one in coco.results(0, shown.boxes, scores, shown.labels, shown.masks, labels)
        ]
        line = ", ".join(shown.texts) or "nothing"
        return Prediction(drawing.with_objects(pixels, shown), line, {"objects": objects})

    def _shown(
        self, found: Detections, size: tuple[int, int], published: tuple[int, int], classes: Sequence[str]
    ) -> drawing.Objects:
        """Detections in an image of `size` whose score is shown_from or more, in one of the size `published`."""
        count = int((found.scores >= self.shown_from).sum())
        masks = None if found.masks is None else found.masks[:count]
        sure = Detections(found.boxes[:count], found.scores[:count], found.labels[:count], masks)  # they are sorted
        boxes, masks = at_size(sure, size, published)
        name = dict(enumerate(classes))
        texts = [
            f"{name.get(label, label)} {score:.0%}"
            for label, score in zip(sure.labels.tolist(), sure.scores.tolist(), strict=True)
        ]
        return drawing.Objects(boxes, sure.labels.cpu(), texts, masks)


def mistakes(boxes: Tensor, labels: Tensor, truth: dict[str, Tensor]) -> tuple[int, int]:
    """How many objects of a target (see coco.target) are missed, and how many boxes (N, 4) are false.

    The best box comes first. Among the objects of its class that no better box has found a box finds the one that it
    overlaps most, with an IoU of FOUND or more; else it is false, unless half of it lies on a crowd region.
    """
    overlap = box_iou(boxes, truth["boxes"]) * (labels[:, None] == truth["labels"])
    free = torch.ones(len(truth["boxes"]))
    false = 0
    for own, crowded in zip(overlap, on_crowd(boxes, truth["crowd"], 0.5).tolist(), strict=True):
        best = int((own * free).argmax()) if len(own) else -1
        if best >= 0 and own[best] * free[best] >= FOUND:
            free[best] = 0
        else:
            false += not crowded
    return int(free.sum()), false


def targets_of(batch: Batch) -> list[dict[str, Tensor]]:
    """The targets of a batch, on the device of its images."""
    device = batch["image"].device
    return [{name: part.to(device, non_blocking=True) for name, part in own.items()} for own in batch["target"]]


def at_size(found: Detections, size: tuple[int, int], published: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """Boxes (R, 4) and masks, bool (R, Y, X), in an image of the size `published`, of what was found at `size`."""
    rows, columns = published
    factor = found.boxes.new_tensor([columns / size[1], rows / size[0]] * 2)
    boxes = (found.boxes * factor).float().cpu()
    if found.masks is None:
        return boxes, None
    return boxes, paste_masks_in_image(found.masks.float().cpu(), boxes, published)[:, 0] > 0.5


def as_results(found: Detections, size: tuple[int, int], record: coco.Record) -> list[coco.Result]:
    """Detections in an image of `size` (rows, columns), for the image that its record describes.

    Instead of category ids they have the classes' numbers.
    """
    boxes, masks = at_size(found, size, (record["height"], record["width"]))
    numbers = range(int(found.labels.max()) + 1) if len(found.labels) else range(0)
    return coco.results(record["image_id"], boxes, found.scores, found.labels, masks, numbers)


def merged_numbers(
    parts: Sequence[dict[Any, tuple[coco.Record, list[coco.Result]]]],
    classes: int,
    *,
    masks: bool,
    file: Path | None = None,
    category_ids: Sequence[int] | None = None,
) -> dict[str, float]:
    """COCO's numbers of what all ranks have seen, and `images`; an image that several ranks have seen counts once.

    parts: of each rank, by image_id, record and results, whose categories are numbers of classes. file: where to write
    the results too, with `category_ids`, or, for want of them, with the ids of the annotations.
    """
    union = {image_id: seen for part in reversed(parts) for image_id, seen in part.items()}
    records = [
        {**record, "annotations": [{**one, "category_id": one["label"]} for one in record["annotations"]]}
        for record, _ in union.values()
    ]
    found = [result for _, results in union.values() for result in results]
    if file is not None:
        known = {one["label"]: one["category_id"] for record, _ in union.values() for one in record["annotations"]}
        ids = known if category_ids is None else dict(enumerate(category_ids))
        named = [{**one, "category_id": ids[one["category_id"]]} for one in found if one["category_id"] in ids]
        if len(named) < len(found):
            log.warning(
                f"{file} lacks {len(found) - len(named):,} of {len(found):,} detections: no image has an annotation of "
                "their classes, which would tell their ids; task.category_ids=[…] does (a test set has none at all: "
                "the ids are in manifest.json of the training shards)"
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        coco.write_results(file, named)
    kinds = ["box", "mask"] if masks else ["box"]
    numbers = coco.evaluate(records, found, range(classes), kinds=kinds)
    return {**numbers, "images": float(len(union))}
