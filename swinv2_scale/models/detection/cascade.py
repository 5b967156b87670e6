"""Cascade Mask R-CNN (arXiv 1712.00726), HTC (arXiv 1901.07518) and the HTC++ of Swin (arXiv 2103.14030, 2111.09883).

    backbone maps -> LayerNorm each -> FPN -> proposals
    stage t:  boxes of stage t - 1 -> box head t -> better boxes -> mask head t, fed by mask heads … t - 1
    semantic branch: FPN -> class of every pixel; its features are added to those of boxes and masks

The pieces in between (pyramid, proposals, RoIAlign, box coding) are torchvision's. Without semantic_classes,
mask_information_flow and global_attention it is Cascade Mask R-CNN, with one stage Mask R-CNN, without masks R-CNN.
B images, R boxes, K classes, C channels.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import project_masks_on_boxes
from torchvision.ops import clip_boxes_to_image

from swinv2_scale.models.detection.heads import (
    MaskHead,
    SemanticHead,
    exact,
    last_mask_logits,
    mask_logits,
)
from swinv2_scale.models.detection.matching import (
    IGNORED,
    Sample,
    Target,
    reassign,
    refined,
)
from swinv2_scale.models.detection.parts import BOX_SIDE, MASK_SIDE, STRIDES, Decoder
from swinv2_scale.models.detection.suppression import METHODS, soft_nms
from swinv2_scale.models.detection.views import DIVISOR, Size, View, view
from swinv2_scale.models.initial import initial_values
from swinv2_scale.models.swin_v2 import SwinTransformerV2

SMALLEST = 1e-3  # pixels of a detection's side
MASKS_AT_A_TIME = 16  # of an image, whole and in float32, while the heads' targets are cut out of them


class Detections(NamedTuple):
    """What was found in an image, best first: boxes (R, 4), scores (R,), labels (R,), and each one's mask inside its
    box as probabilities (R, 1, 28, 28), or None without mask heads."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None


class Pyramid(NamedTuple):
    """The maps of a batch by name, float32 (B, C, Y/s, X/s); features and logits of the semantic branch, if any."""

    maps: dict[str, Tensor]
    semantic: Tensor | None
    logits: Tensor | None
    padded: Size


