"""Which box is which object.

A *target* holds what is known of one image:

    boxes (N, 4)         its objects
    labels (N,)          int64, their classes from 0 on
    crowd (C, 4)         regions of many objects that nobody counted: what lies on them is neither right nor wrong
    masks (N, Y, X)      optional, 0 or 1, of the padded image
    has_mask (N,)        bool, with masks: whether the object has one
    semantic (Y, X)      optional, int64, the class of each pixel of the padded image, IGNORED where there is none
"""

import torch
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import box_area, box_iou, clip_boxes_to_image

Target = dict[str, Tensor]

BACKGROUND, UNDECIDED = -1, -2  # instead of the number of an object
IGNORED = 255  # class of pixels without one


def on_crowd(boxes: Tensor, crowd: Tensor, overlap: float) -> Tensor:
    """Whether a share of at least `overlap` of each box (N, 4) lies on one of the crowd regions (C, 4): bool (N,).

    The share is of the box alone: that is how COCO's evaluation compares detections with crowd regions.
    """
    if not len(crowd):
        return torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    corner = torch.maximum(boxes[:, None, :2], crowd[None, :, :2])
    sides = (torch.minimum(boxes[:, None, 2:], crowd[None, :, 2:]) - corner).clamp(min=0)
    share = sides.prod(dim=2) / box_area(boxes)[:, None].clamp(min=1e-6)
    return (share >= overlap).any(dim=1)


def assign(boxes: Tensor, target: Target, *, iou_threshold: float, crowd_overlap: float) -> Tensor:
    """The number of the object that each box (N, 4) overlaps most, BACKGROUND or UNDECIDED: int64 (N,).

    BACKGROUND where the largest overlap is below iou_threshold; UNDECIDED where such a box lies on a crowd region.
    """
    if len(target["boxes"]):
        overlap, number = box_iou(boxes, target["boxes"]).max(dim=1)
        number = torch.where(overlap >= iou_threshold, number, BACKGROUND)
    else:
        number = torch.full((len(boxes),), BACKGROUND, device=boxes.device)
    crowded = (number == BACKGROUND) & on_crowd(boxes, target["crowd"], crowd_overlap)
    return torch.where(crowded, UNDECIDED, number)


def sample(number: Tensor, *, count: int, positive: float) -> Tensor:
    """Positions (K,) of at most `count` boxes, drawn at random: up to a share `positive` objects, then background.

    number: of `assign`. Objects come first.
    """
    # torchvision's sampler knows objects from 1 on, 0 for background and -1 for neither
    objects, background = BalancedPositiveNegativeSampler(count, positive)(
        [torch.where(number == UNDECIDED, -1, number + 1)]
    )
    return torch.cat([torch.where(objects[0])[0], torch.where(background[0])[0]])


class Sample:
    """Boxes of one image with the objects they were assigned to.

    boxes (K, 4); number (K,), of `assign`; given (K,) bool, whether the box is an object's own, put in to learn from
    """

    def __init__(self, boxes: Tensor, number: Tensor, given: Tensor) -> None:
        self.boxes, self.number, self.given = boxes, number, given

    @property
    def positive(self) -> Tensor:
        """Positions of the boxes that are objects."""
        return torch.where(self.number >= 0)[0]


def reassign(
    boxes: Tensor, target: Target, *, iou_threshold: float, crowd_overlap: float, count: int, positive: float
) -> Sample:
    """The sample of a stage: boxes (N, 4) and the objects' own, assigned by the stage's threshold, and drawn from."""
    own = target["boxes"].to(boxes.dtype)
    given = torch.arange(len(boxes) + len(own), device=boxes.device) >= len(boxes)
    boxes = torch.cat([boxes, own])
    number = assign(boxes, target, iou_threshold=iou_threshold, crowd_overlap=crowd_overlap)
    chosen = sample(number, count=count, positive=positive)
    return Sample(boxes[chosen], number[chosen], given[chosen])


def refined(decoded: Tensor, given: Tensor, size: tuple[int, int]) -> Tensor:
    """What a stage hands on: its decoded boxes (N, 4) inside the image (Y, X), without those that were objects' own."""
    return clip_boxes_to_image(decoded[~given], size)


class ProposalNetwork(RegionProposalNetwork):
    """torchvision's, but anchors on crowd regions are no background. crowd_overlap is set after construction."""

    crowd_overlap: float

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[Target]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Per image, 1, 0 (background) or -1 (ignored) for each anchor (A,), and the box to regress to (A, 4)."""
        labels, boxes = super().assign_targets_to_anchors(anchors, targets)
        for label, own, target in zip(labels, anchors, targets, strict=True):
            label[(label == 0) & on_crowd(own, target["crowd"], self.crowd_overlap)] = -1.0
        return labels, boxes

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Losses of objectness and of boxes; 0 where crowd regions leave no anchor to judge."""
        if all(bool((label < 0).all()) for label in labels):
            return objectness.sum() * 0, pred_bbox_deltas.sum() * 0
        return super().compute_loss(objectness, pred_bbox_deltas, labels, regression_targets)
