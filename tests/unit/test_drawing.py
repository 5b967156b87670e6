"""Drawing: what is marked is what was found, texts can be read, and nothing else changes."""

import torch

from swinv2_scale import drawing
from swinv2_scale.drawing import LEGIBLE, NOTHING, Objects


def test_colours_differ() -> None:
    colours = [drawing.colour(number) for number in range(40)]
    assert len(set(colours)) == 40
    near = [
        (a, b)
        for i, a in enumerate(colours[:12])
        for b in colours[:i]
        if sum(abs(x - y) for x, y in zip(a, b, strict=True)) < 60
    ]
    assert near == []


def test_objects_are_marked_where_they_are() -> None:
    grey = torch.full((3, LEGIBLE, 400), 128, dtype=torch.uint8)
    masks = torch.zeros(1, LEGIBLE, 400, dtype=torch.bool)
    masks[0, 220:240, 120:180] = True
    objects = Objects(torch.tensor([[100.0, 200, 200, 260]]), torch.tensor([3]), ["x"], masks)
    changed = (drawing.with_objects(grey, objects) != 128).any(dim=0)
    assert changed[masks[0]].all()
    rows, columns = torch.where(changed)
    assert (int(rows.max()), int(columns.min()), int(columns.max())) == (260, 100, 200)
    assert 200 - 25 < int(rows.min()) < 200  # the text, above the box
    assert not changed[203:219, 103:197].any()  # between box and mask
    none = Objects(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), [], masks[:0])
    assert torch.equal(drawing.with_objects(grey, none), grey)


def test_texts_make_room_for_each_other() -> None:
    grey = torch.full((3, 400, 400), 128, dtype=torch.uint8)
    canvas = drawing.F.to_pil_image(grey)
    taken: list[tuple[float, ...]] = []
    for _ in range(4):
        taken.append(drawing._tag(canvas, (100, 100, 300, 300), (255, 0, 0), "digit 3 97%", taken))
    assert not any(drawing._overlap(a, b) for i, a in enumerate(taken) for b in taken[:i])
    for corner in ((0, 0, 5, 5), (395, 395, 400, 400)):
        left, top, right, bottom = drawing._tag(canvas, corner, (255, 0, 0), "digit 3 97%", [])
        assert left >= 0 and top >= 0 and right <= 400 and bottom <= 400


def test_small_pictures_are_enlarged_with_what_is_on_them() -> None:
    small = torch.full((3, 50, 100), 128, dtype=torch.uint8)
    classes = torch.full((50, 100), NOTHING)
    classes[10:20, 30:40] = 2
    shown = drawing.with_classes(small, classes)
    assert shown.shape == (3, 200, 400)
    marked = torch.zeros(200, 400, dtype=torch.bool)
    marked[40:80, 120:160] = True
    assert torch.equal((shown != 128).any(dim=0), marked)
    assert torch.equal(drawing.with_classes(small, torch.full((50, 100), NOTHING)), drawing.enlarged(small)[0])


def test_a_legend_has_as_many_lines_as_it_needs() -> None:
    picture = torch.full((3, 100, LEGIBLE), 128, dtype=torch.uint8)
    one, many, listed = (
        drawing.with_legend(picture, [((255, 0, 0), "photograph 12.3 %")] * count, one_a_line=count == 5)
        for count in (1, 12, 5)
    )
    assert torch.equal(one[:, :100], picture) and one.shape[2] == LEGIBLE
    line = one.shape[1] - 100
    assert many.shape[1] > 100 + 3 * line / 2 and listed.shape[1] > 100 + 4 * line / 2
    assert (one[0, 100:] == 255).float().mean() > 0.5 and (
        one[:, 100:] == torch.tensor([255, 0, 0])[:, None, None]
    ).all(0).any()
    assert torch.equal(drawing.with_legend(picture, []), picture)
    assert drawing.beside(one, one).shape == (3, one.shape[1], 2 * LEGIBLE + 2 * drawing.MARGIN)
