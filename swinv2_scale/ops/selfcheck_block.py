"""The native parts of a block, its native products where there are some (ops/block.py), and on the CPU AdamW's step and
the table of position biases, against PyTorch's functions in float64; the budget is selfcheck.py's."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from swinv2_scale.ops import adamw, block, native
from swinv2_scale.ops.position_bias import composed_bias_table
from swinv2_scale.ops.selfcheck import FLOOR, GRADIENTS, REPEATED, VALUES, Check

TENSORS = (  # what `native_parts` returns
    "post-norm",
    "gradient of branch",
    "gradient of weight",
    "gradient of bias",
    "sum of images",
    "GELU",
    "GELU in backward",
    "gradient of GELU",
    "its sum",
    "sum",
)
PRODUCTS = ("product", "gradient of its map", "gradient of its weight", "gradient of its bias")
STEP = ("AdamW's weights", "AdamW's trained weights", "squares of a gradient")
TABLE = ("position bias", *(f"position bias's gradient of {name}" for name in ("weight 1", "bias 1", "weight 2")))
LAYER = (300, 544, 1088)  # tokens, inputs and outputs: squares, panels and blocks that are not full
REMEDY = f"the environment variable {native.FORCE}={native.OFF} trains without any native code"
Parts = Callable[..., list[Tensor]]


@dataclass(frozen=True)
class Case:
    """Maps of `images` x 5 x 7 tokens, `size` times as large as usual; drop path drops the first image, or is off.

    Dropped, the branch has one image less, and the others in reverse.
    """

    channels: int
    images: int = 3
    dropped: bool = True
    size: float = 1.0

    def __str__(self) -> str:
        factors = "" if self.size == 1 else f", size {self.size:g}"
        return f"{self.images} x 5 x 7 x {self.channels}{' with drop path' if self.dropped else ''}{factors}"


def cases() -> list[Case]:
    """Rows of a part of a warp, of a warp, and of several, some of which their lanes do not divide; a fraction of a
    second."""
    return [Case(96), Case(352, dropped=False), Case(1408, images=2, size=100.0), Case(4096, images=1, dropped=False)]


def native_parts(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, keep: Tensor | None, images: Tensor | None, grad: Tensor
) -> list[Tensor]:
    """All operators of the maps' device."""
    operators = torch.ops.swinv2_scale
    out, statistics = operators.residual_norm_forward(x, y, weight, bias, keep, images, block.EPS)
    grad_y, affine = operators.residual_norm_backward(grad, y, weight, keep, images, statistics)
    added = operators.add_images(x, y, torch.arange(len(x), device=x.device) if images is None else images)
    slope = grad[: len(y)].clone()
    activated, total = operators.gelu_backward(slope, y)
    return [out, grad_y, *affine, added, operators.gelu_forward(y), activated, slope, total, operators.sum_rows(y)]


def plain_parts(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, keep: Tensor | None, images: Tensor | None, grad: Tensor
) -> list[Tensor]:
    """The same by PyTorch's functions."""
    y, weight, bias = (tensor.detach().requires_grad_() for tensor in (y, weight, bias))
    out, activated = block.composed_post_norm(x, y, weight, bias, keep, images), F.gelu(y)
    gradients = torch.autograd.grad(out, (y, weight, bias), grad)
    (slope,) = torch.autograd.grad(activated, y, grad[: len(y)])
    added = x + y if images is None else x.index_add(0, images[: len(y)], y)
    sums = slope.flatten(0, -2).sum(0), y.flatten(0, -2).sum(0)
    return [tensor.detach() for tensor in (out, *gradients, added, activated, activated, slope, *sums)]


def draw(case: Case, dtype: torch.dtype, device: torch.device) -> list[Tensor | None]:
    """x, y, weight, bias, keep, images and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.images, 5, 7, case.channels)
    x, y, grad = (torch.randn(shape, generator=generator) for _ in range(3))
    y = case.size * (2 * y + torch.randn(*shape[:-1], 1, generator=generator))
    weight, bias = torch.randn(2, case.channels, generator=generator)
    images = torch.arange(case.images).flip(0) if case.dropped else None
    keep = 1.25 + torch.arange(case.images - 1.0) if case.dropped else None
    tensors = [x.to(dtype), y[: case.images - case.dropped].to(dtype), weight, bias, keep, images, grad.to(dtype)]
    return [None if tensor is None else tensor.to(device) for tensor in tensors]


def compare(case: Case, dtype: torch.dtype, device: torch.device, parts: Parts = native_parts) -> list[Check]:
    """A check for each of TENSORS, and for a second run."""
    return _compare(str(case), TENSORS, draw(case, dtype, device), parts, plain_parts)


def native_products(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> list[Tensor]:
    """Of a linear layer and its gradients, whatever the layer itself would take."""
    operators = torch.ops.swinv2_scale
    return [
        operators.linear_forward(x, weight, bias),
        operators.linear_backward(grad, weight),
        *operators.weight_gradient(grad, x),
    ]


def plain_products(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> list[Tensor]:
    """The same by PyTorch's functions."""
    return [F.linear(x, weight, bias), grad @ weight, grad.t() @ x, grad.sum(0)]


