"""The native kernel of a device against the reference in float64, with an error budget instead of a tolerance.

Values may be off by twice the error that plain PyTorch makes in the same type, gradients by three times it. Two runs
must be equal to the last bit. `check_kernel` is what training starts with; `matrix` is what a new GPU has to pass once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swinv2_scale.ops import native
from swinv2_scale.ops.cosine_window_attention import MAX_LOGIT_SCALE, cosine_window_attention

VALUES, GRADIENTS = 2.0, 3.0  # times the error of plain PyTorch
# What rounding of float32 leaves where plain PyTorch is exact: per element, and relative to the largest scale, 100.
FLOOR = 2e-6
TENSORS = ("out", "qkv", "logit_scale", "bias_table")  # values, and the three gradients
REPEATED = "second run"
REMEDY = (
    "memory.attention=reference (or sequential, in less memory) trains without the kernel, the environment variable "
    f"{native.FORCE}={native.OFF} without any native code"
)

LAYOUTS = (  # window, a grid that it divides, a grid that it does not
    ((1, 1), (4, 5), (3, 1)),
    ((2, 2), (6, 8), (5, 7)),
    ((3, 3), (6, 9), (7, 8)),
    ((5, 5), (10, 5), (11, 8)),
    ((7, 7), (14, 14), (9, 15)),
    ((8, 8), (16, 8), (13, 9)),
    ((12, 12), (12, 24), (13, 20)),
    ((16, 16), (16, 32), (19, 17)),
    ((24, 24), (24, 24), (25, 20)),
    ((7, 9), (14, 9), (10, 11)),
    ((1, 8), (3, 16), (3, 13)),
    ((2, 7, 7), (2, 14, 7), (3, 9, 8)),
)
LARGE = (
    ((32, 32), (32, 32), (33, 40)),
    ((48, 48), (48, 48), (50, 40)),
    ((8, 16, 16), (8, 16, 16), (9, 16, 13)),
    ((8, 24, 24), (8, 24, 24), (8, 20, 24)),
)
ONE_TO_CLAMP = (0.02, 5.5)


@dataclass(frozen=True)
class Case:
    """Arguments of the operator, drawn at random: `scales` spans logit_scale over the heads, `zeros` is the share of
    tokens that are all zero, `shifted` is by half a window."""

    window: tuple[int, ...]
    grid: tuple[int, ...]
    shifted: bool = True
    batch: int = 1
    heads: int = 3
    width: int = 32
    mask_value: float = -100.0
    scales: tuple[float, float] = ONE_TO_CLAMP
    zeros: float = 0.0

    def __str__(self) -> str:
        window, grid = ("x".join(map(str, sizes)) for sizes in (self.window, self.grid))
        low, high = self.scales
        parts = [
            f"window {window} on {grid}{' shifted' if self.shifted else ''}",
            f"B={self.batch} H={self.heads} D={self.width}",
            f"log scale {low:g}" if low == high else f"log scale {low:g}…{high:g}",
        ]
        if self.mask_value != -100:
            parts.append(f"mask {self.mask_value:g}")
        if self.zeros:
            parts.append(f"{self.zeros:.0%} zeros")
        return ", ".join(parts)


@dataclass(frozen=True)
class Check:
    """A tensor of a case in one type: root mean square error and what it may be. `tensor` is a value, the input whose
    gradient it is, or "second run", whose error is the largest difference from the first; `problem` says why there is
    no result."""

    case: str
    dtype: str
    tensor: str
    error: float
    budget: float
    problem: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is a number within the budget."""
        return self.error <= self.budget

    @property
    def share(self) -> float:
        """Of the budget that the error takes; infinite if the error is not a number."""
        if self.passed:
            return self.error / self.budget if self.budget else 0.0
        return self.error / self.budget if self.budget and math.isfinite(self.error) else math.inf

    def __str__(self) -> str:
        tensor = f"gradient of {self.tensor}" if self.tensor in TENSORS[1:] else self.tensor
        outcome = self.problem or f"error {self.error:.2e}, budget {self.budget:.2e}"
        return f"{self.case}, {self.dtype}, {tensor}: {outcome}"


