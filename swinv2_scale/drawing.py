"""What a model says, drawn on a picture with torchvision's utilities: the same for reports and for `predict`.

A picture is uint8 (3, Y, X). Text has a size of its own, so that small pictures are enlarged before they get any.
"""

import colorsys
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

LEGIBLE = 384  # pixels of the longer side, below which a picture is enlarged
TEXT, MARGIN = 15, 4  # pixels: height of the letters, and what is left free around them
OPACITY = 0.45  # of a class's colour over the picture
NOTHING = 255  # in a map of classes: none, left as it is

Colour = tuple[int, int, int]
Entry = tuple[Colour | None, str]  # of a legend


class Objects(NamedTuple):
    """boxes (N, 4), x1, y1, x2, y2 in pixels; labels (N,) int64; N texts; masks bool (N, Y, X), or None."""

    boxes: Tensor
    labels: Tensor
    texts: Sequence[str]
    masks: Tensor | None


def colour(number: int) -> Colour:
    """The colour of a class: hues a golden section apart, which stay far from each other however many there are."""
    red, green, blue = colorsys.hsv_to_rgb(number * 0.618034 % 1, (0.85, 0.6)[number // 5 % 2], 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def with_objects(picture: Tensor, objects: Objects) -> Tensor:
    """A picture under masks, boxes and their texts. The first box is the most important: its text finds room first."""
    picture, factor = enlarged(picture)
    if not len(objects.boxes):
        return picture
    colours = [colour(label) for label in objects.labels.tolist()]
    if objects.masks is not None:
        masks = objects.masks.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        picture = draw_segmentation_masks(picture, masks, alpha=OPACITY, colors=list(colours))
    boxes = (objects.boxes * factor).round().clamp(min=0)
    picture = draw_bounding_boxes(picture, boxes, colors=list(colours), width=2)
    canvas = F.to_pil_image(picture)
    taken: list[tuple[float, ...]] = []
    for box, own, text in zip(boxes.tolist(), colours, objects.texts, strict=True):
        taken.append(_tag(canvas, box, own, text, taken))
    return F.pil_to_tensor(canvas)


def with_classes(picture: Tensor, classes: Tensor) -> Tensor:
    """A picture under the colours of the classes (Y, X) of its pixels; NOTHING stays as it is."""
    picture, factor = enlarged(picture)
    classes = classes.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
    shown = [number for number in classes.unique().tolist() if number != NOTHING]
    if not shown:
        return picture
    masks = torch.stack([classes == number for number in shown])
    return draw_segmentation_masks(picture, masks, alpha=OPACITY, colors=[colour(number) for number in shown])


def with_legend(picture: Tensor, entries: Sequence[Entry], *, one_a_line: bool = False) -> Tensor:
    """A picture with texts below it, on white, each after a square of its colour if it has one; as they fit."""
    picture, _ = enlarged(picture)
    width = picture.shape[2]
    font, line, square = _font(), TEXT + 2 * MARGIN, TEXT - 2
    places: list[tuple[int, int]] = []
    x = y = MARGIN
    for own, text in entries:
        needed = (square + MARGIN if own else 0) + math.ceil(font.getlength(text)) + 3 * MARGIN
        if places and (one_a_line or x + needed > width):
            x, y = MARGIN, y + line
        places.append((x, y))
        x += needed
    strip = Image.new("RGB", (width, y + line if entries else 0), "white")
    pen = ImageDraw.Draw(strip)
    for (left, top), (own, text) in zip(places, entries, strict=True):
        begin = left
        if own:
            pen.rectangle((left, top + MARGIN, left + square, top + MARGIN + square), fill=own, outline="black")
            begin += square + MARGIN
        pen.text((begin, top + line // 2), text, fill="black", font=font, anchor="lm")
    return torch.cat([picture, F.pil_to_tensor(strip)], dim=1) if entries else picture


def beside(left: Tensor, right: Tensor) -> Tensor:
    """Two pictures of one height, with some white between them."""
    return torch.cat([left, left.new_full((3, left.shape[1], 2 * MARGIN), 255), right], dim=2)


def enlarged(picture: Tensor) -> tuple[Tensor, int]:
    """A picture of which the longer side has LEGIBLE pixels or more, and the whole number that it was enlarged by."""
    rows, columns = picture.shape[1:]
    factor = math.ceil(LEGIBLE / max(rows, columns))
    return (F.resize(picture, [rows * factor, columns * factor], antialias=True) if factor > 1 else picture), factor


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(TEXT)


def _tag(
    canvas: Image.Image, box: Sequence[float], own: Colour, text: str, taken: Sequence[tuple[float, ...]]
) -> tuple[float, ...]:
    """Write a text at its box, where no other one is taken if that is possible; returns the place."""
    pen, font = ImageDraw.Draw(canvas), _font()
    width, height = math.ceil(font.getlength(text)) + MARGIN, TEXT + MARGIN
    tops = (box[1] - height, box[1], box[3] - height, box[3])  # above, inside, inside below, below
    places = [
        (min(max(0.0, left), max(0.0, canvas.width - width)), min(max(0.0, top), max(0.0, canvas.height - height)))
        for left in (box[0], box[2] - width)
        for top in tops
    ]
    rectangles = [(x, y, x + width, y + height) for x, y in places]
    place = next((one for one in rectangles if not any(_overlap(one, other) for other in taken)), rectangles[0])
    pen.rectangle(place, fill=own)
    bright = sum(share * value for share, value in zip((0.3, 0.6, 0.1), own, strict=True)) > 110
    pen.text(
        (place[0] + MARGIN / 2, place[1] + height / 2),
        text,
        fill="black" if bright else "white",
        font=font,
        anchor="lm",
    )
    return place


def _overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
