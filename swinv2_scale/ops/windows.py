"""Window geometry, in two and three dimensions. The only window partition of the project.

A *grid* is the size of a feature map per axis, (Y, X) or (T, Y, X); a *window* and a *shift* have one integer per axis.
Shape letters: B images, M windows, N tokens of a window, C channels.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def fit_window(grid: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> tuple[list[int], list[int]]:
    """Shrink the window to the grid, axis by axis; an axis that one window covers is not shifted."""
    fitted = [min(w, g) for g, w in zip(grid, window, strict=True)]
    return fitted, [0 if w >= g else s for g, w, s in zip(grid, window, shift, strict=True)]


def padded_grid(grid: Sequence[int], window: Sequence[int]) -> list[int]:
    """The smallest multiple of the window that holds the grid, per axis."""
    return [math.ceil(g / w) * w for g, w in zip(grid, window, strict=True)]


def partition(x: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """Pad with zeros at the end of each axis, roll by the shift, cut into windows.

    (B, *grid, C) -> (B, M, N, C). Padding comes before rolling, so that a window never mixes two borders unnoticed;
    `absent_tokens` and `regions` describe the same padded and rolled map.
    """
    batch, *grid, channels = x.shape
    padded = padded_grid(grid, window)
    if padded != grid:
        x = F.pad(x, [0, 0, *(p for g, q in zip(reversed(grid), reversed(padded), strict=True) for p in (0, q - g))])
    axes = tuple(range(1, len(grid) + 1))
    if any(shift):
        x = x.roll([-s for s in shift], axes)
    split = [n for p, w in zip(padded, window, strict=True) for n in (p // w, w)]
    outer, inner = [2 * a - 1 for a in axes], [2 * a for a in axes]
    x = x.reshape(batch, *split, channels).permute(0, *outer, *inner, len(split) + 1)
    return x.reshape(batch, math.prod(padded) // math.prod(window), math.prod(window), channels)


def merge(windows: Tensor, grid: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """Inverse of `partition`: (B, M, N, C) -> (B, *grid, C); padded tokens are dropped."""
    padded = padded_grid(grid, window)
    batch, _, _, channels = windows.shape
    axes = range(1, len(padded) + 1)
    x = windows.reshape(batch, *(p // w for p, w in zip(padded, window, strict=True)), *window, channels)
    x = x.permute(0, *(axis for a in axes for axis in (a, a + len(padded))), 2 * len(padded) + 1)
    x = x.reshape(batch, *padded, channels)
    if any(shift):
        x = x.roll(list(shift), tuple(axes))
    for axis, size in zip(axes, grid, strict=True):
        x = x.narrow(axis, 0, size)
    return x


def absent_tokens(grid: Sequence[int], window: Sequence[int], shift: Sequence[int], device: torch.device) -> Tensor:
    """True where a token of the padded map lies outside the grid: (M, N)."""
    present = torch.ones(1, *grid, 1, dtype=torch.bool, device=device)
    return ~partition(present, window, shift)[0, :, :, 0]


def regions(grid: Sequence[int], window: Sequence[int], shift: Sequence[int], device: torch.device) -> Tensor:
    """Region number of every token after rolling: (M, N). Tokens of one window that were not neighbours differ."""
    padded = padded_grid(grid, window)
    number = torch.zeros((), dtype=torch.int64, device=device)
    for p, w, s in zip(padded, window, shift, strict=True):
        position = torch.arange(p, device=device)
        band = (position >= p - w).long() + (position >= p - s).long() if s else torch.zeros_like(position)
        number = number[..., None] * 3 + band
    return partition(number[None, ..., None], window, [0] * len(padded))[0, :, :, 0]


def relative_index(window: Sequence[int], device: torch.device) -> Tensor:
    """Position of every (query, key) pair in the flattened table of offsets: (N, N), offset = query - key.

    The table has 2·w - 1 entries per axis; entry w - 1 is offset zero.
    """
    positions = torch.meshgrid(*(torch.arange(w, device=device) for w in window), indexing="ij")
    index = torch.zeros((), dtype=torch.int64, device=device)
    for position, w in zip(positions, window, strict=True):
        offset = position.flatten()[:, None] - position.flatten()[None, :]
        index = index * (2 * w - 1) + offset + w - 1
    return index
