"""The native kernels: loading them, and what PyTorch must know of them (shapes, gradients, types under autocast).

Operators `swinv2_scale::cosine_window_attention_forward` and `…_backward` are defined in kernels/bindings.cpp. Forward
returns out (B, *grid, H·D) and the log-sum-exp of every row (B, *grid, H); backward recomputes the rest from them.
"""

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

MAX_WINDOW = 64  # tokens per axis
MAX_CUDA_CHANNELS = 4096  # of a norm
WIDTHS = range(8, 129, 8)  # of a head
TYPES = (torch.float32, torch.bfloat16, torch.float16)
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16")  # that setup.py compiles for x86-64
FORCE = "SWINV2_SCALE_INSTRUCTION_SET"  # names the one to use instead of the best, or is OFF
OFF = "none"
REMEDY = {
    "cpu": "with a C++ compiler and torch>=2.10 installed, run pip install again in the checkout",
    "cuda": "with a C++ compiler, nvcc and a PyTorch with CUDA installed, run pip install again in the checkout",
}

Outputs = tuple[Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


def _load() -> dict[str, str]:
    """Load what is built; why each of the others is missing. The CPU library defines what the CUDA library adds to."""
    missing = {}
    if os.environ.get(FORCE) == OFF:
        return dict.fromkeys(("cpu", "cuda"), f"{FORCE}={OFF} switches native code off")
    for device in ("cpu", "cuda"):
        library = Path(__file__).with_name(f"_kernels_{device}.so")
        if not library.exists():
            missing[device] = f"the {device} kernel is not built ({REMEDY[device]})"
        elif "cpu" in missing:
            missing[device] = missing["cpu"]
        elif device == "cuda" and torch.version.cuda is None:
            missing[device] = "this PyTorch is without CUDA"
        else:
            torch.ops.load_library(library)
    return missing


missing = _load()


if "cpu" not in missing:

    @register_flop_formula([torch.ops.swinv2_scale.linear_forward, torch.ops.swinv2_scale.linear_backward])
    def _product_flops(rows: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
        return 2 * rows[0] * weight[0] * weight[1]

    @register_flop_formula(torch.ops.swinv2_scale.mlp_forward)
    def _mlp_flops(rows: Sequence[int], weight1: Sequence[int], *_: Any, **__: Any) -> int:
        return 4 * rows[0] * weight1[0] * weight1[1]

    @register_flop_formula(torch.ops.swinv2_scale.mlp_backward)
    def _mlp_gradient_flops(grad: Sequence[int], x: Sequence[int], hidden: Sequence[int], *_: Any, **__: Any) -> int:
        return 8 * hidden[0] * hidden[1] * grad[1]

    @register_flop_formula(torch.ops.swinv2_scale.weight_gradient)
    def _gradient_flops(grad: Sequence[int], x: Sequence[int], *_: Any, **__: Any) -> int:
        return 2 * grad[0] * grad[1] * x[1]


@functools.cache
def types(device: torch.device) -> tuple[torch.dtype, ...]:
    """What the kernels of a device take, without float64: Turing has no bfloat16."""
    turing = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    return tuple(dtype for dtype in TYPES if not (turing and dtype == torch.bfloat16))


def unfit(  # noqa: PLR0911 one line per reason
    device: str, qkv: Tensor, logit_scale: Tensor, bias_table: Tensor, window: Sequence[int]
) -> str | None:
    """Why the kernel of a device does not take these arguments, or None if it does."""
    if qkv.device.type != device:
        return f"qkv lies on {qkv.device.type}"
    if device in missing:
        return missing[device]
    if qkv.shape[-1] not in WIDTHS:
        return f"head width {qkv.shape[-1]} is not a multiple of 8 in 8 … 128"
    if max(window) > MAX_WINDOW:
        return f"window {tuple(window)} exceeds {MAX_WINDOW} tokens per axis"
    if qkv.dtype not in TYPES and (device, qkv.dtype) != ("cpu", torch.float64):
        return f"qkv is {qkv.dtype}"
    exact = torch.promote_types(qkv.dtype, torch.float32)
    if logit_scale.dtype != exact or bias_table.dtype != exact:
        return f"logit_scale and bias_table must be {exact} for qkv in {qkv.dtype}"
    return None


def instruction_sets() -> list[str]:
    """Those of the CPU kernel that this processor has, the best last, as the kernel lists them when it is asked for
    another."""
    forced = os.environ.get(FORCE)
    os.environ[FORCE] = "unknown"
    try:
        operator = torch.ops.swinv2_scale.cosine_window_attention_forward
        operator(torch.ones(1, 1, 1, 3, 1, 8), torch.ones(1), torch.ones(1, 1, 1), [1, 1], [0, 0], 0.0)
    except RuntimeError as error:
        return str(error).partition("but this processor has")[2].splitlines()[0].split()
    finally:
        if forced is None:
            del os.environ[FORCE]
        else:
            os.environ[FORCE] = forced
    raise AssertionError("the kernel took an instruction set that does not exist")


@functools.cache
def products(dtype: torch.dtype, forced: str | None) -> str:
    """How the CPU's kernels multiply maps of a type: "tiles" (AMX), "vectors" or "none". forced: the value of FORCE."""
    return torch.ops.swinv2_scale.products(dtype)


def cosine_window_attention(
    qkv: Tensor, logit_scale: Tensor, bias_table: Tensor, window: Sequence[int], shift: Sequence[int], mask_value: float
) -> Tensor:
    """Attention by the kernel of qkv's device, for arguments that `unfit` has nothing against."""
    forward = torch.ops.swinv2_scale.cosine_window_attention_forward
    tensors = (qkv.contiguous(), logit_scale.contiguous(), bias_table.contiguous())
    return forward(*tensors, list(window), list(shift), mask_value)[0]


def _shapes(qkv: Tensor, logit_scale: Tensor, bias_table: Tensor, *geometry: Any) -> Outputs:
    lead, heads, width = qkv.shape[:-3], qkv.shape[-2], qkv.shape[-1]
    return qkv.new_empty(*lead, heads * width), qkv.new_empty(*lead, heads, dtype=logit_scale.dtype)


def _gradient_shapes(
    grad_out: Tensor, qkv: Tensor, logit_scale: Tensor, bias_table: Tensor, *results_and_geometry: Any
) -> Gradients:
    return torch.empty_like(qkv), torch.empty_like(logit_scale), torch.empty_like(bias_table)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    qkv, logit_scale, bias_table, *ctx.geometry = inputs
    ctx.save_for_backward(qkv, logit_scale, bias_table, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 6
    backward = torch.ops.swinv2_scale.cosine_window_attention_backward
    return *backward(grad_out.contiguous(), *ctx.saved_tensors, *ctx.geometry), None, None, None


def _autocast(device: str) -> Callable[..., Outputs]:
    """qkv in the type of autocast; scale and table, which lower types would spoil, in float32."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def forward(qkv: Tensor, logit_scale: Tensor, bias_table: Tensor, *geometry: Any) -> Outputs:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            tensors = (qkv.to(torch.get_autocast_dtype(device)), logit_scale.float(), bias_table.float())
            return torch.ops.swinv2_scale.cosine_window_attention_forward(*tensors, *geometry)

    return forward


if "cpu" not in missing:
    _library = torch.library.Library("swinv2_scale", "FRAGMENT")
    torch.library.register_fake("swinv2_scale::cosine_window_attention_forward", _shapes, lib=_library)
    torch.library.register_fake("swinv2_scale::cosine_window_attention_backward", _gradient_shapes, lib=_library)
    torch.library.register_autograd(
        "swinv2_scale::cosine_window_attention_forward", _backward, setup_context=_keep, lib=_library
    )
    for _device in ("cpu", "cuda"):
        _key = f"Autocast{_device.upper()}"
        _library.impl("cosine_window_attention_forward", _autocast(_device), _key)
