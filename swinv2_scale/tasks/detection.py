"""Object detection and instance segmentation, by the conventions of COCO."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.utils import draw_bounding_boxes

from swinv2_scale import distributed
from swinv2_scale.config import instantiate
from swinv2_scale.data import coco
from swinv2_scale.data.boxes import DetectionEvaluationTransform, collate_boxes, with_record
from swinv2_scale.data.stream import Batch
from swinv2_scale.data.transforms import to_uint8
from swinv2_scale.models.detection.cascade import CascadeRCNN, Detections
from swinv2_scale.models.swin_v2 import SwinTransformerV2
from swinv2_scale.telemetry import Picture

SHOWN_FROM = 0.3  # score of a box in a picture


class Detection:
    """The sum of a detector's losses, and COCO's average precision of boxes and masks.

    detector      makes a CascadeRCNN of a backbone
    scales, flip  of held-out images: each is seen at these multiples of its size, and mirrored too; see CascadeRCNN
    results       file for the detections of an evaluation in COCO's format, or None
    category_ids  of the classes, for that file; None: as the annotations say, without classes that no image has
    Raises ValueError for fewer than one class.
    """

    open_sample = staticmethod(with_record)
    metrics: tuple[str, ...] = ()
    tallies: ClassVar[dict[str, tuple[int, ...]]] = {}
    num_classes = 0  # of samples; an object has one

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
        """Up to 8 held-out images with the boxes that the model is sure of."""
        assert isinstance(model, CascadeRCNN)
        name = dict(enumerate(classes))
        pictures = []
        found = model.detect(batch["image"][:8], batch["size"][:8])
        for image, (rows, columns), own, key in zip(batch["image"], batch["size"], found, batch["key"], strict=False):
            sure = own.scores >= SHOWN_FROM
            said = [
                f"{name.get(label, label)} {score:.0%}"
                for label, score in zip(own.labels[sure].tolist(), own.scores[sure].tolist(), strict=True)
            ]
            shown = to_uint8(image[:, :rows, :columns].float()).cpu()
            if said:
                shown = draw_bounding_boxes(shown, own.boxes[sure].cpu(), said, colors="red", width=2)
            pictures.append(Picture(shown, key))
        return "detections", pictures


def targets_of(batch: Batch) -> list[dict[str, Tensor]]:
    """The targets of a batch, on the device of its images."""
    device = batch["image"].device
    return [{name: part.to(device, non_blocking=True) for name, part in own.items()} for own in batch["target"]]


def as_results(found: Detections, size: tuple[int, int], record: coco.Record) -> list[coco.Result]:
    """Detections in an image of `size` (rows, columns), for the image that its record describes.

    Instead of category ids they have the classes' numbers.
    """
    rows, columns = record["height"], record["width"]
    factor = found.boxes.new_tensor([columns / size[1], rows / size[0]] * 2)
    boxes = (found.boxes * factor).float().cpu()
    masks = None
    if found.masks is not None:
        masks = paste_masks_in_image(found.masks.float().cpu(), boxes, (rows, columns))[:, 0] > 0.5
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
        file.parent.mkdir(parents=True, exist_ok=True)
        coco.write_results(
            file, [{**one, "category_id": ids[one["category_id"]]} for one in found if one["category_id"] in ids]
        )
    kinds = ["box", "mask"] if masks else ["box"]
    numbers = coco.evaluate(records, found, range(classes), kinds=kinds)
    return {**numbers, "images": float(len(union))}
