"""The table of position biases: 16 · sigmoid(W₂ · relu(W₁ · coordinates + b₁)), for each offset and head.

On the CPU in float32 one operator (kernels/position_bias_cpu.cpp) that keeps nothing but the table for backward;
elsewhere PyTorch's functions, which keep the hidden layer three times.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from swinv2_scale.ops import native

MAX_AXES, MAX_HEADS = 3, 256  # of the operator


def bias_table(coordinates: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor) -> Tensor:
    """coordinates (n, axes), weight1 (hidden, axes), bias1 (hidden,), weight2 (heads, hidden) -> (heads, n).

    All of one type, float32 or wider. Differentiable in the weights.
    """
    if is_native(weight1, bias1, weight2):
        return _BiasTable.apply(coordinates, weight1, bias1, weight2)
    return composed_bias_table(coordinates, weight1, bias1, weight2)


def composed_bias_table(coordinates: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor) -> Tensor:
    """`bias_table` as PyTorch's functions have it."""
    with torch.autocast(coordinates.device.type, enabled=False):
        logits = F.linear(F.linear(coordinates, weight1, bias1).relu(), weight2)
    return (16 * torch.sigmoid(logits)).t()


def is_native(*weights: Tensor) -> bool:
    """Whether weight1, bias1 and weight2 are what the operator takes: not what a compiler or a fake mode has
    in their place."""
    for weight in weights:
        plain = type(weight) in (Tensor, nn.Parameter) and weight.is_contiguous() and weight.dtype == torch.float32
        if not plain or weight.device.type != "cpu":
            return False
    (hidden, axes), heads = weights[0].shape, len(weights[2])
    fits = hidden % 16 == 0 and axes <= MAX_AXES and heads <= MAX_HEADS
    return fits and "cpu" not in native.missing and not torch.compiler.is_compiling()


class _BiasTable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        out = torch.ops.swinv2_scale.position_bias_forward(*tensors)
        ctx.save_for_backward(out, *tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *torch.ops.swinv2_scale.position_bias_backward(grad.contiguous(), *ctx.saved_tensors)
