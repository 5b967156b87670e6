"""The native products of a linear layer and its gradients against float64, and where layers take them."""

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from swinv2_scale.ops import block, native, selfcheck_block

# Rows, inputs, outputs: one row, a part of a square, a row more than squares have; panels of more than one block; one
# step of inputs, and so many that their tiles are asked for, or sums are added up in parts; chunks of one strip and of
# several.
PRODUCTS = [(1, 32, 32), (33, 96, 64), (300, 544, 1088), (700, 2048, 512), (2304, 512, 96), (31, 1024, 1568)]
PRODUCTS += [(45, 2176, 32)]
# Tokens, outputs, inputs: tiles that are not full, several blocks of tokens and chunks, blocks of either map's channels
# that are not full, x as the left map and grad as the left map, and maps of one token.
SHAPES = [(1, 32, 32), (31, 96, 32), (33, 32, 96), (545, 288, 96), (700, 1056, 64), (300, 1184, 544), (4700, 224, 224)]
SHAPES += [(4099, 576, 32), (4200, 544, 544)]
ROUNDING = {torch.bfloat16: 2**-8, torch.float32: 2**-20}


def ways() -> Iterator[tuple[str, torch.dtype]]:
    """Instruction sets and types that have native products here."""
    before = os.environ.get(native.FORCE)
    for name in () if "cpu" in native.missing else native.instruction_sets():
        os.environ[native.FORCE] = name
        yield from ((name, dtype) for dtype in ROUNDING if torch.ops.swinv2_scale.products(dtype) != "none")
    os.environ.pop(native.FORCE, None)
    if before is not None:
        os.environ[native.FORCE] = before


WAYS = list(ways())
SKIP = pytest.param(None, marks=pytest.mark.skip(reason="no native products: no kernels, AMX or AVX-512 with bfloat16"))


@pytest.fixture(params=WAYS or [SKIP], ids=lambda way: f"{way[0]} {str(way[1]).removeprefix('torch.')}")
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Of maps; the instruction set that multiplies them is chosen."""
    monkeypatch.setenv(native.FORCE, request.param[0])
    return request.param[1]


def maps(tokens: int, outputs: int, inputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    grad = torch.randn(tokens, outputs, generator=generator) + torch.arange(outputs) / outputs
    return grad.to(dtype), torch.randn(tokens, inputs, generator=generator).to(dtype)


def operands(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, a weight and a bias."""
    generator = torch.Generator().manual_seed(rows)
    x, weight, bias = (
        torch.randn(shape, generator=generator) for shape in [(rows, inputs), (outputs, inputs), (outputs,)]
    )
    return x.to(dtype), (weight / inputs**0.5).to(dtype), bias.to(dtype)