@dataclass(frozen=True)
class Draw:
    """Random inputs and gradient of the output, and the reference's output and gradients: in their type, in float64."""

    inputs: Sequence[Tensor]
    weight: Tensor
    plain: Sequence[Tensor]
    exact: Sequence[Tensor]


def short() -> list[Case]:
    """Every axis count, ragged and divided grids, both masks, zero tokens, several tiles; a fraction of a second."""
    return [
        Case((7, 9), (10, 11), heads=2, width=24, zeros=0.3),
        Case((16, 16), (16, 16), heads=2),
        Case((2, 7, 7), (3, 9, 8), heads=1, mask_value=-math.inf, scales=(2.3, 2.3)),
    ]


def variants(window: tuple[int, ...], divided: tuple[int, ...], ragged: tuple[int, ...]) -> list[Case]:
    """A layout with scales from about 1 to the clamp and beyond, both masks, zero tokens, and three head widths."""
    return [
        Case(window, divided, shifted=False, batch=3, width=24),
        Case(window, ragged, scales=(0.0, 0.0), zeros=0.3),
        Case(window, ragged, batch=2, width=8, mask_value=-math.inf, scales=(4.7, 4.7)),
    ]


def large_variants(window: tuple[int, ...], divided: tuple[int, ...], ragged: tuple[int, ...]) -> list[Case]:
    """A layout whose plain attention takes seconds on a processor: one head."""
    cases = [Case(window, divided, heads=1, scales=(2.3, 2.3))]
    if math.prod(window) <= 1024:
        cases.append(Case(window, ragged, heads=1, mask_value=-math.inf, scales=(2.3, 2.3)))
    return cases


def widths() -> list[Case]:
    """Heads of less than a vector, of none and of one of the widths that GPUs have compiled, and the widest."""
    return [Case((5, 7), (9, 10), heads=2, width=width, scales=(2.3, 2.3)) for width in (8, 16, 40, 64, 96, 128)]


def matrix() -> list[Case]:
    """All cases: a minute or two."""
    zero = [Case((3, 4), (5, 6), batch=2, zeros=1.0)]
    small = [case for layout in LAYOUTS for case in variants(*layout)]
    return [*small, *widths(), *zero, *(case for layout in LARGE for case in large_variants(*layout))]


