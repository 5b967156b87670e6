"""What a block does besides attention, with as little kept for backward, and as little memory traffic, as it needs.

    linear               x · Wᵀ + b
    mlp                  fc2(gelu(fc1(x))); keeps x and fc1's output, and computes GELU again in backward
    residual_post_norm   x + keep · norm(y); keeps y and two numbers per token
    first_images         x, and some images of it, for a branch that others do not have
    layer_norm           the norm alone

The parts that memory bounds are native on the CPU (kernels/block_cpu.cpp) and on NVIDIA's GPUs (kernels/block_cuda.cu),
PyTorch's functions where those are missing or take no such map. Products are PyTorch's, but for those that are faster
here: on processors with AMX in bfloat16 (kernels/linear_cpu.cpp, kernels/weight_gradient_cpu.cpp), on others that have
dot products of bfloat16 in float32 too (kernels/linear_vectors_cpu.cpp), where an MLP of many tokens is one operator
(kernels/bindings_mlp.cpp). A compiler sees compositions of PyTorch's functions, which it fuses in its own way, and
which tests and the self-check compare the rest with.
Channels are the last dimension of every map.
"""

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from swinv2_scale.ops import native

EPS = 1e-5  # of the norm
LARGE = 2**25  # elements of an image's hidden map; from there on one more pass pays for having two of them, not three
PART = 2**12  # tokens
BF16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # products of oneDNN


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (…, C), weight (C', C), bias (C',) or None -> (…, C'), in autocast's type where it is on."""
    if torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    return _Linear.apply(*_autocast(x, weight, bias))


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """Two linear layers with GELU between them: (…, C) -> (…, C)."""
    if torch.compiler.is_compiling():
        return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)
    return _Mlp.apply(*_autocast(x, weight1, bias1, weight2, bias2), torch.is_grad_enabled())


def residual_post_norm(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, keep: Tensor | None = None, images: Tensor | None = None
) -> Tensor:
    """x + keep · (LayerNorm(y) · weight + bias) in x's type; the norm in that of its weight.

    x (B, …, C), y (K, …, C); weight and bias (C,), float32 or wider; keep (K,), float32: drop path's factors, or None.
    images (B,), int64: an order of x's images, of which y has the first K; the others go through as they are. None: y
    has all, and K = B.
    """
    if torch.compiler.is_compiling():
        return composed_post_norm(x, y, weight, bias, keep, images)
    return _ResidualPostNorm.apply(x, y.to(x.dtype), weight, bias, keep, images)


def first_images(x: Tensor, images: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """x (B, …) and the first `count` of its images in an order (B,) of them: (B, …), (count, …). Backward adds up the
    gradients of both in one pass."""
    return _FirstImages.apply(x, images, count)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm(x) · weight + bias in x's type; the norm in that of its weight. x (…, C), weight and bias (C,).

    Maps of 16 bits with weights of 32 are native on the CPU, where PyTorch would sum gradients in 16 bits.
    """
    copies = x.dtype != weight.dtype and not torch.compiler.is_compiling()
    if copies and x.device.type == "cpu" and _has_native_norm(x, weight):
        return _ResidualPostNorm.apply(None, x, weight, bias, None, None)
    return F.layer_norm(x.to(weight.dtype), weight.shape, weight, bias, EPS).to(x.dtype)


def composed_post_norm(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, keep: Tensor | None = None, images: Tensor | None = None
) -> Tensor:
    """`residual_post_norm` as PyTorch's functions have it."""
    return _add_branch(x, F.layer_norm(y.to(weight.dtype), weight.shape, weight, bias, EPS), keep, images)


def _add_branch(x: Tensor, branch: Tensor, keep: Tensor | None, images: Tensor | None) -> Tensor:
    branch = (branch if keep is None else branch * _per_image(keep, x)).to(x.dtype)
    return x + branch if images is None else x.index_add(0, images[: len(branch)], branch)


def _per_image(keep: Tensor, x: Tensor) -> Tensor:
    return keep.view(-1, *[1] * (x.dim() - 1))


def _is_native(map: Tensor, norm: bool = False) -> bool:
    """Whether the native parts of a map's device take it."""
    device, channels = map.device.type, map.shape[-1]
    if device not in ("cpu", "cuda") or device in native.missing or channels % 16:
        return False
    if device == "cpu":
        return map.dtype in (*native.TYPES, torch.float64)
    return map.dtype in native.types(map.device) and not (norm and channels > native.MAX_CUDA_CHANNELS)


def _has_native_norm(map: Tensor, weight: Tensor) -> bool:
    return _is_native(map, norm=True) and weight.dtype == torch.promote_types(map.dtype, torch.float32)


def _autocast(x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return x, *others
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), *(other if other is None else other.to(dtype) for other in others)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if _takes_product(x, weight):
        return torch.ops.swinv2_scale.linear_forward(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], -1)
    return usual_product(x, weight, bias)