@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_products_are_those_of_float64(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """To the rounding of their type, with a bias and without, and of the transposed weight."""
    x, weight, bias = operands(*shape, dtype)
    exact = x.double() @ weight.double().t()
    transposed = weight.t().contiguous()
    for found, true in (
        (torch.ops.swinv2_scale.linear_forward(x, weight, bias), exact + bias.double()),
        (torch.ops.swinv2_scale.linear_forward(x, weight, None), exact),
        (torch.ops.swinv2_scale.linear_backward(x, transposed), exact),
    ):
        assert found.dtype == dtype and found.shape == true.shape
        assert ((found.double() - true).abs() <= ROUNDING[dtype] * true.abs() + 1e-5).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_those_of_float64(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """The weight's to the rounding of its type, the bias's to that of float32."""
    grad, x = maps(*shape, dtype)
    of_weight, of_bias = torch.ops.swinv2_scale.weight_gradient(grad, x)
    exact = grad.double().t() @ x.double()
    largest = exact.abs().max()
    assert of_weight.dtype == dtype and of_bias.dtype == torch.float32
    assert ((of_weight.double() - exact).abs() <= ROUNDING[dtype] * exact.abs() + 1e-5 * largest).all()
    total = grad.double().sum(0)
    assert ((of_bias.double() - total).abs() <= 1e-5 * grad.double().abs().sum(0)).all()


def test_neither_threads_nor_repetition_change_a_bit(dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 7, 8, 2):  # which cut the result into other blocks; into eight of which one is empty
        torch.set_num_threads(threads)
        products = [torch.ops.swinv2_scale.linear_forward(*operands(*shape, dtype)) for shape in PRODUCTS]
        gradients = [torch.ops.swinv2_scale.weight_gradient(*maps(*shape, dtype)) for shape in SHAPES]
        found.append([*products, *(each for pair in gradients for each in pair)])
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("wrong", range(4), ids=lambda number: selfcheck_block.PRODUCTS[number])
def test_the_self_check_sees_what_is_wrong(wrong: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(check.passed for check in selfcheck_block.compare_products(dtype))
    right = selfcheck_block.native_products

    def products(*tensors: Tensor) -> list[Tensor]:
        found = right(*tensors)
        found[wrong][..., ::32] *= 1.5  # a column of 32, or one number
        return found

    monkeypatch.setattr(selfcheck_block, "native_products", products)
    failed = [check.tensor for check in selfcheck_block.compare_products(dtype) if not check.passed]
    assert failed == [selfcheck_block.PRODUCTS[wrong]]


def test_what_does_not_fit_is_refused(dtype: torch.dtype) -> None:
    operators = torch.ops.swinv2_scale
    grad, x = maps(40, 64, 32, dtype)
    with pytest.raises(RuntimeError, match="multiple of 32"):
        operators.weight_gradient(grad[:, :48].contiguous(), x)
    with pytest.raises(RuntimeError, match="x has 39 tokens, grad 40"):
        operators.weight_gradient(grad, x[1:])
    with pytest.raises(RuntimeError, match="no native products of maps of this type"):
        operators.weight_gradient(grad.double(), x.double())
    with pytest.raises(RuntimeError, match="x must be contiguous, on the CPU and of the same type"):
        operators.weight_gradient(grad, x.double())
    with pytest.raises(RuntimeError, match="contiguous"):
        operators.weight_gradient(grad[:, :32], x)
    x, weight, bias = operands(40, 64, 96, dtype)
    with pytest.raises(RuntimeError, match="x has 64 channels, the weight 96"):
        operators.linear_backward(x, weight)
    with pytest.raises(RuntimeError, match="bias must be 96 numbers"):
        operators.linear_forward(x, weight, bias[:64])
    with pytest.raises(RuntimeError, match="weight must be contiguous, on the CPU and of the same type"):
        operators.linear_forward(x, weight.double(), bias)
    with pytest.raises(RuntimeError, match="weight must have a multiple of 32 channels in both"):
        operators.linear_forward(x, weight[:40], bias[:40])


def gradients(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


# By how maps are multiplied: images, tokens, inputs and hidden channels, and what layers decide for them.
GRADIENTS_TAKEN = {
    "tiles": [((1, 16, 32, 64), [True] * 3), ((1, 15, 32, 64), [False] * 3)],
    "vectors": [((1, 256, 32, 2048), [True] * 3), ((1, 255, 32, 64), [False] * 3), ((1, 256, 32, 2080), [False] * 3)],
}
PRODUCTS_TAKEN = {
    "tiles": [
        ((1, 1024, 512, 1024), [True] * 6),
        ((1, 1023, 512, 1024), [True, False] * 3),  # wider than long: the hidden map, which three read
        ((1, 1024, 480, 512), [False] * 6),
        ((1, 1024, 4096, 512), [False, True] * 3),
    ],
    "vectors": [
        ((1, 256, 32, 2048), [True] * 6),
        ((1, 255, 32, 64), [False] * 6),
        ((1, 256, 32, 2080), [True, False] * 3),
    ],
}


def test_layers_take_gradients_of_maps_longer_than_wide(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A linear layer once, an MLP twice; and gradients are those that they have without."""
    for sizes, taken in GRADIENTS_TAKEN[torch.ops.swinv2_scale.products(dtype)]:
        check_layers("_takes_gradient", sizes, taken, dtype, monkeypatch)


def test_layers_take_products_of_long_maps(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the forward pass and of the gradients of maps."""
    for sizes, taken in PRODUCTS_TAKEN[torch.ops.swinv2_scale.products(dtype)]:
        check_layers("_takes_product", sizes, taken, dtype, monkeypatch)


def check_layers(
    decision: str,
    sizes: tuple[int, int, int, int],
    taken: list[bool],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images, tokens, inputs, hidden = sizes
    shapes = [(images, tokens, inputs), (hidden, inputs), (hidden,), (inputs, hidden), (inputs,)]
    tensors = [(torch.randn(shape) / shape[-1] ** 0.5).to(dtype) for shape in shapes]
    calls: list[bool] = []
    decide = getattr(block, decision)
    monkeypatch.setattr(block, decision, lambda *maps: calls.append(decide(*maps)) or calls[-1])
    found = gradients(block.linear, tensors[:3]) + gradients(block.mlp, tensors)
    assert calls == taken, sizes
    monkeypatch.setattr(block, decision, lambda *maps: False)
    for own, usual in zip(found, gradients(block.linear, tensors[:3]) + gradients(block.mlp, tensors), strict=True):
        assert own.dtype == usual.dtype and own.shape == usual.shape
        assert (own.float() - usual.float()).norm() <= 5e-3 * usual.float().norm()
    monkeypatch.setattr(block, decision, decide)
