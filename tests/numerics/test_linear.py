"""The native products of a linear layer and its gradients against float64, and where layers take them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from swinv2_scale.ops import block, native

pytestmark = [
    pytest.mark.skipif("cpu" in native.missing, reason=native.missing.get("cpu", "")),
    pytest.mark.skipif(
        "cpu" not in native.missing and not torch.ops.swinv2_scale.has_tiles(),
        reason="the processor is without AMX, or SWINV2_SCALE_INSTRUCTION_SET leaves it out",
    ),
]

# Rows, inputs, outputs: one row, a part of a square, a row more than squares have; panels of more than one block; one
# step of inputs, and so many that their tiles are asked for; chunks of one strip and of several.
PRODUCTS = [(1, 32, 32), (33, 96, 64), (300, 544, 1088), (700, 2048, 512), (2304, 512, 96), (31, 1024, 1568)]
# Tokens, outputs, inputs: tiles that are not full, several blocks of tokens and chunks, blocks of either map's channels
# that are not full, x as the left map and grad as the left map, and maps of one token.
SHAPES = [(1, 32, 32), (31, 96, 32), (33, 32, 96), (545, 288, 96), (700, 1056, 64), (300, 1184, 544), (4700, 224, 224)]
SHAPES += [(4099, 576, 32), (4200, 544, 544)]


def maps(tokens: int, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    grad = torch.randn(tokens, outputs, generator=generator) + torch.arange(outputs) / outputs
    return grad.bfloat16(), torch.randn(tokens, inputs, generator=generator).bfloat16()


def operands(rows: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, a weight and a bias."""
    generator = torch.Generator().manual_seed(rows)
    x, weight, bias = (
        torch.randn(shape, generator=generator) for shape in [(rows, inputs), (outputs, inputs), (outputs,)]
    )
    return x.bfloat16(), (weight / inputs**0.5).bfloat16(), bias.bfloat16()


@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_products_are_those_of_float64(shape: tuple[int, int, int]) -> None:
    """To the rounding of bfloat16, with a bias and without, and of the transposed weight."""
    x, weight, bias = operands(*shape)
    exact = x.double() @ weight.double().t()
    transposed = weight.t().contiguous()
    for found, true in (
        (torch.ops.swinv2_scale.linear_forward(x, weight, bias), exact + bias.double()),
        (torch.ops.swinv2_scale.linear_forward(x, weight, None), exact),
        (torch.ops.swinv2_scale.linear_backward(x, transposed), exact),
    ):
        assert found.dtype == torch.bfloat16 and found.shape == true.shape
        assert ((found.double() - true).abs() <= 2**-8 * true.abs() + 1e-5).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_those_of_float64(shape: tuple[int, int, int]) -> None:
    """The weight's to the rounding of bfloat16, the bias's to that of float32."""
    grad, x = maps(*shape)
    of_weight, of_bias = torch.ops.swinv2_scale.weight_gradient(grad, x)
    exact = grad.double().t() @ x.double()
    largest = exact.abs().max()
    assert of_weight.dtype == torch.bfloat16 and of_bias.dtype == torch.float32
    assert ((of_weight.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5 * largest).all()
    total = grad.double().sum(0)
    assert ((of_bias.double() - total).abs() <= 1e-5 * grad.double().abs().sum(0)).all()


def test_neither_threads_nor_repetition_change_a_bit() -> None:
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 7, 8, 2):  # which cut the result into other blocks; into eight of which one is empty
        torch.set_num_threads(threads)
        products = [torch.ops.swinv2_scale.linear_forward(*operands(*shape)) for shape in PRODUCTS]
        gradients = [torch.ops.swinv2_scale.weight_gradient(*maps(*shape)) for shape in SHAPES]
        found.append([*products, *(each for pair in gradients for each in pair)])
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_what_does_not_fit_is_refused() -> None:
    operators = torch.ops.swinv2_scale
    grad, x = maps(40, 64, 32)
    with pytest.raises(RuntimeError, match="multiple of 32"):
        operators.weight_gradient(grad[:, :48].contiguous(), x)
    with pytest.raises(RuntimeError, match="x has 39 tokens, grad 40"):
        operators.weight_gradient(grad, x[1:])
    with pytest.raises(RuntimeError, match="grad must be bfloat16"):
        operators.weight_gradient(grad.float(), x)
    with pytest.raises(RuntimeError, match="contiguous"):
        operators.weight_gradient(grad[:, :32], x)
    x, weight, bias = operands(40, 64, 96)
    with pytest.raises(RuntimeError, match="x has 64 channels, the weight 96"):
        operators.linear_backward(x, weight)
    with pytest.raises(RuntimeError, match="bias must be 96 numbers"):
        operators.linear_forward(x, weight, bias[:64])
    with pytest.raises(RuntimeError, match="weight must be bfloat16"):
        operators.linear_forward(x, weight.float(), bias)
    with pytest.raises(RuntimeError, match="weight must have a multiple of 32 channels in both"):
        operators.linear_forward(x, weight[:40], bias[:40])


def gradients(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


@pytest.mark.parametrize(
    ("tokens", "taken"), [(16, True), (15, False)], ids=["half as many tokens as channels", "fewer"]
)
def test_layers_take_gradients_of_maps_longer_than_wide(
    tokens: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A linear layer once, an MLP twice; and gradients are those that they have without."""
    check_layers("_takes_gradient", (1, tokens, 32, 64), [taken] * 3, monkeypatch)


@pytest.mark.parametrize(
    ("tokens", "inputs", "hidden", "taken"),
    [
        (1024, 512, 1024, [True] * 6),
        (1023, 512, 1024, [True, False, True, False, True, False]),  # wider than long: the hidden map, which three read
        (1024, 480, 512, [False] * 6),
        (1024, 4096, 512, [False, True] * 3),
    ],
    ids=["all", "few tokens", "narrow", "wide"],
)
def test_layers_take_products_of_long_maps(
    tokens: int, inputs: int, hidden: int, taken: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the forward pass and of the gradients of maps."""
    check_layers("_takes_product", (1, tokens, inputs, hidden), taken, monkeypatch)


def check_layers(
    decision: str, sizes: tuple[int, int, int, int], taken: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, tokens, inputs, hidden = sizes
    shapes = [(images, tokens, inputs), (hidden, inputs), (hidden,), (inputs, hidden), (inputs,)]
    tensors = [(torch.randn(shape) / shape[-1] ** 0.5).bfloat16() for shape in shapes]
    calls: list[bool] = []
    decide = getattr(block, decision)
    monkeypatch.setattr(block, decision, lambda *maps: calls.append(decide(*maps)) or calls[-1])
    found = gradients(block.linear, tensors[:3]) + gradients(block.mlp, tensors)
    assert calls == taken
    monkeypatch.setattr(block, decision, lambda *maps: False)
    for own, usual in zip(found, gradients(block.linear, tensors[:3]) + gradients(block.mlp, tensors), strict=True):
        assert own.dtype == usual.dtype and own.shape == usual.shape
        assert (own.float() - usual.float()).norm() <= 5e-3 * usual.float().norm()
