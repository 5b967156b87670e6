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

    def of_a_layer(*maps: Tensor) -> bool:
        taken = decide(*maps)
        if len(maps) == 2:  # else it is whether an MLP is one operator: not of as few tokens
            calls.append(taken)
        return taken

    monkeypatch.setattr(block, decision, of_a_layer)
    found = gradients(block.linear, tensors[:3]) + gradients(block.mlp, tensors)
    assert calls == taken, sizes
    monkeypatch.setattr(block, decision, lambda *maps: False)
    for own, usual in zip(found, gradients(block.linear, tensors[:3]) + gradients(block.mlp, tensors), strict=True):
        assert own.dtype == usual.dtype and own.shape == usual.shape
        assert (own.float() - usual.float()).norm() <= 5e-3 * usual.float().norm()
    monkeypatch.setattr(block, decision, decide)


# Tokens, channels, hidden channels: a part that is not full; chunks of two parts and a bit; channels of several blocks.
MLPS = [(300, 32, 96), (4300, 64, 128), (6200, 96, 384), (2100, 576, 1120)]


def mlp_operands(tokens: int, channels: int, hidden: int, dtype: torch.dtype) -> list[Tensor]:
    """x, both weights and biases, and a gradient of the output."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = (tokens, channels), (hidden, channels), (hidden,), (channels, hidden), (channels,), (tokens, channels)
    return [(torch.randn(s, generator=generator) / (s[-1] ** 0.5 if len(s) == 2 else 1)).to(dtype) for s in shapes]


@pytest.fixture
def by_vectors(dtype: torch.dtype) -> torch.dtype:
    if torch.ops.swinv2_scale.products(dtype) != "vectors":
        pytest.skip("MLPs are one operator only where products are by vectors")
    return dtype


@pytest.mark.parametrize("shape", MLPS, ids=str)
def test_an_mlp_in_one_operator_is_its_parts(shape: tuple[int, int, int], by_vectors: torch.dtype) -> None:
    """Bit by bit, whether it keeps the hidden map or not, at any number of threads."""
    operators, before = torch.ops.swinv2_scale, torch.get_num_threads()
    x, weight1, bias1, weight2, bias2, grad = mlp_operands(*shape, by_vectors)
    hidden = operators.linear_forward(x, weight1, bias1)
    out = operators.linear_forward(operators.gelu_forward(hidden), weight2, bias2)
    slope = operators.linear_backward(grad, weight2)
    activated, _ = operators.gelu_backward(slope, hidden)
    of_second, of_first = operators.weight_gradient(grad, activated), operators.weight_gradient(slope, x)
    expected = [out, hidden, out, operators.linear_backward(slope, weight1), *of_first, *of_second]
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found = list(operators.mlp_forward(x, weight1, bias1, weight2, bias2, True))
        lean, nothing = operators.mlp_forward(x, weight1, bias1, weight2, bias2, False)
        found += [lean, *operators.mlp_backward(grad, x, hidden, weight1, weight2)]
        torch.set_num_threads(before)
        assert nothing.numel() == 0
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other), threads


def test_an_mlp_is_one_operator_where_threads_have_enough_tokens(
    by_vectors: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward, with the results of its parts; and without its hidden map where there are no gradients."""
    before = torch.get_num_threads()
    for threads, tokens, forward, backward in [(2, 4096, 1, 1), (2, 1023, 0, 0), (2, 1024, 1, 0), (3, 4096, 1, 0)]:
        torch.set_num_threads(threads)
        *tensors, _ = mlp_operands(tokens, 64, 128, by_vectors)
        with torch.profiler.profile() as profile:
            found = gradients(block.mlp, tensors)
        torch.set_num_threads(before)
        names = [event.name.removeprefix("swinv2_scale::") for event in profile.events()]
        assert (names.count("mlp_forward"), names.count("mlp_backward")) == (forward, backward), (threads, tokens)
        with monkeypatch.context() as apart:
            apart.setattr(block, "_takes_mlp_gradient", lambda *maps: False)
            apart.setattr(
                block, "_takes_product", lambda *maps, decide=block._takes_product: len(maps) < 3 and decide(*maps)
            )
            expected = gradients(block.mlp, tensors)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        with torch.no_grad():
            assert torch.equal(block.mlp(*tensors), expected[0])


def test_an_mlp_that_does_not_fit_is_refused(by_vectors: torch.dtype) -> None:
    operators = torch.ops.swinv2_scale
    x, weight1, bias1, weight2, bias2, grad = mlp_operands(40, 32, 64, by_vectors)
    hidden = operators.linear_forward(x, weight1, bias1)
    with pytest.raises(RuntimeError, match="x has 64 channels, the weight 32"):
        operators.mlp_forward(hidden, weight1, bias1, weight2, bias2, True)
    with pytest.raises(RuntimeError, match="the hidden map has 64 channels, the weight 32"):
        operators.mlp_forward(x, weight1, bias1, weight1, bias1, True)
    with pytest.raises(RuntimeError, match="x, hidden and grad must have as many tokens"):
        operators.mlp_backward(grad, x[1:].contiguous(), hidden, weight1, weight2)
    with pytest.raises(RuntimeError, match="hidden has 32 channels, the weight 64"):
        operators.mlp_backward(grad, x, x, weight1, weight2)
    with pytest.raises(RuntimeError, match="grad has 64 channels, the weight 32"):
        operators.mlp_backward(hidden, x, hidden, weight1, weight2)
    with pytest.raises(RuntimeError, match="hidden must be contiguous, on the CPU and of the same type"):
        operators.mlp_backward(grad, x, hidden.double(), weight1, weight2)
    with pytest.raises(RuntimeError, match="no native products of maps of this type"):
        operators.mlp_forward(x.double(), weight1, bias1, weight2, bias2, True)
