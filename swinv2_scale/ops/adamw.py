"""AdamW over flat weights on the CPU in one pass, and the norm of flat gradients (kernels/adamw_cpu.cpp).

PyTorch's would need gradients in float32 first, and the weights rounded to their own type after: two passes more.
"""

import torch
from torch import Tensor

from swinv2_scale.ops import native


def takes(gradient: Tensor) -> bool:
    """Whether a flat gradient has a native norm here, and its weights a native step."""
    return gradient.device.type == "cpu" and gradient.dtype in native.TYPES and "cpu" not in native.missing


def step(
    weights: Tensor,
    mean: Tensor,
    square: Tensor,
    trained: Tensor,
    gradient: Tensor,
    *,
    scale: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    steps: float,
) -> None:
    """One step of AdamW (arXiv 1711.05101) over n flat weights, in place.

    weights, mean, square (n,): float32, the master weights and the moving averages of gradients and of their squares.
    trained (n,): gets the weights in its own type. gradient (n,): of that type or float32; it counts `scale` times.
    steps: how many there have been, this one included.
    """
    tensors = (weights, mean, square, trained, gradient)
    torch.ops.swinv2_scale.adamw_step(*tensors, scale, lr, *betas, eps, weight_decay, steps)


def sum_of_squares(values: Tensor) -> Tensor:
    """Of a flat gradient, float32 or 16 bits, in float64: the same at any number of threads."""
    return torch.tensor(torch.ops.swinv2_scale.sum_of_squares(values), dtype=torch.float64)
