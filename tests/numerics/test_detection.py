"""The detector against slow and obvious implementations of its parts, and its losses where they are known."""

import math
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_detector import batch, detector, scene
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from swinv2_scale.models.detection import cascade
from swinv2_scale.models.detection.heads import MaskHead, last_mask_logits, mask_logits
from swinv2_scale.models.detection.matching import BACKGROUND, IGNORED, UNDECIDED, Sample, assign, on_crowd, reassign
from swinv2_scale.models.detection.parts import STRIDES
from swinv2_scale.models.detection.suppression import METHODS, soft_nms
from swinv2_scale.models.detection.views import pad, view


def overlap_of(a: list[float], b: list[float], *, of_first: bool = False) -> float:
    """Intersection over union of two boxes, or over the first of them."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, width) * max(0.0, height)
    own, other = (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])
    return shared / own if of_first else shared / (own + other - shared)


def random_boxes(count: int, seed: int, size: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator, dtype=torch.float64) * size * 0.7
    sides = 2 + torch.rand(count, 2, generator=generator, dtype=torch.float64) * size * 0.3
    return torch.cat([corners, corners + sides], dim=1)


# ------------------------------------------------------------------------------------------------- soft-NMS


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(3))
def test_soft_nms(method, seed):
    boxes = random_boxes(60, seed)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(60, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 2, (60,), generator=generator)
    left = dict(enumerate(scores.tolist()))
    expected = []
    while left:  # to the very end, then cut
        best = max(left, key=left.__getitem__)
        score = left.pop(best)
        if score <= 0.1:
            break
        expected.append((best, score))
        for other in left:
            overlap = overlap_of(boxes[best].tolist(), boxes[other].tolist()) if labels[best] == labels[other] else 0.0
            if method == "linear" and overlap > 0.3:
                left[other] *= 1 - overlap
            elif method == "gaussian":
                left[other] *= math.exp(-(overlap**2) / 0.4)
            elif method == "hard" and overlap > 0.3:
                left[other] = 0.0
    settings: dict[str, Any] = {"method": method, "iou_threshold": 0.3, "sigma": 0.4, "score_threshold": 0.1}
    for most in (7, 1000):
        kept, found = soft_nms(boxes, scores, labels, most=most, **settings)
        assert kept.tolist() == [number for number, _ in expected[:most]]
        assert found.tolist() == pytest.approx([score for _, score in expected[:most]], rel=1e-12)
    assert len(expected) > 15
    kept, found = soft_nms(boxes[:0], scores[:0], labels[:0], most=7, **settings)
    assert kept.shape == found.shape == (0,)


# ------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("flow", [True, False])
def test_mask_information_flow(flow):
    torch.manual_seed(0)
    heads = [MaskHead(4, convolutions=2, num_classes=3, follows=flow and n > 0).double() for n in range(3)]
    x = torch.randn(5, 4, 6, 6, dtype=torch.float64)
    expected, before = [], None
    for number, head in enumerate(heads):
        weights = dict(head.named_parameters())
        features = x
        if flow and number:
            assert before is not None
            features = x + F.relu(F.conv2d(before, weights["previous.conv.weight"], weights["previous.conv.bias"]))
        for layer in ("convs.0.conv", "convs.1.conv"):
            features = F.relu(F.conv2d(features, weights[f"{layer}.weight"], weights[f"{layer}.bias"], padding=1))
        before = features
        larger = F.relu(F.conv_transpose2d(features, weights["larger.weight"], weights["larger.bias"], stride=2))
        expected.append(F.conv2d(larger, weights["masks.weight"], weights["masks.bias"]))
    for found, wanted in zip(mask_logits(heads, x, flow=flow), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for stage in range(3):  # as in training, where a stage does without the masks of those before
        found = last_mask_logits(heads[: stage + 1], x, flow=flow)
        torch.testing.assert_close(found, expected[stage], rtol=1e-12, atol=1e-12)
    # what the last masks teach the first head
    (gradient,) = torch.autograd.grad(found.sum(), heads[0].convs[0].conv.weight, allow_unused=True)
    assert (gradient is not None) is flow
    assert not flow or gradient.abs().sum() > 0


# ------------------------------------------------------------------------------------------------- assignment


def slowly_assigned(box: list[float], objects: Any, crowd: Any, threshold: float, crowd_overlap: float) -> int:
    overlaps = [overlap_of(box, one) for one in objects]
    if overlaps and max(overlaps) >= threshold:
        return overlaps.index(max(overlaps))
    return UNDECIDED if any(overlap_of(box, one, of_first=True) >= crowd_overlap for one in crowd) else BACKGROUND


@pytest.mark.parametrize("objects", [0, 1, 6])
@pytest.mark.parametrize("crowds", [0, 2])
def test_assignment(objects, crowds):
    boxes = torch.cat([random_boxes(200, 0), random_boxes(objects, 1)])
    target = {"boxes": random_boxes(objects, 1), "crowd": random_boxes(crowds, 2)}
    if crowds:  # an object of its own, among many
        target["crowd"] = torch.cat([target["crowd"], target["boxes"][:1]])
    found = assign(boxes, target, iou_threshold=0.4, crowd_overlap=0.5).tolist()
    slow = [
        slowly_assigned(box, target["boxes"].tolist(), target["crowd"].tolist(), 0.4, 0.5) for box in boxes.tolist()
    ]
    assert found == slow
    assert (UNDECIDED in found) is (crowds > 0) and (0 in found) is (objects > 0) and BACKGROUND in found
    assert found[200:] == list(range(objects))


def test_crowd_regions_are_compared_with_the_box_alone():
    crowd = torch.tensor([[0.0, 0, 100, 100], [200, 0, 210, 10]])
    boxes = torch.tensor([[10.0, 10, 20, 20], [95, 0, 105, 10], [96, 0, 106, 10], [150, 0, 160, 10], [190, 0, 230, 10]])
    assert on_crowd(boxes, crowd, 0.5).tolist() == [True, True, False, False, False]
    assert on_crowd(boxes, crowd[:0], 0.5).tolist() == [False] * 5


def test_a_sample_has_its_share_of_objects():
    target = {"boxes": torch.tensor([[0.0, 0, 20, 20], [30, 30, 50, 50]]), "crowd": torch.tensor([[60.0, 0, 90, 30]])}
    near = torch.tensor([[1.0, 0, 20, 20]]).repeat(50, 1)
    crowded, far = torch.tensor([[61.0, 1, 70, 10]]).repeat(50, 1), torch.tensor([[0.0, 60, 9, 69]]).repeat(50, 1)
    settings: dict[str, Any] = {"iou_threshold": 0.5, "crowd_overlap": 0.5, "positive": 0.25}
    found = reassign(torch.cat([near, crowded, far]), target, count=40, **settings)
    assert (found.number >= 0).sum() == 10 and (found.number == BACKGROUND).sum() == 30
    assert len(found.positive) == 10
    found = reassign(crowded, target, count=40, **settings)  # only the two objects themselves are left
    assert found.number.tolist() == [0, 1] and found.given.all()
    found = reassign(far, {"boxes": torch.zeros(0, 4), "crowd": torch.zeros(0, 4)}, count=40, **settings)
    assert found.number.tolist() == [BACKGROUND] * 40 and not found.given.any()


def test_boxes_are_assigned_anew_from_stage_to_stage(monkeypatch):
    """Every box that box and mask heads learn from, with its object, against a cascade of loops over plain numbers."""
    model = detector(samples=100_000, positive_share=0.25).double().train()  # so many that sampling takes all
    images, sizes, targets = batch()
    targets = [{k: v.double() if k in ("boxes", "crowd") else v for k, v in target.items()} for target in targets]
    targets[0]["crowd"] = torch.tensor([[0.0, 44, 30, 64]], dtype=torch.float64)
    seen: list[tuple[str, list[Sample]]] = []

    def shift(box: list[float], stage: int) -> list[float]:  # any function of a box will do for a head
        return [math.sin(box[0] + stage), math.cos(box[1]), 2 * math.sin(box[2]), 2 * math.cos(box[3] + stage)]

    def answers(pyramid: Any, boxes: list[Tensor], stage: int) -> tuple[Tensor, Tensor]:
        deltas = torch.tensor([shift(box, stage) for own in boxes for box in own.tolist()], dtype=torch.float64)
        return torch.zeros(len(deltas), 4, dtype=torch.float64), deltas

    def samples(self: Any, boxes: list[Tensor], targets: Any, stage: int) -> list[Sample]:
        found = original(self, boxes, targets, stage)
        seen.append((f"stage {stage}", found))
        return found

    original = cascade.CascadeRCNN._samples
    noise = torch.Generator().manual_seed(7)
    near = [target["boxes"].repeat(20, 1) for target in targets]
    near = [own + 4 * torch.randn(own.shape, generator=noise, dtype=torch.float64) for own in near]
    proposals = [torch.cat([own, random_boxes(40, 5)]).clamp(0, 64) for own in near]
    monkeypatch.setattr(cascade.CascadeRCNN, "_samples", samples)
    monkeypatch.setattr(model, "_box_answers", answers)
    monkeypatch.setattr(model.decoder.rpn, "forward", lambda *_: (proposals, {}))
    model(images.double(), sizes, targets)
    assert [name for name, _ in seen] == [f"stage {stage}" for stage in (0, 0, 1, 1, 2, 2)]  # boxes, then masks

    for image, target in enumerate(targets):
        objects, crowd = target["boxes"].tolist(), target["crowd"].tolist()
        boxes = proposals[image].tolist()
        counts = set()
        for stage, (threshold, std) in enumerate(zip((0.5, 0.6, 0.7), (0.1, 0.05, 0.033), strict=True)):
            for turn in range(2):  # of the box head, then of the mask head
                assigned = [
                    (box, number, given)
                    for given, group in ((False, boxes), (True, objects))
                    for box in group
                    if (number := slowly_assigned(box, objects, crowd, threshold, 0.5)) != UNDECIDED
                ]
                own = seen[2 * stage + turn][1][image]
                found = list(zip(own.boxes.tolist(), own.number.tolist(), own.given.tolist(), strict=True))
                assert len(found) == len(assigned)
                for one, other in zip(sorted(found), sorted(assigned), strict=True):
                    assert one[0] == pytest.approx(other[0], abs=1e-9) and one[1:] == other[1:]
                counts.add(sum(number >= 0 for _, number, _ in assigned))
                if turn == 0:  # the box head moves what it saw, and keeps it inside the image
                    boxes = [moved(box, shift(box, stage), std) for box, _, given in assigned if not given]
        assert len(counts) > 2  # the stages did differ


def moved(box: list[float], delta: list[float], std: float) -> list[float]:
    width, height = box[2] - box[0], box[3] - box[1]
    x = (box[0] + box[2]) / 2 + delta[0] * std * width
    y = (box[1] + box[3]) / 2 + delta[1] * std * height
    width, height = width * math.exp(2 * std * delta[2]), height * math.exp(2 * std * delta[3])
    corners = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    return [min(max(value, 0.0), 64.0) for value in corners]


# ------------------------------------------------------------------------------------------------- losses


def test_losses_of_a_perfect_prediction_are_near_zero(monkeypatch):
    model = detector().train()
    images, _, targets = batch()
    boxes = [target["boxes"] + torch.tensor([1.0, -1, 2, 1]) for target in targets]
    torch.manual_seed(0)
    for stage in range(3):
        samples = model._samples([torch.cat([own, own[:1] * 0 + 1, own]) for own in boxes], targets, stage)
        assert sum(len(own.positive) for own in samples) > 3
        label = torch.cat(
            [
                torch.where(own.number >= 0, target["labels"][own.number.clamp(min=0)], 3)
                for own, target in zip(samples, targets, strict=True)
            ]
        )
        logits = 30.0 * F.one_hot(label, 4)
        deltas = torch.cat(
            [
                model.coders[stage].encode_single(target["boxes"][own.number.clamp(min=0)], own.boxes)
                for own, target in zip(samples, targets, strict=True)
            ]
        )
        losses = model._box_losses(logits, deltas, samples, targets, stage)
        assert all(float(loss) < 1e-5 for loss in losses), (stage, losses)
        losses = model._box_losses(-logits, deltas + 1, samples, targets, stage)
        assert all(float(loss) > 0.1 for loss in losses), (stage, losses)

        def drawn(sign: float, samples: list[Sample] = samples) -> Any:
            """Masks of the objects, cut out pixel by pixel where roi_align looks: at the middle of its four points."""
            rows = []
            for own, target in zip(samples, targets, strict=True):
                for box, number in zip(own.boxes[own.positive], own.number[own.positive], strict=True):
                    mask = target["masks"][number].float()[None, None]
                    cut = cascade.project_masks_on_boxes(mask[0], box[None], torch.zeros(1), 28)[0] >= 0.5
                    logits = torch.full((3, 28, 28), -30.0)
                    logits[target["labels"][number]] = sign * torch.where(cut, 30.0, -30.0)
                    rows.append(logits)
            return lambda *_, **__: torch.stack(rows)

        pyramid = model.pyramid(images)
        for sign, expected in ((1.0, 0.0), (-1.0, 30.0)):
            monkeypatch.setattr(cascade, "last_mask_logits", drawn(sign))
            assert float(model._mask_loss(pyramid, samples, targets, stage)) == pytest.approx(expected, abs=1e-5)
    wanted = torch.stack([target["semantic"] for target in targets])[:, 4::8, 4::8]
    logits = 30.0 * F.one_hot(wanted, 4).permute(0, 3, 1, 2).float()
    assert float(cascade.semantic_loss(logits, targets)) < 1e-5
    assert float(cascade.semantic_loss(-logits, targets)) > 1


def test_what_a_mask_head_is_to_draw():
    """The mask of an object whose box is the proposal is all ones; the half of it that lies beside is not."""
    mask = torch.zeros(1, 64, 64)
    mask[0, 8:40, 4:28] = 1
    boxes = torch.tensor([[4.0, 8, 28, 40], [16, 8, 40, 40]])
    cut = cascade.project_masks_on_boxes(mask, boxes, torch.zeros(2), 28) >= 0.5
    assert cut[0].float().mean() > 0.9
    assert cut[1, 1:-1, 1:13].all() and not cut[1, :, 15:].any()


def test_targets_of_masks_are_cut_a_few_at_a_time(monkeypatch):
    model, (images, sizes, targets) = detector().train(), batch()
    losses = []
    for most in (cascade.MASKS_AT_A_TIME, 1):
        monkeypatch.setattr(cascade, "MASKS_AT_A_TIME", most)
        torch.manual_seed(1)
        losses.append({name: float(value) for name, value in model(images, sizes, targets).items()})
    assert losses[0] == losses[1]


def test_the_semantic_loss_is_a_mean_over_pixels_with_a_class():
    logits = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    maps = torch.full((3, 16, 16), IGNORED)
    maps[0, 4, 4], maps[0, 12, 4], maps[2, 4, 12] = 1, 0, 3
    targets = [{"semantic": maps[0]}, {}, {"semantic": maps[2]}]
    chance = torch.log_softmax(logits, dim=1)
    expected = -(chance[0, 1, 0, 0] + chance[0, 0, 1, 0] + chance[2, 3, 0, 1]) / 3
    torch.testing.assert_close(cascade.semantic_loss(logits, targets), expected)
    assert float(cascade.semantic_loss(logits, [{}] * 3)) == 0.0


EMPTY = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "crowd": torch.zeros(0, 4)}


@pytest.mark.parametrize("case", ["objects", "none", "one of two", "no masks", "some masks", "crowd everywhere"])
def test_what_a_target_leaves_out_adds_nothing_and_every_parameter_learns(case):
    """Ranks that train together must have gradients of the same parameters, whatever their images hold."""
    model = detector().train()
    images, sizes, targets = batch()
    if case in ("none", "crowd everywhere"):
        targets = [dict(EMPTY), dict(EMPTY)]
    if case == "crowd everywhere":
        targets = [{**EMPTY, "crowd": torch.tensor([[-999.0, -999, 999, 999]])}] * 2
    elif case == "one of two":
        targets[0] = dict(EMPTY)
    elif case == "no masks":
        targets = [{name: target[name] for name in ("boxes", "labels", "crowd")} for target in targets]
    elif case == "some masks":
        targets[0]["has_mask"] = torch.tensor([False, False])
        targets[1].pop("masks"), targets[1].pop("has_mask")
    losses = model(images, sizes, targets)
    stages = [f"{kind}_{stage}" for stage in range(3) for kind in ("class", "box", "mask")]
    assert set(losses) == {"objectness", "rpn_box_reg", "semantic", *stages}
    assert all(math.isfinite(float(loss.detach())) for loss in losses.values())
    sum(losses.values()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    zero = {name for name, loss in losses.items() if float(loss.detach()) == 0.0}
    masks, boxes = {f"mask_{stage}" for stage in range(3)}, {f"box_{stage}" for stage in range(3)}
    classes = {f"class_{stage}" for stage in range(3)}
    assert (
        zero
        == {
            "objects": set(),
            "one of two": set(),
            "none": {*masks, *boxes, "semantic", "rpn_box_reg"},
            "no masks": {*masks, "semantic"},
            "some masks": masks,
            "crowd everywhere": {*masks, *boxes, *classes, "semantic", "rpn_box_reg", "objectness"},
        }[case]
    )


def test_anchors_on_crowd_regions_are_no_background():
    model = detector()
    anchors = [random_boxes(300, 0).float()]
    target = {"boxes": random_boxes(2, 1).float(), "crowd": torch.tensor([[0.0, 0, 32, 64]])}
    (without,), _ = model.decoder.rpn.assign_targets_to_anchors(anchors, [{**target, "crowd": torch.zeros(0, 4)}])
    (found,), _ = model.decoder.rpn.assign_targets_to_anchors(anchors, [target])
    for label, before, box in zip(found.tolist(), without.tolist(), anchors[0].tolist(), strict=True):
        crowded = overlap_of(box, [0, 0, 32, 64], of_first=True) >= 0.5
        assert label == (-1 if crowded and before == 0 else before)
    assert 50 < (found != without).sum() < 250


# ------------------------------------------------------------------------------------------------- views


@pytest.mark.parametrize("scale", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("mirrored", [False, True])
def test_boxes_go_with_what_they_surround(scale, mirrored):
    first, second = torch.zeros(3, 40, 72), torch.zeros(3, 64, 36)
    first[:, 8:20, 16:40] = 1
    second[:, 20:60, 4:32] = 1
    images, sizes = pad([first, second])
    assert images.shape == (2, 3, 64, 96) and sizes == [(40, 72), (64, 36)]
    seen = view(images, sizes, scale=scale, mirrored=mirrored)
    assert seen.sizes == [(40 * scale, 72 * scale), (64 * scale, 36 * scale)]
    assert seen.images.shape == (2, 3, math.ceil(64 * scale / 32) * 32, math.ceil(72 * scale / 32) * 32)
    for number, box in enumerate(([16.0, 8, 40, 20], [4.0, 20, 32, 60])):
        rows, columns = torch.where(seen.images[number, 0] > 0.5)
        bright = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        there = seen.into(torch.tensor([box]), number)
        assert there[0].tolist() == [float(value) for value in bright]
        torch.testing.assert_close(seen.back(there, number), torch.tensor([box]))


def test_detections_are_merged_over_views():
    model = detector().eval()
    images, sizes, _ = batch()
    one = model.detect(images, sizes)
    again = model.detect(torch.cat([images, images[:1]]), [*sizes, sizes[0]])  # an image does not know its neighbours
    torch.testing.assert_close(again[2].boxes, one[0].boxes, rtol=1e-4, atol=1e-3)
    # a mirror image of what is found in the mirror image, by the same views
    both = model.detect(images, sizes, scales=[0.75, 1.5], flip=True)
    mirrored = model.detect(images.flip(3), sizes, scales=[0.75, 1.5], flip=True)
    for found, other in zip(both, mirrored, strict=True):
        assert len(found.boxes) == 20 and found.masks is not None and found.masks.shape == (20, 1, 28, 28)
        assert (found.boxes >= 0).all() and (found.boxes <= 64).all()
        assert (found.scores.diff() <= 0).all()
        torch.testing.assert_close(found.scores, other.scores, rtol=1e-4, atol=1e-5)
        corners = other.boxes[:, [2, 1, 0, 3]] * torch.tensor([-1.0, 1, -1, 1]) + torch.tensor([64.0, 0, 64, 0])
        torch.testing.assert_close(found.boxes[:3], corners[:3], rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(found.masks[:3], other.masks[:3].flip(3), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="scales is empty"):
        model.detect(images, sizes, scales=[])
    with pytest.raises(ValueError, match="above 0, got -1"):
        model.detect(images, sizes, scales=[-1])


# ------------------------------------------------------------------------------------------------- the whole


def test_parts_can_be_left_out():
    images, sizes, targets = batch()
    plain = detector(mask_information_flow=False, semantic_classes=0, global_attention=False)
    assert not any(
        ("previous" in name) or name.startswith(("decoder.semantic", "decoder.attention"))
        for name, _ in plain.named_parameters()
    )
    assert "semantic" not in plain.train()(images, sizes, targets)
    boxes = detector(iou_thresholds=[0.5], box_stds=[0.1], stage_weights=[1], masks=False, mask_information_flow=False)
    losses = boxes.train()(images, sizes, targets)
    assert set(losses) == {"objectness", "rpn_box_reg", "class_0", "box_0", "semantic"}
    assert boxes.eval().detect(images, sizes)[0].masks is None


def test_the_weights_of_stages_and_of_the_semantic_branch():
    images, sizes, targets = batch()
    losses = []
    for weights in ([1, 0.5, 0.25], [1, 1, 1]):
        model = detector(stage_weights=weights, semantic_weight=weights[1]).train()
        random.seed(0)
        torch.manual_seed(0)
        losses.append(model(images, sizes, targets))
    for name in losses[0]:
        factor = 0.5 if name == "semantic" else {"1": 0.5, "2": 0.25}.get(name[-1], 1.0)
        torch.testing.assert_close(losses[0][name], factor * losses[1][name])


def test_the_extra_attention_is_global():
    model = detector().eval()
    x = torch.randn(1, 3, 5, 256, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert model.decoder.attention is not None
    model.decoder.attention(x)[0, 0, 0].sum().backward()
    assert (x.grad.abs().sum(dim=3) > 0).all()


def test_anchors_lie_where_the_maps_look():
    model = detector()
    images = torch.zeros(1, 3, 96, 160)
    maps = [torch.zeros(1, 1, -(-96 // s), -(-160 // s)) for s in STRIDES]
    (anchors,) = model.decoder.rpn.anchor_generator(ImageList(images, [(96, 160)]), maps)
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    last = centres[-2 * 3 * 3 :].reshape(2, 3, 3, 2)  # rows, columns, ratios
    assert last[:, :, 0].tolist() == [[[0, 0], [64, 0], [128, 0]], [[0, 64], [64, 64], [128, 64]]]
    assert centres[3].tolist() == [4, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 0}, "num_classes of 1 or more, got 0"),
        ({"iou_thresholds": [0.5]}, "one value for each stage"),
        ({"iou_thresholds": [], "box_stds": [], "stage_weights": []}, "at least one"),
        ({"anchor_sizes": [32]}, "one for each of the strides"),
        ({"masks": False}, "mask_information_flow=true needs masks=true"),
        ({"suppression": "none"}, "suppression must be one of linear, gaussian, hard, got 'none'"),
    ],
)
def test_arguments_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        detector(**changes)


def test_calls_that_do_not_fit():
    images, sizes, targets = batch()
    model = detector()
    with pytest.raises(ValueError, match="in evaluation mode only"):
        model.train().detect(images, sizes)
    with pytest.raises(ValueError, match="in training mode only"):
        model.eval()(images, sizes, targets)
    with pytest.raises(ValueError, match="multiple of 32 pixels, got 40 x 64"):
        model.detect(images[:, :, :40], [(40, 64)] * 2)


def test_images_of_different_sizes_share_a_batch():
    first, second = scene((50, 64), [[4, 8, 28, 40]], [0]), scene((96, 33), [[3, 50, 30, 90]], [1])
    images, sizes = pad([first[0], second[0]])
    assert images.shape == (2, 3, 96, 64)
    targets = []
    for _, target in (first, second):
        rows, columns = target["semantic"].shape
        space = (0, 64 - columns, 0, 96 - rows)
        target["masks"], target["semantic"] = (
            F.pad(target["masks"], space),
            F.pad(target["semantic"], space, value=IGNORED),
        )
        targets.append(target)
    model = detector()
    losses = model.train()(images, sizes, targets)
    assert math.isfinite(float(sum(losses.values()).detach()))
    for (rows, columns), found in zip(sizes, model.eval().detect(images, sizes), strict=True):
        assert (found.boxes[:, 2] <= columns).all() and (found.boxes[:, 3] <= rows).all() and len(found.boxes)
