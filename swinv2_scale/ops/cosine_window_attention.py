"""Shifted-window cosine attention: one function from qkv on a feature map to the attended map.

    out = softmax( exp(min(logit_scale, log 100)) · cos(q, k) + bias + mask ) · v

Scaled cosine similarity and the position bias follow Swin Transformer V2 (https://arxiv.org/abs/2111.09883, section 3)
and the constants of its released code. Shape letters: B images, M windows, N tokens of a window, H heads, D head width.
"""

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from swinv2_scale.ops import native, windows

log = logging.getLogger(__name__)

# The largest logit scale, log 100 rounded to float32 as in the released code, which shows in float64 comparisons.
# A Python float: a tensor would live on one device (a known defect of public implementations).
MAX_LOGIT_SCALE = 4.605170249938965
# Sequential form: as many heads and windows at a time as keep their logits within this many bytes, of which backward
# needs a dozen times as much.
SEQUENTIAL_BYTES = 64 * 2**20

IMPLEMENTATIONS = ("auto", "reference", "sequential", "kernel", "cpu", "cuda")
_said: set[str] = set()  # what was chosen, and why, is logged once


def cosine_window_attention(
    qkv: Tensor,
    logit_scale: Tensor,
    bias_table: Tensor,
    *,
    window: Sequence[int],
    shift: Sequence[int],
    mask_value: float = -100.0,
    implementation: str = "auto",
) -> Tensor:
    """Attention inside shifted windows of a feature map, with a learned scale per head and a bias per offset.

    qkv          (B, *grid, 3, H, D); grid is (Y, X) or (T, Y, X); float64, float32, bfloat16 or float16
    logit_scale  (H,), float32 or wider; the scale is exp(min(logit_scale, log 100))
    bias_table   (H, *(2·w - 1 per axis)), float32 or wider, indexed by offset query - key, entry w - 1 is offset zero
    window       tokens per axis; a grid that it does not divide is completed with tokens that do not exist
    shift        tokens per axis, 0 … w - 1
    mask_value   added between tokens of one window that are not neighbours on the map: -100 as released weights expect
                 (not strict once the scale exceeds about 33), or -inf
    implementation  "reference": all windows at once. "sequential": a chunk of heads and windows at a time, each
                 recomputed in backward, so that only one chunk's logits exist (the sequential self-attention of the
                 paper, section 3.4). "cpu", "cuda": the native kernel, which keeps nothing of the size of the logits;
                 "kernel": that of qkv's device. "auto": the same where it applies, else the reference.
    Returns (B, *grid, H·D) in qkv's type, which the kernels take from autocast where it is on.
    Differentiable in qkv, logit_scale and bias_table.
    Raises ValueError for shapes, windows or names that do not fit, and for a kernel by name that does not apply.
    """
    batch, *grid, _, heads, width = _checked(qkv, logit_scale, bias_table, window, shift, implementation)
    if implementation == "auto":
        implementation = _choose(qkv, logit_scale, bias_table, window)
    if implementation in ("kernel", "cpu", "cuda"):
        if implementation == "kernel":
            reason = why_reference(qkv, logit_scale, bias_table, window)
        else:
            reason = native.unfit(implementation, qkv, logit_scale, bias_table, window)
        if reason is not None:
            raise ValueError(f"implementation {implementation!r} does not apply: {reason}; 'auto' or 'reference' do")
        return native.cosine_window_attention(qkv, logit_scale, bias_table, window, shift, mask_value)

    x = windows.partition(qkv.flatten(-3), window, shift)
    x_BMNthd = x.unflatten(-1, (3, heads, width))
    index = windows.relative_index(window, qkv.device)  # PyTorch keeps it for backward: one for all chunks
    padded = windows.padded_grid(grid, window) != grid
    region_MN = windows.regions(grid, window, shift, qkv.device) if any(shift) else None
    absent_MN = windows.absent_tokens(grid, window, shift, qkv.device) if padded else None

    def attend(x: Tensor, region: Tensor | None, absent: Tensor | None, of: slice) -> Tensor:
        bias_HNN = bias_table[of].flatten(1)[:, index]
        return _attend(x, logit_scale[of], bias_HNN, _mask(region, absent, mask_value, bias_table.dtype))

    if implementation == "sequential":
        one = max(batch, 1) * math.prod(window) ** 2 * bias_table.element_size()  # of a head and window
        some_heads = min(heads, max(1, SEQUENTIAL_BYTES // one))
        some_windows = max(1, SEQUENTIAL_BYTES // (one * some_heads))
        outputs = []
        for part in _slices(x_BMNthd.shape[1], some_windows):
            region = None if region_MN is None else region_MN[part]
            absent = None if absent_MN is None else absent_MN[part]
            x_parts = [(x_BMNthd[:, part, :, :, of], region, absent, of) for of in _slices(heads, some_heads)]
            kept = [checkpoint(attend, *part, use_reentrant=False, preserve_rng_state=False) for part in x_parts]
            outputs.append(torch.cat(kept, dim=-1))
        out = torch.cat(outputs, dim=1)
    else:
        out = attend(x_BMNthd, region_MN, absent_MN, slice(heads))
    return windows.merge(out, grid, window, shift)


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, start + step) for start in range(0, length, step)]


def why_reference(qkv: Tensor, logit_scale: Tensor, bias_table: Tensor, window: Sequence[int]) -> str | None:
    """Why "auto" takes the reference for these arguments, or None if it takes the kernel of qkv's device.

    float64 is for exactness: it goes to the reference.
    """
    device = qkv.device.type
    if device not in ("cpu", "cuda"):
        return f"there is no kernel for {device}"
    if qkv.dtype == torch.float64:
        return "qkv is float64"
    return native.unfit(device, qkv, logit_scale, bias_table, window)


def _choose(qkv: Tensor, logit_scale: Tensor, bias_table: Tensor, window: Sequence[int]) -> str:
    """The kernel of qkv's device or the reference, said once."""
    device = qkv.device.type
    reason = why_reference(qkv, logit_scale, bias_table, window)
    if not torch.compiler.is_compiling():
        message = f"{device} kernel" if reason is None else f"reference on {device}: {reason}"
        if message not in _said:
            _said.add(message)
            log.info("cosine window attention: %s", message)
    return device if reason is None else "reference"


def _attend(x_BMNthd: Tensor, logit_scale: Tensor, bias_HNN: Tensor, mask_MNN: Tensor | None) -> Tensor:
    """Attention of complete windows: (B, M, N, 3, H, D) -> (B, M, N, H·D).

    Lengths, scale, logits and softmax are at least float32; the two matrix products run in the input's type.
    """
    q, k, v = x_BMNthd.permute(3, 0, 1, 4, 2, 5).unbind(0)  # each (B, M, H, N, D)
    exact = logit_scale.dtype
    q, k = _unit_length(q.to(exact)).to(v.dtype), _unit_length(k.to(exact)).to(v.dtype)
    scale_H11 = logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()[:, None, None]
    with torch.autocast(v.device.type, enabled=False):  # the types are chosen here
        logits = (q @ k.transpose(-1, -2)).to(exact) * scale_H11 + bias_HNN
        if mask_MNN is not None:
            logits = logits + mask_MNN[:, None]
        out = logits.softmax(dim=-1).to(v.dtype) @ v
    return out.transpose(-2, -3).flatten(-2)


def _unit_length(x: Tensor) -> Tensor:
    """x / max(|x|, 1e-12) along the last dim; a zero token (its key is exactly 0) stays 0, with a gradient of order 1.

    torch.nn.functional.normalize would multiply the gradient of a zero token by 1e12.
    """
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length.masked_fill(length == 0, 1.0).clamp(min=1e-12)


def _mask(region: Tensor | None, absent: Tensor | None, mask_value: float, dtype: torch.dtype) -> Tensor | None:
    """What is added to the logits of each window, (M, N, N): mask_value between regions, -inf for absent keys."""
    mask = None
    if region is not None:
        apart = region[:, :, None] != region[:, None, :]
        mask = torch.zeros(apart.shape, dtype=dtype, device=region.device).masked_fill(apart, mask_value)
    if absent is not None:
        if mask is None:
            mask = torch.zeros(*absent.shape, absent.shape[1], dtype=dtype, device=absent.device)
        mask = mask.masked_fill(absent[:, None, :], -math.inf)
        # Rows of absent queries are dropped afterwards, but must stay finite: 0 · nan is nan in backward.
        mask = mask.masked_fill(absent[:, :, None], 0.0)
    return mask


def _checked(
    qkv: Tensor,
    logit_scale: Tensor,
    bias_table: Tensor,
    window: Sequence[int],
    shift: Sequence[int],
    implementation: str,
) -> torch.Size:
    """The shape of qkv, after refusing arguments that do not fit together."""
    axes = qkv.dim() - 4
    if axes not in (2, 3) or qkv.shape[-3] != 3 or not qkv.is_floating_point():
        got = f"{qkv.dtype} of shape {tuple(qkv.shape)}"
        raise ValueError(f"qkv must be floating point (B, Y, X, 3, H, D) or (B, T, Y, X, 3, H, D), got {got}")
    heads = qkv.shape[-2]
    if len(window) != axes or min(window) < 1:
        raise ValueError(f"window must have {axes} values of at least 1, one per axis of qkv, got {tuple(window)}")
    if len(shift) != axes or not all(0 <= s < w for s, w in zip(shift, window, strict=True)):
        raise ValueError(f"shift must have {axes} values in 0 … window - 1 = {tuple(window)}, got {tuple(shift)}")
    if logit_scale.shape != (heads,):
        raise ValueError(f"logit_scale must have shape ({heads},), one per head of qkv, got {tuple(logit_scale.shape)}")
    table = (heads, *(2 * w - 1 for w in window))
    if bias_table.shape != table:
        raise ValueError(
            f"bias_table must have shape {table} for window {tuple(window)}, got {tuple(bias_table.shape)}"
        )
    if len({qkv.device, logit_scale.device, bias_table.device}) > 1:
        devices = f"qkv {qkv.device}, logit_scale {logit_scale.device}, bias_table {bias_table.device}"
        raise ValueError(f"all tensors must lie on one device, got {devices}")
    for name, tensor in (("logit_scale", logit_scale), ("bias_table", bias_table)):
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} must be float32 (float64 for tests), got {tensor.dtype}: lower types lose the scale"
            )
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")
    return qkv.shape