def compare_products(dtype: torch.dtype) -> list[Check]:
    """A check for each of PRODUCTS, and for a second run; on the CPU, which alone has native ones, for some types."""
    if torch.ops.swinv2_scale.products(dtype) == "none":
        return []
    tokens, inputs, outputs = LAYER
    generator = torch.Generator().manual_seed(0)
    shapes = (tokens, inputs), (outputs, inputs), (outputs,), (tokens, outputs)
    tensors: list[Tensor | None] = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return _compare(f"{tokens} x {inputs} to {outputs}", PRODUCTS, tensors, native_products, plain_products)


def native_step(weights: Tensor, mean: Tensor, square: Tensor, gradient: Tensor) -> list[Tensor]:
    """What AdamW's third step makes of flat weights."""
    weights, trained = weights.clone(), torch.empty_like(gradient)
    rates = {"scale": 0.5, "lr": 0.01, "eps": 1e-8, "weight_decay": 0.05, "steps": 3.0}
    adamw.step(weights, mean.clone(), square.clone(), trained, gradient, betas=(0.9, 0.999), **rates)
    return [weights, trained, adamw.sum_of_squares(gradient)]


def plain_step(weights: Tensor, mean: Tensor, square: Tensor, gradient: Tensor) -> list[Tensor]:
    """The same by PyTorch's functions."""
    halved = gradient.to(weights.dtype) / 2
    mean, square = mean.lerp(halved, 0.1), 0.999 * square + 0.001 * halved.square()
    step = mean / (1 - 0.9**3) / ((square / (1 - 0.999**3)).sqrt() + 1e-8)
    weights = weights * (1 - 0.01 * 0.05) - 0.01 * step
    return [weights, weights.to(gradient.dtype), (2 * halved).square().sum()]


def compare_step(dtype: torch.dtype) -> list[Check]:
    """A check for each of STEP, and for a second run; of weights that train in a type, on the CPU."""
    weights, mean, square, gradient = torch.randn(4, 1001, generator=torch.Generator().manual_seed(0))
    return _compare("1001 weights", STEP, [weights, mean, square.abs(), gradient.to(dtype)], native_step, plain_step)


def native_table(coordinates: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, grad: Tensor) -> list[Tensor]:
    """A table of position biases, and gradients of its weights."""
    operators, tensors = torch.ops.swinv2_scale, (coordinates, weight1, bias1, weight2)
    out = operators.position_bias_forward(*tensors)
    return [out, *operators.position_bias_backward(grad, out, *tensors)]


def plain_table(coordinates: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, grad: Tensor) -> list[Tensor]:
    """The same by PyTorch's functions."""
    weights = [weight.detach().requires_grad_() for weight in (weight1, bias1, weight2)]
    out = composed_bias_table(coordinates, *weights)
    return [out.detach(), *torch.autograd.grad(out, weights, grad)]


def compare_table() -> list[Check]:
    """A check for each of TABLE, and for a second run; of 49 offsets and 20 heads, on the CPU, in float32 as always."""
    generator = torch.Generator().manual_seed(0)
    shapes = (49, 2), (64, 2), (64,), (20, 64), (20, 49)
    tensors: list[Tensor | None] = [torch.randn(shape, generator=generator) for shape in shapes]
    return _compare("49 offsets", TABLE, tensors, native_table, plain_table)


def _compare(case: str, names: Sequence[str], tensors: list[Tensor | None], parts: Parts, plain: Parts) -> list[Check]:
    ours, usual, again = parts(*tensors), plain(*tensors), parts(*tensors)
    exact = plain(*(t.double() if t is not None and t.is_floating_point() else t for t in tensors))
    assert tensors[-1] is not None
    dtype, checks = str(tensors[-1].dtype).removeprefix("torch."), []
    for tensor, found, other, true in zip(names, ours, usual, exact, strict=True):
        factor = GRADIENTS if "gradient" in tensor else VALUES
        budget = factor * _rms(other.double() - true) + FLOOR * (_rms(true) + 1)
        checks.append(Check(case, dtype, tensor, _rms(found.double() - true), budget))
    difference = max(float((a.double() - b.double()).abs().max()) for a, b in zip(ours, again, strict=True))
    return [*checks, Check(case, dtype, REPEATED, difference, 0.0)]


def checks(device: torch.device, only: torch.dtype | None = None) -> list[Check]:
    """Of all cases, in all types that the device's kernels take or the only one; one that raises has failed."""
    types = [dtype for dtype in native.types(device) if only in (None, dtype)]
    parts = [
        (str(case), TENSORS[0], dtype, partial(compare, case, dtype, device)) for case in cases() for dtype in types
    ]
    if device.type == "cpu":
        parts += [("products", PRODUCTS[0], dtype, partial(compare_products, dtype)) for dtype in types]
        parts += [("a step", STEP[0], dtype, partial(compare_step, dtype)) for dtype in types]
        parts.append(("a table", TABLE[0], torch.float32, partial(compare_table)))
    found: list[Check] = []
    for case, tensor, dtype, run in parts:
        try:
            found += run()
        except RuntimeError as error:
            name = str(dtype).removeprefix("torch.")
            found.append(Check(case, name, tensor, math.inf, 0.0, str(error).splitlines()[0]))
    return found


def check_block(device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Before the kernels are trusted with a training run, which is of one type.

    Raises ValueError that names case, type, tensor, error, budget and the remedy.
    """
    for check in checks(device, dtype):
        if not check.passed:
            raise ValueError(f"the {device.type} kernels of a block fail their self-check at {check}. {REMEDY}")


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