def draw(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Draw:
    """Inputs that depend on the seed only, and what the reference makes of them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (case.batch, *case.grid, 3, case.heads, case.width)
    absent = torch.rand(*shape[:-3], 1, 1, 1, generator=generator) < case.zeros
    qkv = torch.randn(shape, generator=generator).masked_fill(absent, 0.0).to(dtype)
    scale = torch.linspace(*case.scales, case.heads)
    table = 16 * torch.rand(case.heads, *(2 * w - 1 for w in case.window), generator=generator)
    weight = torch.randn(case.batch, *case.grid, case.heads * case.width, generator=generator)
    *inputs, weight = (x.to(device) for x in (qkv, scale, table, weight))
    plain = attend(case, inputs, weight, "reference")
    exact = attend(case, [x.double() for x in inputs], weight, "reference")
    return Draw(inputs, weight, plain, exact)


def attend(case: Case, inputs: Sequence[Tensor], weight: Tensor, implementation: str) -> list[Tensor]:
    """The output, and the gradient of every input for a gradient of the output, which is rounded to qkv's type first:
    what a kernel is given in training is rounded, and that error is part of what plain PyTorch makes."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    shift = [w // 2 if case.shifted else 0 for w in case.window]
    geometry = {"window": case.window, "shift": shift, "mask_value": case.mask_value}
    out = cosine_window_attention(*leaves, **geometry, implementation=implementation)  # type: ignore[arg-type]
    return [out.detach(), *torch.autograd.grad(out, leaves, weight.to(out.dtype))]


def draws_of(case: Case, dtype: torch.dtype, device: torch.device) -> list[Draw]:
    """The more, the smaller the window: single draws of a window of 2x2 are up to 3 times better or worse than plain
    PyTorch's by luck."""
    count = min(16, max(1, 256 // math.prod(case.window)))
    return [draw(case, dtype, device, seed) for seed in range(count)]


def compare(case: Case, draws: Sequence[Draw]) -> list[Check]:
    """The kernel of the draws' device against its budget: a check for each of TENSORS, and for a second run."""
    first = draws[0].inputs
    name, kernel = _name(first[0].dtype), first[0].device.type
    ours = [attend(case, draw.inputs, draw.weight, kernel) for draw in draws]
    exact = [draw.exact for draw in draws]
    errors, size = _rms(ours, exact), _rms(exact)
    plain = _rms([draw.plain for draw in draws], exact)
    plain[2] = max(plain[2], scale_noise(case, draws))
    checks = []
    for i, tensor in enumerate(TENSORS):
        budget = (GRADIENTS if i else VALUES) * plain[i] + FLOOR * (size[i] + (100 if i else 1))
        checks.append(Check(str(case), name, tensor, errors[i], budget))
    again = attend(case, first, draws[0].weight, kernel)
    difference = max(float((a.double() - b.double()).abs().max()) for a, b in zip(ours[0], again, strict=True))
    return [*checks, Check(str(case), name, REPEATED, difference, 0.0)]


def scale_noise(case: Case, draws: Sequence[Draw]) -> float:
    """The error that plain PyTorch makes in the gradient of a scale, as that of the table predicts it.

    A scale's gradient is one sum of dlogit · scale · cos, which cancels: its own error tells luck, not accuracy. The
    table's is the same sum, in parts and without the factors, whose mean square is scale² / D; 0 beyond the clamp.
    """
    logit_scale = draws[0].inputs[1]
    slope = logit_scale.exp().masked_fill(logit_scale > MAX_LOGIT_SCALE, 0.0)
    squares = [(draw.plain[3].double() - draw.exact[3]).square().flatten(1).sum(1) for draw in draws]
    return math.sqrt(float((torch.stack(squares) * slope.square()).mean()) / case.width)


def checks(case: Case, device: torch.device, types: Sequence[torch.dtype] | None = None) -> list[Check]:
    """All checks of a case, in `types` or all that the kernel of the device takes; a kernel that raises has failed."""
    found: list[Check] = []
    for dtype in types or native.types(device):
        try:
            found += compare(case, draws_of(case, dtype, device))
        except RuntimeError as error:
            found.append(Check(str(case), _name(dtype), "out", math.inf, 0.0, str(error).splitlines()[0]))
    return found


def check_kernel(device: torch.device, dtype: torch.dtype | None = None) -> None:
    """The short form, before the kernel of a device is trusted with a training run, which is of one type.

    Raises ValueError that names case, type, tensor, error, budget and the remedy.
    """
    for case in short():
        for check in checks(case, device, None if dtype is None else [dtype]):
            if not check.passed:
                raise ValueError(f"the {device.type} attention kernel fails its self-check at {check}. {REMEDY}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rms(results: Sequence[Sequence[Tensor]], minus: Sequence[Sequence[Tensor]] | None = None) -> list[float]:
    """Root mean square of each of TENSORS over all draws, of the difference if there is something to subtract."""
    squares = [0.0] * len(TENSORS)
    for draw, tensors in enumerate(results):
        for i, x in enumerate(tensors):
            difference = x.double() if minus is None else x.double() - minus[draw][i]
            squares[i] += float(difference.square().mean()) / len(results)
    return [math.sqrt(x) for x in squares]