def usual_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x · Wᵀ + b by PyTorch."""
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and BF16:
        # F.linear would first fill the output with the bias, and then add the product to it.
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    with torch.autocast(x.device.type, enabled=False):  # the types are chosen already
        return F.linear(x, weight, bias)


def _input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """(n, C') and (C', C) -> (n, C)"""
    return torch.ops.swinv2_scale.linear_backward(grad, weight) if _takes_product(grad, weight) else grad @ weight


def _products(*maps: Tensor) -> str:
    """How native code multiplies such maps and weights: by AMX tiles, by vectors, or not: "none"."""
    for map in maps:
        if map.device.type != "cpu" or map.dtype != maps[0].dtype or map.shape[-1] % 32 or not map.is_contiguous():
            return "none"
    return "none" if "cpu" in native.missing else native.products(maps[0].dtype, os.environ.get(native.FORCE))


def _takes_product(x: Tensor, *weights: Tensor) -> bool:
    """Whether the native product is faster than PyTorch's: by tiles where maps are longer than wide and not narrow, by
    vectors where laying the weight out does not cost more than it brings. Of two weights: both products of an MLP in
    one operator, where each thread has some hundred tokens."""
    kind, inputs = _products(x, *weights), x.shape[-1]
    tokens = x.numel() // inputs
    if len(weights) > 1 and (kind != "vectors" or tokens < 512 * torch.get_num_threads()):
        return False
    for weight in weights:
        outputs = weight.numel() // inputs
        if kind == "tiles":
            fast = 512 <= inputs < 4096 and outputs >= 512 and tokens >= inputs
        else:
            fast = kind == "vectors" and tokens >= max(256, inputs // 8)
        if not fast or len(weight) % 32:
            return False
        inputs = outputs
    return True


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _sum(rows: Tensor) -> Tensor:
    """(n, C) -> (C,), the gradient of a bias."""
    return torch.ops.swinv2_scale.sum_rows(rows).to(rows.dtype) if _is_native(rows) else rows.sum(0)


def _gelu(hidden: Tensor) -> Tensor:
    return torch.ops.swinv2_scale.gelu_forward(hidden) if _is_native(hidden) else F.gelu(hidden)


def _gelu_backward(grad: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(n, C) twice -> the gradient of GELU's input, in the memory of `grad`; GELU's output; the first's sum, in float32
    or wider."""
    if _is_native(hidden):
        return grad, *torch.ops.swinv2_scale.gelu_backward(grad, hidden)
    torch.ops.aten.gelu_backward.grad_input(grad, hidden, grad_input=grad)
    return grad, F.gelu(hidden), grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32))


