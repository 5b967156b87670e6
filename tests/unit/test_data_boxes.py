"""Images with objects: what a joint transform, pasting and collating make of them."""

import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from swinv2_scale.data import boxes
from swinv2_scale.data.images import CorruptSampleError

ROWS, COLUMNS = 60, 90
PLACES = [(10, 5, 40, 30), (50, 20, 85, 55), (0, 40, 20, 60)]  # x1, y1, x2, y2
COLOURS = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]


def encoded(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def members(*, masks: bool = True, semantic: bool = False, crowd: bool = False) -> dict[str, bytes]:
    """A grey image with a rectangle of its own colour for each class."""
    pixels = np.full((ROWS, COLUMNS, 3), 120, dtype=np.uint8)
    classes = np.zeros((ROWS, COLUMNS), dtype=np.uint8)
    annotations: list[dict[str, Any]] = []
    for label, ((x1, y1, x2, y2), colour) in enumerate(zip(PLACES, COLOURS, strict=True)):
        pixels[y1:y2, x1:x2] = colour
        classes[y1:y2, x1:x2] = label + 1
        polygon = [[x1, y1, x2, y1, x2, y2, x1, y2]] if masks else []
        one = {"id": label, "bbox": [x1, y1, x2 - x1, y2 - y1], "label": label, "segmentation": polygon}
        annotations.append(one | {"iscrowd": int(crowd and label == 2)})
    record = {"image_id": 7, "file_name": "7.png", "width": COLUMNS, "height": ROWS, "annotations": annotations}
    found = {"png": encoded(pixels), "json": json.dumps(record).encode()}
    return found | ({"seg.png": encoded(classes)} if semantic else {})


def sample(draw: int = 1, chance: float = 0.5, **kinds: bool) -> dict[str, Any]:
    own = {"key": "7", "draw": draw, "chance": chance, "corrupt": [], "reads": []}
    return {**boxes.with_record(members(**kinds), "abc"), **own}


def transform(
    *, scale: tuple[float, float] = (1.0, 1.0), flip: float = 0.0, size: int = 90, jitter: float = 0.0
) -> boxes.DetectionTransform:
    return boxes.DetectionTransform(image_size=size, scale=scale, flip=flip, masks=True, object_jitter=jitter)


def coloured(image: torch.Tensor, label: int) -> torch.Tensor:
    """Where a normalised image has the colour of a class."""
    pixels = image * torch.tensor(boxes.IMAGENET_STD)[:, None, None] + torch.tensor(boxes.IMAGENET_MEAN)[:, None, None]
    others = [channel for channel in range(3) if channel != label]
    return (pixels[label] > 0.75) & (pixels[others] < 0.25).all(dim=0)


def agrees(example: dict[str, Any]) -> None:
    """Boxes, masks and semantic map are where the image has the colour, but for a pixel of interpolation."""
    image, target = example["image"], example["target"]
    assert image.dtype == torch.float32 and target["masks"].shape[1:] == image.shape[1:]
    for number, label in enumerate(target["labels"].tolist()):
        place = coloured(image, label)
        mask = target["masks"][number] > 0
        edge = torch.nn.functional.max_pool2d(mask[None].float(), 3, 1, 1)[0] > 0
        inner = torch.nn.functional.max_pool2d(1 - mask[None].float(), 5, 1, 2)[0] == 0
        assert (place & ~edge).sum() == 0 and (inner & ~place).sum() == 0
        rows, columns = torch.where(mask)
        drawn = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert target["boxes"][number].tolist() == pytest.approx([float(value) for value in drawn], abs=1.01)
        assert bool(target["has_mask"][number])
        if "semantic" in target:
            assert (target["semantic"][inner] == label).all()
    if "semantic" in target:
        nothing = ~target["masks"].bool().any(dim=0)
        assert (target["semantic"][nothing] == boxes.IGNORED).float().mean() > 0.97


@pytest.mark.parametrize("scale", [1.0, 0.5, 1.7])
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_everything_moves_together(scale, flip):
    for seed in range(3):
        torch.manual_seed(seed)
        example = transform(scale=(scale, scale), flip=flip)(sample(semantic=True))
        agrees(example)
        assert max(example["image"].shape[1:]) <= 90
        assert scale > 1 or len(example["target"]["labels"]) == 3
    expected = (60, 90) if scale == 1 else (30, 45) if scale == 0.5 else (90, 90)
    assert example["image"].shape[1:] == expected


def test_a_mirror_image():
    straight, mirrored = (transform(flip=flip)(sample(crowd=True)) for flip in (0.0, 1.0))
    assert torch.equal(mirrored["image"], straight["image"].flip(2))
    assert torch.equal(mirrored["target"]["masks"], straight["target"]["masks"].flip(2))
    for name in ("boxes", "crowd"):
        x1, y1, x2, y2 = straight["target"][name].unbind(dim=1)
        assert torch.equal(mirrored["target"][name], torch.stack([COLUMNS - x2, y1, COLUMNS - x1, y2], dim=1))


def test_the_factor_is_the_samples_chance_and_the_rest_is_drawn_from_torch():
    examples = []
    for seed in (0, 0, 1, 2, 3):
        torch.manual_seed(seed)
        examples.append(transform(scale=(1.0, 2.0), flip=0.5, size=40)(sample(chance=0.8)))
    assert torch.equal(examples[0]["image"], examples[1]["image"])
    assert len({float(example["image"].sum()) for example in examples}) == 4
    shapes = [transform(scale=(0.1, 1.1))(sample(chance=chance))["image"].shape[1:] for chance in (0.0, 0.4, 0.9)]
    assert shapes == [(6, 9), (30, 45), (60, 90)]


def test_what_leaves_the_image_is_left_out():
    kinds = set()
    for seed in range(12):
        torch.manual_seed(seed)
        example = transform(scale=(2.0, 2.0), size=50)(sample(crowd=True))
        agrees(example)
        target = example["target"]
        kinds.add((tuple(target["labels"].tolist()), len(target["crowd"])))
        assert (target["boxes"] >= 0).all() and (target["boxes"] <= 50).all()
    assert len(kinds) >= 3


def test_boxes_without_masks():
    torch.manual_seed(0)
    target = transform()(sample(masks=False))["target"]
    assert set(target) == {"boxes", "labels", "crowd"}
    assert target["boxes"].tolist() == [list(map(float, place)) for place in PLACES]


def test_evaluation_sees_the_whole_image():
    example = boxes.DetectionEvaluationTransform(image_size=45)(sample())
    assert example["image"].shape == (3, 30, 45)
    assert example["record"]["image_id"] == 7 and example["record"]["width"] == COLUMNS


# ------------------------------------------------------------------------------------------------------------ pasting


def pasted(chosen: list[bool], size: tuple[int, int] = (ROWS, COLUMNS)) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Objects of one image on another, which has a single one at (30, 10, 60, 50)."""
    image = torch.zeros(3, *size)
    mask = torch.zeros(1, *size, dtype=torch.uint8)
    mask[0, 10:50, 30:60] = 1
    target = {
        **{"boxes": torch.tensor([[30.0, 10, 60, 50]]), "labels": torch.tensor([9]), "crowd": torch.zeros(0, 4)},
        **{"masks": mask, "has_mask": torch.tensor([True]), "semantic": torch.full(size, 5)},
    }
    other = transform()(sample(semantic=True))
    return boxes.paste(image, target, other["image"], other["target"], torch.tensor(chosen))


def test_pasted_objects_cover_what_is_there():
    image, target = pasted([True, False, False])  # PLACES[0], 10, 5, 40, 30, covers a corner
    assert target["labels"].tolist() == [9, 0]
    assert target["boxes"].tolist() == [[30, 10, 60, 50], [10, 5, 40, 30]]
    assert target["masks"].dtype == torch.uint8 and target["masks"].max() == 1
    assert target["masks"][0].sum() == 30 * 40 - 10 * 20 and target["masks"][1].sum() == 30 * 25
    assert not (target["masks"][0] & target["masks"][1]).any()
    assert torch.equal(coloured(image, 0), target["masks"][1].bool())
    assert (image[:, ~target["masks"][1].bool()] == 0).all()
    assert torch.equal(target["semantic"], torch.where(target["masks"][1].bool(), 0, 5))


def test_boxes_shrink_with_what_is_left_of_their_objects():
    _, target = pasted([False, True, False])  # 50, 20, 85, 55 leaves columns 30 to 50, and 50 to 60 above row 20
    assert target["boxes"].tolist() == [[30, 10, 60, 50], [50, 20, 85, 55]]
    _, target = pasted([True, True, True], (30, 45))  # the object is 30 to 45, 10 to 30 there, below row 30 cut off
    assert target["boxes"].tolist() == [[40, 10, 45, 30], [10, 5, 40, 30]]
    assert target["labels"].tolist() == [9, 0]
    assert target["masks"].shape == (2, 30, 45)


def test_covered_objects_are_left_out():
    image, target = torch.zeros(3, ROWS, COLUMNS), transform()(sample())["target"]
    whole = {**target, "masks": torch.ones(3, ROWS, COLUMNS, dtype=torch.uint8)}
    chosen = torch.tensor([True, False, False])
    _, found = boxes.paste(image, target, torch.ones(3, ROWS, COLUMNS), whole, chosen)
    assert found["labels"].tolist() == [0] and found["boxes"].tolist() == [[0, 0, COLUMNS, ROWS]]
    none, same = boxes.paste(image, target, image, whole, torch.tensor([False] * 3))
    assert none is image and same is target


def test_pasting_is_drawn_per_image_and_needs_masks():
    def batch(probability: float, **kinds: bool) -> list[int]:
        examples = [transform(flip=draw % 2)(sample(draw, **kinds)) for draw in range(8)]
        return [len(target["labels"]) for target in boxes.Paste(probability=probability)(examples)["target"]]

    assert batch(0.0) == [3] * 8
    assert batch(1.0, masks=False) == [3] * 8
    assert batch(1.0) == batch(1.0) != [3] * 8
    assert len(boxes.Paste(probability=0.0)([transform()(sample())])["target"]) == 1
    with pytest.raises(ValueError, match="the micro-batch has 1 image; choose micro_batch=2 or more"):
        boxes.Paste(probability=0.5)([transform()(sample())])
    with pytest.raises(ValueError, match="from 0 to 1, got 2"):
        boxes.Paste(probability=2)


# --------------------------------------------------------------------------------------------------------- collating


def test_a_batch_is_padded_to_a_multiple_of_32():
    large = transform()(sample(semantic=True))
    small = transform(scale=(0.5, 0.5))(sample(2))
    batch = boxes.collate_boxes([large, small])
    assert batch["image"].shape == (2, 3, 64, 96) and batch["size"] == [(60, 90), (30, 45)]
    assert torch.equal(batch["image"][1, :, :30, :45], small["image"])
    assert (batch["image"][1, :, 30:] == 0).all() and (batch["image"][1, :, :, 45:] == 0).all()
    assert all(target["masks"].shape[1:] == (64, 96) for target in batch["target"])
    assert (batch["target"][0]["semantic"][60:] == boxes.IGNORED).all() and "semantic" not in batch["target"][1]
    assert batch["label"].tolist() == [-1, -1] and batch["key"] == ["7", "7"] and batch["draw"].tolist() == [1, 2]
    assert [record["image_id"] for record in batch["record"]] == [7, 7]


# ------------------------------------------------------------------------------------------------------------- errors


def test_samples_that_cannot_be_used():
    complete = members(semantic=True)
    for missing in ({"json": b"{"}, {"json": b"{}"}, {"json": b"[]"}):
        with pytest.raises(CorruptSampleError, match="no COCO record among its members"):
            boxes.with_record({**complete, **missing}, "abc")
    with pytest.raises(CorruptSampleError, match="no COCO record among its members"):
        boxes.with_record({"png": complete["png"]}, "abc")
    with pytest.raises(CorruptSampleError, match=r"labels \[0, 1, 2\] are not all one of 0 to 1"):
        boxes.with_record(complete, "ab")
    small = {**sample(), **boxes.with_record({**complete, "png": encoded(np.zeros((5, 6, 3), np.uint8))}, "abc")}
    with pytest.raises(CorruptSampleError, match="image has 5 x 6 pixels, its record 60 x 90"):
        transform()(small)
    for content, message in ((b"x", "does not decode"), (encoded(np.zeros((5, 6), np.uint8)), "and not uint8")):
        with pytest.raises(CorruptSampleError, match=message):
            transform()({**sample(), "semantic": content})


@pytest.mark.parametrize("scale", [[0.1], [0.0, 1.0], [2.0, 1.0]])
def test_factors_that_are_none(scale):
    with pytest.raises(ValueError, match="must be two factors above 0"):
        boxes.DetectionTransform(image_size=64, scale=scale, flip=0.5, masks=True, object_jitter=0.0)
