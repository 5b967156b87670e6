"""Log-spaced continuous position bias: a small network from relative coordinates to one bias per head.

Swin Transformer V2, section 3.3. Because the bias is a function of coordinates, weights trained at one window can be
used at another: coordinates are measured in units of the *pretrained* window, and grow only logarithmically beyond it.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def relative_coordinates(window: Sequence[int], reference_window: Sequence[int], device: torch.device) -> Tensor:
    """Log-spaced coordinates of every offset inside a window: (*(2·w - 1 per axis), axes), float32.

    Per axis: offset / (reference - 1) · 8, then sign(x) · log2(|x| + 1) / log2(8). A reference of one token has only
    offset zero; dividing by at least 1 keeps it finite.
    """
    axes = [
        torch.arange(-(w - 1), w, dtype=torch.float32, device=device) / max(p - 1, 1) * 8
        for w, p in zip(window, reference_window, strict=True)
    ]
    x = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    return torch.sign(x) * torch.log2(x.abs() + 1.0) / math.log2(8)


class PositionBias(nn.Sequential):
    """Table of biases for a window: 16 · sigmoid(MLP(coordinates)), MLP: axes -> 512 -> ReLU -> heads.

    A Sequential so that its parameters carry the released names: `cpb_mlp.0.weight`, `cpb_mlp.0.bias` and
    `cpb_mlp.2.weight`.
    """

    def __init__(self, num_heads: int, axes: int = 2, hidden: int = 512) -> None:
        super().__init__(nn.Linear(axes, hidden), nn.ReLU(), nn.Linear(hidden, num_heads, bias=False))

    def forward(self, window: Sequence[int], reference_window: Sequence[int]) -> Tensor:  # type: ignore[override]
        """(heads, *(2·w - 1 per axis)), never below float32 whatever type the weights were cast to."""
        first, _, last = self
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        exact = torch.promote_types(first.weight.dtype, torch.float32)
        x = relative_coordinates(window, reference_window, first.weight.device).to(exact)
        with torch.autocast(x.device.type, enabled=False):
            x = F.linear(x, first.weight.to(exact), first.bias.to(exact)).relu()
            x = F.linear(x, last.weight.to(exact))
        return (16 * torch.sigmoid(x)).movedim(-1, 0)
