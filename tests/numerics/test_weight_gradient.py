"""The native gradient of a linear layer's weight and bias against float64, and where layers take it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from swinv2_scale.ops import block, native

pytestmark = [
    pytest.mark.skipif("cpu" in native.missing, reason=native.missing.get("cpu", "")),
    pytest.mark.skipif(
        "cpu" not in native.missing and not torch.ops.swinv2_scale.has_weight_gradient(),
        reason="the processor is without AMX, or SWINV2_SCALE_INSTRUCTION_SET leaves it out",
    ),
]

# Tokens, outputs, inputs: tiles that are not full, several blocks of tokens and chunks, blocks of either map's channels
# that are not full, x as the left map and grad as the left map, and maps of one token.
SHAPES = [(1, 32, 32), (31, 96, 32), (33, 32, 96), (545, 288, 96), (700, 1056, 64), (300, 1184, 544), (4700, 224, 224)]
SHAPES += [(4099, 576, 32), (4200, 544, 544)]


def maps(tokens: int, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    grad = torch.randn(tokens, outputs, generator=generator) + torch.arange(outputs) / outputs
    return grad.bfloat16(), torch.randn(tokens, inputs, generator=generator).bfloat16()


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
        found.append([torch.ops.swinv2_scale.weight_gradient(*maps(*shape)) for shape in SHAPES])
    torch.set_num_threads(before)
    for other in found[1:]:
        for (a, b), (c, d) in zip(found[0], other, strict=True):
            assert torch.equal(a, c) and torch.equal(b, d)


def test_what_does_not_fit_is_refused() -> None:
    operator = torch.ops.swinv2_scale.weight_gradient
    grad, x = maps(40, 64, 32)
    with pytest.raises(RuntimeError, match="multiple of 32"):
        operator(grad[:, :48].contiguous(), x)
    with pytest.raises(RuntimeError, match="x has 39 tokens, grad 40"):
        operator(grad, x[1:])
    with pytest.raises(RuntimeError, match="grad must be bfloat16"):
        operator(grad.float(), x)
    with pytest.raises(RuntimeError, match="contiguous"):
        operator(grad[:, :32], x)


@pytest.mark.parametrize(("tokens", "taken"), [(32, True), (31, False)], ids=["as many tokens as channels", "fewer"])
def test_layers_take_it_for_maps_longer_than_wide(tokens: int, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A linear layer once, an MLP twice; and gradients are those that they have without."""
    shapes = [(1, tokens, 32), (64, 32), (64,), (32, 64), (32,)]
    tensors = [(torch.randn(shape) / shape[-1] ** 0.5).bfloat16() for shape in shapes]

    def gradients(function: Callable[..., Tensor], count: int) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in tensors[:count]]
        return list(torch.autograd.grad(function(*leaves).square().sum(), leaves))

    calls = []
    taken_by_layers = block._takes_tiles
    monkeypatch.setattr(block, "_takes_tiles", lambda *maps: calls.append(taken_by_layers(*maps)) or calls[-1])
    found = gradients(block.linear, 3) + gradients(block.mlp, 5)
    assert calls == [taken] * 3
    monkeypatch.setattr(block, "_takes_tiles", lambda *maps: False)
    for own, usual in zip(found, gradients(block.linear, 3) + gradients(block.mlp, 5), strict=True):
        assert own.dtype == usual.dtype and own.shape == usual.shape
        assert (own.float() - usual.float()).norm() <= 5e-3 * usual.float().norm()