def _parameter_gradients(
    grad: Tensor, x: Tensor, for_weight: bool, for_bias: bool, total: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """(n, C') and (n, C) -> (C', C) and (C',), the gradients of a weight and of a bias, of those that are wanted;
    `total` is the sum of `grad` if it is known."""
    if for_weight and _takes_gradient(grad, x):
        of_weight, of_bias = torch.ops.swinv2_scale.weight_gradient(grad, x)
        return of_weight, of_bias.to(grad.dtype) if for_bias else None
    if for_bias:
        total = _sum(grad) if total is None else total.to(grad.dtype)
    return grad.t() @ x if for_weight else None, total if for_bias else None


def _takes_gradient(grad: Tensor, x: Tensor) -> bool:
    """Whether the native gradient of a weight is faster than PyTorch's: the maps are not much wider than long."""
    kind, channels = _products(grad, x), (x.shape[1], grad.shape[1])
    if kind == "tiles":
        return 2 * len(x) >= min(channels)
    return kind == "vectors" and len(x) >= max(256, max(channels) // 8)


def _takes_mlp_gradient(grad: Tensor, hidden: Tensor) -> bool:
    """Whether all gradients of an MLP come from one operator: every thread has a chunk of tokens, or several."""
    chunks, threads = min((len(grad) + 1024) // 4096 * 2, 16), torch.get_num_threads()
    return (
        _products(grad, hidden) == "vectors" and chunks >= threads and (chunks % threads == 0 or chunks >= 4 * threads)
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        grad = _rows(grad)
        return _input_gradient(grad, weight).view_as(x) if for_x else None, *_parameter_gradients(
            grad, _rows(x), for_weight, for_bias
        )


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, keep: bool
    ) -> Tensor:
        if _takes_product(x, weight1, weight2):
            rows = x.flatten(0, -2)
            out, hidden = torch.ops.swinv2_scale.mlp_forward(rows, weight1, bias1, weight2, bias2, keep)
            out, hidden = out.view_as(x), hidden.view(*(x.shape[:-1] if keep else (0,)), len(weight1))
        else:
            hidden = _product(x, weight1, bias1)
            out = _product(_gelu(hidden), weight2, bias2)
        ctx.save_for_backward(x, hidden, weight1, weight2)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, weight1, weight2 = ctx.saved_tensors
        for_x, for_weight1, for_bias1, for_weight2, for_bias2, _ = ctx.needs_input_grad
        large = hidden.numel() >= LARGE * len(hidden)
        grad, hidden = _rows(grad), _rows(hidden)
        if all(ctx.needs_input_grad[:5]) and _takes_mlp_gradient(grad, hidden):
            tensors = (grad, _rows(x), hidden, weight1, weight2)
            grad_x, first, bias1, second, bias2 = torch.ops.swinv2_scale.mlp_backward(*tensors)
            return grad_x.view_as(x), first, bias1.to(grad.dtype), second, bias2.to(grad.dtype), None
        if not large:  # one pass for GELU and its gradient
            grad_hidden, activated, sum_hidden = _gelu_backward(_input_gradient(grad, weight2), hidden)
            second = _parameter_gradients(grad, activated, for_weight2, for_bias2)
            del activated
        else:  # GELU is gone before its gradient comes
            second = _parameter_gradients(grad, _gelu(hidden), for_weight2, for_bias2)
            grad_hidden = _input_gradient(grad, weight2)
            parts = zip(grad_hidden.split(PART), hidden.split(PART), strict=True)
            sum_hidden = torch.stack([_gelu_backward(*part)[2] for part in parts]).sum(0)
        first = _parameter_gradients(grad_hidden, _rows(x), for_weight1, for_bias1, sum_hidden)
        return _input_gradient(grad_hidden, weight1).view_as(x) if for_x else None, *first, *second, None


class _FirstImages(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, images: Tensor, count: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(images)
        return x.view_as(x), x.index_select(0, images[:count])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_first: Tensor) -> tuple[Tensor, None, None]:
        (images,) = ctx.saved_tensors
        if _is_native(grad):
            tensors = grad.contiguous(), grad_first.contiguous(), images
            return torch.ops.swinv2_scale.add_images(*tensors), None, None
        return grad.index_add(0, images[: len(grad_first)], grad_first), None, None


class _ResidualPostNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor | None,
        y: Tensor,
        weight: Tensor,
        bias: Tensor,
        keep: Tensor | None,
        images: Tensor | None,
    ) -> Tensor:
        ctx.native = x is None or _has_native_norm(y, weight)
        if ctx.native:
            x, y = None if x is None else x.contiguous(), y.contiguous()
            keep = None if keep is None else keep.to(weight.dtype)
            out, *statistics = torch.ops.swinv2_scale.residual_norm_forward(x, y, weight, bias, keep, images, EPS)
        else:
            assert x is not None
            branch, *statistics = torch.native_layer_norm(y.to(weight.dtype), weight.shape, weight, bias, EPS)
            out = _add_branch(x, branch, keep, images)
        ctx.save_for_backward(y, weight, bias, keep, images, *statistics)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, bias, keep, images, *statistics = ctx.saved_tensors
        if ctx.native:
            backward = torch.ops.swinv2_scale.residual_norm_backward
            grad_y, affine = backward(grad.contiguous(), y, weight, keep, images, *statistics)
            return grad if ctx.needs_input_grad[0] else None, grad_y, *affine, None, None
        of_branch = (grad if images is None else grad.index_select(0, images[: len(y)])).to(weight.dtype)
        of_branch = of_branch if keep is None else (of_branch * _per_image(keep, y)).to(weight.dtype)
        backward = torch.ops.aten.native_layer_norm_backward
        grad_y, *affine = backward(of_branch, y.to(weight.dtype), weight.shape, *statistics, weight, bias, [True] * 3)
        return grad, grad_y.to(y.dtype), *affine, None, None