class CascadeRCNN(nn.Module):
    """A detector.

    encoder             a SwinTransformerV2 of four stages without classifier; its final norm serves the last map
    num_classes         classes of objects
    iou_thresholds, box_stds, stage_weights
                        per stage: overlap from which a box is an object, standard deviation of the shifts of its centre
                        (twice that for log sizes) in units of its own size, weight of the stage's losses
    masks, mask_information_flow, semantic_classes (0: none), global_attention
                        parts that can be left out; semantic_weight is that branch's in the loss
    channels, box_convolutions, box_features, mask_convolutions, semantic_convolutions
                        sizes of pyramid and heads
    anchor_sizes        pixels, one for each of the strides 4 … 64
    proposals           kept per image, after NMS; samples, positive_share: boxes a stage learns from per image, and how
                        many of them at most are objects
    crowd_overlap       share of a box on a crowd region from which it is no background
    suppression, suppression_iou, suppression_sigma, score_threshold, detections
                        of soft-NMS at test, see suppression.py; `detections` per image at most
    Raises ValueError for arguments that do not fit together.
    """

    def __init__(
        self,
        encoder: SwinTransformerV2,
        *,
        num_classes: int,
        iou_thresholds: Sequence[float],
        box_stds: Sequence[float],
        stage_weights: Sequence[float],
        masks: bool,
        mask_information_flow: bool,
        semantic_classes: int,
        semantic_weight: float,
        global_attention: bool,
        channels: int,
        box_convolutions: int,
        box_features: int,
        mask_convolutions: int,
        semantic_convolutions: int,
        anchor_sizes: Sequence[int],
        proposals: int,
        samples: int,
        positive_share: float,
        crowd_overlap: float,
        suppression: str,
        suppression_iou: float,
        suppression_sigma: float,
        score_threshold: float,
        detections: int,
    ) -> None:
        super().__init__()
        stages = len(iou_thresholds)
        if not isinstance(encoder.head, nn.Identity) or len(encoder.widths) != 4:
            raise ValueError(
                "a detector needs a backbone of four stages without classifier: build it with num_classes=0"
            )
        if num_classes < 1:
            raise ValueError(f"a detector needs num_classes of 1 or more, got {num_classes}")
        if stages < 1 or len(box_stds) != stages or len(stage_weights) != stages:
            raise ValueError(
                f"iou_thresholds {list(iou_thresholds)}, box_stds {list(box_stds)} and stage_weights "
                f"{list(stage_weights)} must have one value for each stage, and at least one"
            )
        if len(anchor_sizes) != len(STRIDES):
            raise ValueError(f"anchor_sizes {list(anchor_sizes)}: give one for each of the strides {STRIDES}")
        if mask_information_flow and not masks:
            raise ValueError("mask_information_flow=true needs masks=true: there are no mask heads to inform")
        if suppression not in METHODS:
            raise ValueError(f"suppression must be one of {', '.join(METHODS)}, got {suppression!r}")
        self.encoder, self.num_classes = encoder, num_classes
        self.iou_thresholds, self.stage_weights = list(iou_thresholds), list(stage_weights)
        self.mask_information_flow, self.semantic_weight = mask_information_flow, semantic_weight
        self.samples, self.positive_share, self.crowd_overlap = samples, positive_share, crowd_overlap
        self.suppression, self.suppression_iou, self.suppression_sigma = suppression, suppression_iou, suppression_sigma
        self.score_threshold, self.detections = score_threshold, detections
        self.coders = [BoxCoder((1 / s, 1 / s, 0.5 / s, 0.5 / s)) for s in box_stds]

        self.decoder = Decoder(
            encoder,
            num_classes=num_classes,
            stages=stages,
            masks=masks,
            mask_information_flow=mask_information_flow,
            semantic_classes=semantic_classes,
            global_attention=global_attention,
            channels=channels,
            box_convolutions=box_convolutions,
            box_features=box_features,
            mask_convolutions=mask_convolutions,
            semantic_convolutions=semantic_convolutions,
            anchor_sizes=anchor_sizes,
            proposals=proposals,
            crowd_overlap=crowd_overlap,
        )
        initial = initial_values(
            self, depths=encoder.depths, scheme=encoder.weight_init, seed=int(torch.randint(2**62, (), device="cpu"))
        )
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if not parameter.is_meta and not name.startswith("encoder."):
                    parameter.copy_(initial(name))

    def forward(self, images: Tensor, sizes: Sequence[Size], targets: Sequence[Target]) -> dict[str, Tensor]:
        """The losses, each a scalar with its weight, of padded images (B, 3, Y, X); for training mode.

        sizes: rows and columns of each image before it was padded. targets: see matching.py. What a target leaves out
        (objects, masks, the semantic map) adds nothing to its loss. Raises ValueError outside of training mode.
        """
        if not self.training:
            raise ValueError("a detector has losses in training mode only: call .train(), or detect() for detections")
        pyramid = self.pyramid(images)
        proposals, of_proposals = self.decoder.rpn(ImageList(images, list(sizes)), pyramid.maps, list(targets))
        losses = {name.removeprefix("loss_"): value for name, value in of_proposals.items()}
        boxes = [one.detach() for one in proposals]
        for stage, weight in enumerate(self.stage_weights):
            # boxes of the stage before, assigned anew by this stage's threshold
            samples = self._samples(boxes, targets, stage)
            classes, deltas = self._box_answers(pyramid, [one.boxes for one in samples], stage)
            class_loss, box_loss = self._box_losses(classes, deltas, samples, targets, stage)
            losses[f"class_{stage}"], losses[f"box_{stage}"] = weight * class_loss, weight * box_loss
            # masks learn from the boxes as this stage leaves them: interleaved execution
            boxes = self._handed_on(deltas.detach(), samples, sizes, stage)
            if self.decoder.mask_heads:
                samples = self._samples(boxes, targets, stage)
                losses[f"mask_{stage}"] = weight * self._mask_loss(pyramid, samples, targets, stage)
        if pyramid.logits is not None:
            losses["semantic"] = self.semantic_weight * semantic_loss(pyramid.logits, targets)
        return losses

    def pyramid(self, images: Tensor) -> Pyramid:
        """What heads look at, of padded images (B, 3, Y, X). Raises ValueError unless 32 divides Y and X."""
        rows, columns = images.shape[2:]
        if rows % DIVISOR or columns % DIVISOR:
            raise ValueError(
                f"a detector needs images padded to a multiple of {DIVISOR} pixels, got {rows} x {columns}"
            )
        *maps, last = self.encoder.forward_features(images)
        if self.decoder.attention is not None:
            last = self.decoder.attention(last)
        return self.pyramid_of(maps, last, (rows, columns))

    def pyramid_of(self, maps: Sequence[Tensor], last: Tensor, padded: Size) -> Pyramid:
        """As `pyramid`, of the encoder's maps (B, Y/s, X/s, C_s), the last one after the global attention."""
        channels_first = [output(one) for output, one in zip(self.decoder.outputs, maps, strict=True)]
        channels_first.append(self.encoder.norm(last).permute(0, 3, 1, 2))
        kind = self.decoder.neck.inner_blocks[0][0].weight.dtype
        neck = self.decoder.neck({str(number): one.to(kind) for number, one in enumerate(channels_first)})
        neck = {name: exact(one) for name, one in neck.items()}
        if self.decoder.semantic_head is None:
            return Pyramid(neck, None, None, padded)
        logits, semantic = self.decoder.semantic_head(list(neck.values()))
        return Pyramid(neck, semantic, logits, padded)

    def box_features(self, pyramid: Pyramid, boxes: list[Tensor]) -> Tensor:
        """What a box head sees of each image's boxes (R_i, 4), one after the other: (R, C, 7, 7)."""
        x = self.decoder.box_pool(pyramid.maps, boxes, [pyramid.padded])
        if pyramid.semantic is None:
            return x
        semantic = self.decoder.semantic_pool({"semantic": pyramid.semantic}, boxes, [pyramid.padded])
        return x + F.adaptive_avg_pool2d(semantic, BOX_SIDE)

    def mask_features(self, pyramid: Pyramid, boxes: list[Tensor]) -> Tensor:
        """What a mask head sees of each image's boxes (R_i, 4), one after the other: (R, C, 14, 14)."""
        x = self.decoder.mask_pool(pyramid.maps, boxes, [pyramid.padded])
        if pyramid.semantic is None:
            return x
        return x + self.decoder.semantic_pool({"semantic": pyramid.semantic}, boxes, [pyramid.padded])

    def _samples(self, boxes: list[Tensor], targets: Sequence[Target], stage: int) -> list[Sample]:
        return [
            reassign(
                own,
                target,
                iou_threshold=self.iou_thresholds[stage],
                crowd_overlap=self.crowd_overlap,
                count=self.samples,
                positive=self.positive_share,
            )
            for own, target in zip(boxes, targets, strict=True)
        ]

    def mask_heads(self, stages: int) -> list[MaskHead]:
        """Those of the first `stages` stages."""
        return [head for head in self.decoder.mask_heads[:stages] if isinstance(head, MaskHead)]

    def _box_answers(self, pyramid: Pyramid, boxes: list[Tensor], stage: int) -> tuple[Tensor, Tensor]:
        return self.decoder.box_heads[stage](self.box_features(pyramid, boxes))

    def _box_losses(
        self, classes: Tensor, deltas: Tensor, samples: list[Sample], targets: Sequence[Target], stage: int
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy of logits (R, K + 1), and smooth L1 distance of deltas (R, 4), both a mean over all R boxes."""
        labels = []
        wanted = []
        for own, target in zip(samples, targets, strict=True):
            label = torch.full_like(own.number, self.num_classes)
            label[own.positive] = target["labels"][own.number[own.positive]]
            labels.append(label)
            objects = target["boxes"][own.number[own.positive]].to(own.boxes.dtype)
            wanted.append(self.coders[stage].encode_single(objects, own.boxes[own.positive]))
        label = torch.cat(labels)
        count = max(1, len(label))
        class_loss = F.cross_entropy(classes, label, reduction="sum") / count
        near = deltas[label < self.num_classes]
        return class_loss, F.smooth_l1_loss(near, torch.cat(wanted).to(near.dtype), reduction="sum") / count

    def _handed_on(self, deltas: Tensor, samples: list[Sample], sizes: Sequence[Size], stage: int) -> list[Tensor]:
        """The boxes of each image as a stage leaves them."""
        parts = deltas.split([len(own.boxes) for own in samples])
        return [
            refined(self.coders[stage].decode_single(delta, own.boxes), own.given, size)
            for delta, own, size in zip(parts, samples, sizes, strict=True)
        ]

    def _mask_loss(self, pyramid: Pyramid, samples: list[Sample], targets: Sequence[Target], stage: int) -> Tensor:
        """Mean cross-entropy of the pixels of the masks of all objects' boxes that have one."""
        boxes, labels, wanted = [], [], []
        for own, target in zip(samples, targets, strict=True):
            number = own.number[own.positive]
            chosen = own.positive[target["has_mask"][number]] if "masks" in target else own.positive[:0]
            number = own.number[chosen]
            boxes.append(own.boxes[chosen])
            labels.append(target["labels"][number])
            for part in range(0, len(chosen), MASKS_AT_A_TIME):
                some = slice(part, part + MASKS_AT_A_TIME)
                masks, order = target["masks"][number[some]], torch.arange(len(number[some]), device=number.device)
                wanted.append(project_masks_on_boxes(masks, own.boxes[chosen[some]], order, 2 * MASK_SIDE) >= 0.5)
        logits = last_mask_logits(
            self.mask_heads(stage + 1), self.mask_features(pyramid, boxes), flow=self.mask_information_flow
        )
        if not wanted:
            return logits.sum() * 0
        label = torch.cat(labels)
        return F.binary_cross_entropy_with_logits(
            logits[torch.arange(len(label), device=label.device), label], torch.cat(wanted).to(logits.dtype)
        )

    @torch.no_grad()
    def detect(
        self, images: Tensor, sizes: Sequence[Size], *, scales: Sequence[float] = (1.0,), flip: bool = False
    ) -> list[Detections]:
        """What is found in each of padded images (B, 3, Y, X); boxes in their pixels. For evaluation mode.

        scales, flip: also of the images at these scales, each with its mirror image. Boxes of all views go through one
        suppression; the mask of a box is the mean over all views and stages. Raises ValueError in training mode, and
        without scales.
        """
        if self.training:
            raise ValueError("a detector detects in evaluation mode only: call .eval()")
        if not scales:
            raise ValueError("scales is empty: give [1.0] for the images as they are")
        views = [
            view(images, sizes, scale=scale, mirrored=mirrored)
            for scale in scales
            for mirrored in ((False, True) if flip else (False,))
        ]
        pyramids = [self.pyramid(one.images) for one in views]
        found = [list(self._candidates(one, pyramid, sizes)) for one, pyramid in zip(views, pyramids, strict=True)]
        answers = [self._suppressed([of_view[number] for of_view in found]) for number in range(len(images))]
        if not self.decoder.mask_heads:
            return answers
        boxes = [answer.boxes for answer in answers]
        labels = torch.cat([answer.labels for answer in answers])
        probabilities = torch.stack(
            [
                self._mask_probabilities(one, pyramid, boxes, labels)
                for one, pyramid in zip(views, pyramids, strict=True)
            ]
        ).mean(dim=0)
        masks = probabilities.split([len(own) for own in boxes])
        return [answer._replace(masks=own) for answer, own in zip(answers, masks, strict=True)]

    def _candidates(self, seen: View, pyramid: Pyramid, original: Sequence[Size]) -> Iterator[tuple[Tensor, Tensor]]:
        """Per image, its boxes (R, 4) in original pixels after the last stage, and the mean over stages of the
        probability of each class (R, K)."""
        boxes, _ = self.decoder.rpn(ImageList(seen.images, seen.sizes), pyramid.maps)
        counts = [len(own) for own in boxes]
        probabilities = []
        for stage, coder in enumerate(self.coders):
            classes, deltas = self._box_answers(pyramid, boxes, stage)
            probabilities.append(F.softmax(classes, dim=1))
            boxes = [
                clip_boxes_to_image(coder.decode_single(delta, own), size)
                for delta, own, size in zip(deltas.split(counts), boxes, seen.sizes, strict=True)
            ]
        scores = torch.stack(probabilities).mean(dim=0)[:, :-1].split(counts)
        for number, (own, score, size) in enumerate(zip(boxes, scores, original, strict=True)):
            yield clip_boxes_to_image(seen.back(own, number), size), score

    def _suppressed(self, candidates: list[tuple[Tensor, Tensor]]) -> Detections:
        """The best boxes of an image among those of all views."""
        boxes, scores = (torch.cat(parts) for parts in zip(*candidates, strict=True))
        large = ((boxes[:, 2:] - boxes[:, :2]) > SMALLEST).all(dim=1)
        row, label = torch.where((scores > self.score_threshold) & large[:, None])
        boxes = boxes[row]
        kept, score = soft_nms(
            boxes,
            scores[row, label],
            label,
            method=self.suppression,
            iou_threshold=self.suppression_iou,
            sigma=self.suppression_sigma,
            score_threshold=self.score_threshold,
            most=self.detections,
        )
        return Detections(boxes[kept], score, label[kept], None)

    def _mask_probabilities(self, seen: View, pyramid: Pyramid, boxes: list[Tensor], labels: Tensor) -> Tensor:
        """The mean over stages of the masks of each image's boxes (R_i, 4) in original pixels: (R, 1, 28, 28)."""
        there = [seen.into(own, number) for number, own in enumerate(boxes)]
        heads = self.mask_heads(len(self.decoder.mask_heads))
        answers = mask_logits(heads, self.mask_features(pyramid, there), flow=self.mask_information_flow)
        rows = torch.arange(len(labels), device=labels.device)
        mean = torch.stack([logits[rows, labels].sigmoid() for logits in answers]).mean(dim=0)
        return (mean.flip(2) if seen.mirrored else mean)[:, None]


def semantic_loss(logits: Tensor, targets: Sequence[Target]) -> Tensor:
    """Mean cross-entropy of logits (B, K, Y/8, X/8) over the pixels that have a class; 0 without any."""
    stride = SemanticHead.STRIDE
    label = torch.full((len(logits), *logits.shape[2:]), IGNORED, device=logits.device)
    for own, target in zip(label, targets, strict=True):
        if "semantic" in target:
            own.copy_(target["semantic"][stride // 2 :: stride, stride // 2 :: stride])
    count = (label != IGNORED).sum().clamp(min=1)
    return F.cross_entropy(logits, label, ignore_index=IGNORED, reduction="sum") / count
