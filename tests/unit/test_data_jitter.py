"""Objects that are moved inside their image: pixels, masks, boxes and semantic map move together, and none is lost."""

from typing import Any

import pytest
import torch
from test_data_boxes import PLACES, agrees, sample, transform

from swinv2_scale.data import jitter
from swinv2_scale.data.jitter import ObjectJitter, filled, moved


def rectangles(*places: tuple[int, int, int, int], size: tuple[int, int] = (60, 90)) -> tuple[torch.Tensor, Any]:
    """A grey image with white rectangles of classes 0, 1, … on it, and its target."""
    image = torch.full((3, *size), 100, dtype=torch.uint8)
    masks = torch.zeros(len(places), *size, dtype=torch.uint8)
    semantic = torch.full(size, 9)
    for number, (x1, y1, x2, y2) in enumerate(places):
        masks[number, y1:y2, x1:x2] = 1
        image[:, y1:y2, x1:x2] = 200
        semantic[y1:y2, x1:x2] = number
    return image, {
        "boxes": torch.tensor(places, dtype=torch.float32),
        "labels": torch.arange(len(places)),
        "crowd": torch.zeros(0, 4),
        "masks": masks,
        "has_mask": torch.ones(len(places), dtype=torch.bool),
        "semantic": semantic,
    }


def test_everything_of_an_object_moves_and_nothing_is_lost() -> None:
    places = set()
    for seed in range(8):
        torch.manual_seed(seed)
        example = transform(jitter=1.0)(sample(semantic=True))
        agrees(example)
        assert example["target"]["labels"].tolist() == [0, 1, 2]
        places |= {tuple(box) for box in example["target"]["boxes"].tolist()}
        for (x1, y1, x2, y2), box in zip(PLACES, example["target"]["boxes"].tolist(), strict=True):
            # a tenth of its size by scaling, a fifteenth by shifting, and a pixel or two by turning
            assert all(abs(a - b) <= 35 / 10 + 35 / 15 + 2 for a, b in zip(box, (x1, y1, x2, y2), strict=True))
    assert len(places) > 12


def test_without_probability_nothing_happens_and_nothing_is_drawn() -> None:
    image, target = rectangles((10, 5, 40, 30))
    before = torch.get_rng_state()
    same, untouched = ObjectJitter(0.0)(image, target)
    assert same is image and untouched is target and torch.equal(torch.get_rng_state(), before)
    without = {key: target[key] for key in ("boxes", "labels", "crowd")}
    assert ObjectJitter(1.0)(image, without)[1] is without
    target["has_mask"][0] = False
    assert ObjectJitter(1.0)(image, target)[1] is target
    with pytest.raises(ValueError, match="object_jitter must be a probability from 0 to 1, got 2"):
        ObjectJitter(2)


def test_a_shift_is_a_shift_and_its_hole_is_background() -> None:
    image, target = rectangles((20, 10, 50, 40))
    new, found = moved(image, target, 0, shift=(0.2, -0.1), scale=1.0, angle=0.0)
    there = torch.zeros(60, 90, dtype=torch.bool)
    there[7:37, 26:56] = True
    assert torch.equal(found["masks"][0].bool(), there) and found["boxes"].tolist() == [[26, 7, 56, 37]]
    assert torch.equal(new, torch.where(there, 200, 100).to(torch.uint8).expand(3, -1, -1))
    hole = target["masks"][0].bool() & ~there
    assert torch.equal(found["semantic"], torch.where(there, 0, torch.where(hole, jitter.IGNORED, 9)))
    assert target["boxes"].tolist() == [[20, 10, 50, 40]] and (image[:, 10:40, 20:50] == 200).all()  # as they were
    larger = moved(image, target, 0, shift=(0.0, 0.0), scale=1.2, angle=0.0)[1]["masks"].sum()
    assert float(larger) == pytest.approx(36 * 36, rel=0.06)


def test_other_objects_are_covered_but_stay() -> None:
    image, target = rectangles((20, 10, 50, 40), (52, 10, 62, 40))
    _, found = moved(image, target, 0, shift=(0.2, 0.0), scale=1.0, angle=0.0)  # 26 to 56: covers 4 of 10 columns
    assert found["boxes"].tolist() == [[26, 10, 56, 40], [56, 10, 62, 40]]
    assert not (found["masks"][0] & found["masks"][1]).any() and found["masks"][1].sum() == 6 * 30
    new, same = moved(image, target, 0, shift=(0.4, 0.0), scale=1.0, angle=0.0)  # 32 to 62: all of it
    assert new is image and same is target
    image, target = rectangles((20, 10, 50, 40), (40, 20, 60, 30))  # which lies on the first
    target["masks"][0, 20:30, 40:50] = 0
    new, found = moved(image, target, 0, shift=(-0.2, 0.0), scale=1.0, angle=0.0)
    assert torch.equal(found["masks"][1], target["masks"][1]) and (new[:, 20:30, 40:60] == 200).all()


def test_holes_follow_from_what_is_around() -> None:
    ramp = torch.arange(64.0).expand(1, 48, 64).clone()
    known = torch.ones(48, 64, dtype=torch.bool)
    known[16:32, 20:44] = False
    found = filled(torch.where(known, ramp, 1e6), known)
    assert torch.equal(found[:, known], ramp[:, known])
    assert (found - ramp)[0, ~known].abs().max() < 8  # of the 24 over which the hole goes
    assert torch.equal(filled(ramp, torch.zeros(48, 64, dtype=torch.bool)), ramp)
    one = torch.zeros(5, 7, dtype=torch.bool)
    one[4, 6] = True
    assert torch.allclose(filled(torch.full((1, 5, 7), 3.0), one), torch.tensor(3.0))
