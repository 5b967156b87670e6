"""The operator in other ways that PyTorch has, and the time of several measured side by side."""

import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from swinv2_scale.ops import windows
from swinv2_scale.ops.cosine_window_attention import MAX_LOGIT_SCALE, cosine_window_attention

WIDTH = 32  # of a head, in every Swin V2
MASK = -100.0

Shape = tuple[str, int, int, int, int]  # type, batch, side of the map, window, heads
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(shape: Shape, implementation: str = "reference") -> Attention:
    """An implementation of the operator by name, on windows that are shifted by half."""
    window = shape[3]
    return functools.partial(
        cosine_window_attention,
        window=(window, window),
        shift=(window // 2, window // 2),
        mask_value=MASK,
        implementation=implementation,
    )


def on_windows(shape: Shape, device: str, attend: Callable[..., Tensor]) -> Attention:
    """Partition, `attend(q, k, v, bias_table, index, region)`, merge; q has length exp(logit_scale), k has length 1.

    q, k, v are (B, M, H, N, D), index (N, N) is the place of each pair in the table, region (M, N) as in windows.py.
    """
    _, _, side, w, _ = shape
    geometry = (side, side), (w, w), (w // 2, w // 2)
    index = windows.relative_index((w, w), torch.device(device))
    region = windows.regions(*geometry, torch.device(device))

    def attention(qkv: Tensor, logit_scale: Tensor, bias_table: Tensor) -> Tensor:
        x = windows.partition(qkv.flatten(-3), *geometry[1:]).unflatten(-1, qkv.shape[-3:])
        q, k, v = x.permute(3, 0, 1, 4, 2, 5).unbind(0)
        q = F.normalize(q.float(), dim=-1) * logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()[:, None, None]
        k = F.normalize(k.float(), dim=-1)
        out = attend(q.to(v.dtype), k.to(v.dtype), v, bias_table, index, region)
        return windows.merge(out.transpose(-2, -3).flatten(-2), *geometry)

    return attention


def sdpa(shape: Shape, device: str) -> Attention:
    """scaled_dot_product_attention, with bias and mask of all windows and heads as its attn_mask."""
    return on_windows(shape, device, _sdpa)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor, index: Tensor, region: Tensor) -> Tensor:
    apart = (region[:, :, None] != region[:, None, :])[:, None]
    mask = bias_table.flatten(1)[:, index] + torch.where(apart, MASK, 0.0)  # (M, H, N, N)
    return F.scaled_dot_product_attention(q, k, v, mask.to(v.dtype).expand(len(q), -1, -1, -1, -1), scale=1.0)


def draw(shape: Shape, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """qkv, logit_scale and bias_table of a shape, to be differentiated."""
    kind, batch, side, window, heads = shape
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, side, side, 3, heads, WIDTH, generator=generator).to(device, getattr(torch, kind))
    table = 16 * torch.rand(heads, 2 * window - 1, 2 * window - 1, generator=generator)
    return (
        qkv.requires_grad_(),
        torch.full((heads,), 2.3, device=device).requires_grad_(),
        table.to(device).requires_grad_(),
    )


def milliseconds(work: Callable[[], None], device: str, at_least: float = 0.02) -> float:
    """Of one call, the mean over as many as fill `at_least` seconds."""
    calls, begin = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < at_least or not calls:
        work()
        calls += 1
        if device == "cuda":
            torch.cuda.synchronize()
    return elapsed / calls * 1e3


def measure(
    shape: Shape, device: str, implementations: Mapping[str, Attention], rounds: int, forward_only: Sequence[str] = ()
) -> dict[str, tuple[float, float]]:
    """Milliseconds of forward and of forward with backward by name; NaN for what an implementation cannot do.

    Every round takes all of them in turn, so that a slow moment of the machine meets each; the median round counts.
    """
    tensors = draw(shape, device)
    grad = torch.randn_like(tensors[0][..., 0, :, :].flatten(-2))

    def forward(attention: Attention) -> None:
        with torch.no_grad():
            attention(*tensors)

    def both(attention: Attention) -> None:
        torch.autograd.grad(attention(*tensors), tensors, grad)

    works: dict[tuple[str, int], Callable[[], None]] = {}
    times: dict[tuple[str, int], list[float]] = {}
    for name, attention in implementations.items():
        for place, work in enumerate((forward,) if name in forward_only else (forward, both)):
            works[name, place] = functools.partial(work, attention)
            try:
                works[name, place]()
                times[name, place] = []
            except Exception as error:  # a compiler may fail in its own ways
                print(f"{name} {('forward', 'training')[place]}: {str(error).splitlines()[0][:200]}", file=sys.stderr)
                del works[name, place]
    for _ in range(rounds):
        for key, timed in works.items():
            times[key].append(milliseconds(timed, device))
    median = {key: statistics.median(values) for key, values in times.items()}
    return {name: (median.get((name, 0), math.nan), median.get((name, 1), math.nan)) for name in implementations}
