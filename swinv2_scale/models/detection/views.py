"""One image seen several ways, at other scales and mirrored, and its boxes from one view to another."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DIVISOR = 32  # pixels of a token of the last stage
Size = tuple[int, int]


@dataclass
class View:
    """Images (B, 3, Y, X), padded; their sizes (rows, columns); what they were multiplied by; whether mirrored."""

    images: Tensor
    sizes: list[Size]
    factors: list[tuple[float, float]]  # (rows, columns) of each image: they are rounded to whole pixels
    mirrored: bool

    def into(self, boxes: Tensor, image: int) -> Tensor:
        """Boxes (N, 4) of the original image, in pixels of this view."""
        boxes = boxes * _per_corner(self.factors[image], boxes)
        return mirror(boxes, self.sizes[image][1]) if self.mirrored else boxes

    def back(self, boxes: Tensor, image: int) -> Tensor:
        """Boxes (N, 4) of this view, in pixels of the original image."""
        boxes = mirror(boxes, self.sizes[image][1]) if self.mirrored else boxes
        return boxes / _per_corner(self.factors[image], boxes)


def mirror(boxes: Tensor, columns: float) -> Tensor:
    """Boxes (N, 4) in the mirror image of an image `columns` wide."""
    x1, y1, x2, y2 = boxes.unbind(dim=1)
    return torch.stack([columns - x2, y1, columns - x1, y2], dim=1)


def view(images: Tensor, sizes: Sequence[Size], *, scale: float, mirrored: bool) -> View:
    """A view of padded images (B, 3, Y, X), each (rows, columns) large. Raises ValueError for a scale of 0 or less."""
    if scale <= 0:
        raise ValueError(f"scales of the images must be above 0, got {scale}")
    if scale == 1.0 and not mirrored:
        return View(images, list(sizes), [(1.0, 1.0)] * len(sizes), mirrored)
    seen, factors = [], []
    for image, (rows, columns) in zip(images, sizes, strict=True):
        size = (max(1, round(rows * scale)), max(1, round(columns * scale)))
        whole = image[None, :, :rows, :columns]
        if size != (rows, columns):
            whole = F.interpolate(whole, size=size, mode="bilinear", align_corners=False, antialias=scale < 1)
        seen.append(whole[0].flip(2) if mirrored else whole[0])
        factors.append((size[0] / rows, size[1] / columns))
    padded, new_sizes = pad(seen)
    return View(padded, new_sizes, factors, mirrored)


def pad(images: Sequence[Tensor]) -> tuple[Tensor, list[Size]]:
    """Images (3, Y, X) of any sizes in one batch, with zeros to a multiple of 32: (B, 3, Y, X), and their sizes."""
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    rows, columns = (math.ceil(max(size[axis] for size in sizes) / DIVISOR) * DIVISOR for axis in (0, 1))
    return torch.stack([F.pad(i, (0, columns - i.shape[2], 0, rows - i.shape[1])) for i in images]), sizes


def _per_corner(factors: tuple[float, float], boxes: Tensor) -> Tensor:
    rows, columns = factors
    return boxes.new_tensor([columns, rows, columns, rows])
