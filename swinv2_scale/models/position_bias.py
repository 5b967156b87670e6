"""Continuous position bias: a small network from relative coordinates to one bias per head.

Swin Transformer V2, section 3.3. Because the bias is a function of coordinates, weights trained at one window can be
used at another: coordinates are measured in units of the *pretrained* window, and with log spacing they grow only
logarithmically beyond it. Linear spacing is the paper's comparison (its Table 1); docs/benchmarks/window_transfer.md
repeats it in small.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from swinv2_scale.ops.position_bias import bias_table, is_native

SPACINGS = ("log", "linear")


def relative_coordinates(
    window: Sequence[int], reference_window: Sequence[int], device: torch.device, spacing: str = "log"
) -> Tensor:
    """Coordinates of every offset inside a window: (*(2·w - 1 per axis), axes), float32.

    Per axis, with x = offset / (reference - 1), so that the reference window ends at 1:

        log      sign(x) · log2(|8x| + 1) / log2(8), as released: 1.06 at the end of the reference window
        linear   x, the offset itself in that unit. The paper's formula has plain offsets; the unit is a constant of a
                 model, and gives the network inputs of the size that log spacing gives, so that both train alike

    A model trained at window 4 and used at 12 sees coordinates up to 1.64 with log spacing, and up to 3.67 with linear.
    A reference of one token has only offset zero; dividing by at least 1 keeps it finite.
    """
    axes = [
        torch.arange(-(w - 1), w, dtype=torch.float32, device=device) / max(p - 1, 1)
        for w, p in zip(window, reference_window, strict=True)
    ]
    x = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    if spacing == "linear":
        return x
    x = x * 8
    return torch.sign(x) * torch.log2(x.abs() + 1.0) / math.log2(8)


_known: dict[tuple[tuple[int, ...], tuple[int, ...], str], Tensor] = {}


def _known_coordinates(window: Sequence[int], reference_window: Sequence[int], spacing: str) -> Tensor:
    """`relative_coordinates` in the CPU's memory, (n, axes): computed once for all blocks and steps."""
    key = tuple(window), tuple(reference_window), spacing
    if key in _known:
        return _known[key]
    with torch.inference_mode(False):  # whose tensors could not be differentiated with
        x = relative_coordinates(window, reference_window, torch.device("cpu"), spacing).flatten(0, -2)
    if type(x) is Tensor:  # and not what a fake mode has in its place
        _known[key] = x
    return x


class PositionBias(nn.Sequential):
    """Table of biases for a window: 16 · sigmoid(MLP(coordinates)), MLP: axes -> 512 -> ReLU -> heads.

    A Sequential so that its parameters carry the released names: `cpb_mlp.0.weight`, `cpb_mlp.0.bias` and
    `cpb_mlp.2.weight`; they are the same for every spacing. Raises ValueError for a spacing other than log or linear.
    """

    def __init__(self, num_heads: int, axes: int = 2, hidden: int = 512, spacing: str = "log") -> None:
        super().__init__(nn.Linear(axes, hidden), nn.ReLU(), nn.Linear(hidden, num_heads, bias=False))
        if spacing not in SPACINGS:
            raise ValueError(f"position_bias must be 'log' or 'linear', got {spacing!r}")
        self.spacing = spacing

    def forward(self, window: Sequence[int], reference_window: Sequence[int]) -> Tensor:  # type: ignore[override]
        """(heads, *(2·w - 1 per axis)), never below float32 whatever type the weights were cast to."""
        first, _, last = self
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        exact = torch.promote_types(first.weight.dtype, torch.float32)
        weights = first.weight.to(exact), first.bias.to(exact), last.weight.to(exact)
        if is_native(*weights):
            x = _known_coordinates(window, reference_window, self.spacing)
        else:
            x = (
                relative_coordinates(window, reference_window, first.weight.device, self.spacing)
                .flatten(0, -2)
                .to(exact)
            )
        return bias_table(x, *weights).unflatten(-1, [2 * w - 1 for w in window])
