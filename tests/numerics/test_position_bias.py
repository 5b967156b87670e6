"""The native table of position biases and its gradients against float64, in every instruction set."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from swinv2_scale.models import position_bias
from swinv2_scale.models.position_bias import PositionBias, relative_coordinates
from swinv2_scale.ops import native, selfcheck_block
from swinv2_scale.ops.position_bias import bias_table, composed_bias_table, is_native

pytestmark = pytest.mark.skipif("cpu" in native.missing, reason="no native kernels: " + native.missing.get("cpu", ""))
CASES = [  # window, heads: parts of a vector of offsets, of a group of heads, and several
    ((1, 1), 1),
    ((2, 3), 3),
    ((7, 7), 16),
    ((12, 12), 33),
    ((2, 4, 5), 20),
]
CPU = torch.device("cpu")


@pytest.fixture(params=[] if "cpu" in native.missing else native.instruction_sets())
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(native.FORCE, request.param)
    return request.param


def draw(window: Sequence[int], heads: int, hidden: int = 48, size: float = 1.0) -> list[Tensor]:
    """Coordinates and weights."""
    generator = torch.Generator().manual_seed(heads)
    shapes = (hidden, len(window)), (hidden,), (heads, hidden)
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    return [relative_coordinates(window, window, CPU).flatten(0, -2), *weights[:2], size * weights[2] / 7]


def results(function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """The table, and the gradients of all weights."""
    coordinates, *weights = tensors
    leaves = [weight.clone().requires_grad_() for weight in weights]
    out = function(coordinates, *leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("size", [1.0, 100.0], ids=["usual", "saturated"])
@pytest.mark.parametrize(("window", "heads"), CASES)
def test_errors_are_those_of_the_composition(window: Sequence[int], heads: int, size: float) -> None:
    """Against float64: at most three times those of PyTorch's functions, and what float32 can tell of the largest."""
    tensors = draw(window, heads, size=size)
    exact = results(composed_bias_table, [tensor.double() for tensor in tensors])
    found, usual = results(bias_table, tensors), results(composed_bias_table, tensors)
    for ours, theirs, true in zip(found, usual, exact, strict=True):
        assert ours.shape == true.shape and ours.isfinite().all()
        allowed = 3 * (theirs - true).abs().max() + 4 * torch.finfo(torch.float32).eps * true.abs().max()
        assert (ours - true).abs().max() <= allowed


@pytest.mark.usefixtures("instruction_set")
def test_a_unit_at_zero_has_no_gradient() -> None:
    """As PyTorch's ReLU: neither its weights nor, being zero, what it passes on."""
    coordinates, weight1, bias1, weight2 = draw((3, 3), 4)
    weight1[:20], bias1[:20] = 0.0, 0.0
    _, of_weight1, of_bias1, of_weight2 = results(bias_table, [coordinates, weight1, bias1, weight2])
    assert not of_weight1[:20].any() and not of_bias1[:20].any() and not of_weight2[:, :20].any()
    assert of_weight1[20:].any() and of_bias1[20:].any() and of_weight2[:, 20:].any()


@pytest.mark.usefixtures("instruction_set")
def test_what_is_not_a_number_is_seen() -> None:
    coordinates, weight1, bias1, weight2 = draw((3, 3), 4)
    weight1[7, 0] = float("nan")
    assert bias_table(coordinates, weight1, bias1, weight2).isnan().all()


@pytest.mark.usefixtures("instruction_set")
def test_runs_are_equal_whatever_the_threads() -> None:
    tensors, threads, runs = draw((12, 12), 33), torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        runs.append(results(bias_table, tensors))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


def test_only_the_table_is_kept() -> None:
    coordinates, *weights = draw((7, 7), 3)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)) or x, lambda x: x):
        bias_table(coordinates, *(weight.requires_grad_() for weight in weights))
    assert kept == [(3, 169), (169, 2), (48, 2), (48,), (3, 48)]


def test_what_the_operator_does_not_take_goes_to_pytorch() -> None:
    coordinates, weight1, bias1, weight2 = draw((3, 3), 4)
    assert is_native(weight1, bias1, weight2)
    for other in (
        [tensor.double() for tensor in (weight1, bias1, weight2)],
        [weight1[:40], bias1[:40], weight2[:, :40].contiguous()],
        [weight1, bias1, weight2.t().contiguous().t()],
        [weight1, bias1, weight2.repeat(65, 1)],
    ):
        assert not is_native(*other)
        table = bias_table(coordinates.to(other[0].dtype), *other)
        assert table.shape == (len(other[2]), 25)
    with pytest.raises(RuntimeError, match="weight1 has 48 elements, not 96"):
        torch.ops.swinv2_scale.position_bias_forward(coordinates, weight1[:24], bias1, weight2)
    with pytest.raises(RuntimeError, match="a multiple of 16 hidden units"):
        torch.ops.swinv2_scale.position_bias_forward(
            coordinates, weight1[:40], bias1[:40], weight2[:, :40].contiguous()
        )


def test_coordinates_are_those_of_training_though_evaluation_came_first() -> None:
    """They are computed once; tensors of inference mode could not be differentiated with."""
    position_bias._known.clear()
    bias = PositionBias(3)
    with torch.inference_mode():
        first = bias((5, 6), (5, 6))
    second = bias((5, 6), (5, 6))
    second.sum().backward()
    assert torch.equal(first, second) and bias[0].weight.grad is not None
    assert len(position_bias._known) == 1
    assert not torch.equal(bias((5, 6), (3, 3)), second)


def test_coordinates_of_a_fake_mode_are_not_kept() -> None:
    position_bias._known.clear()
    with FakeTensorMode():
        position_bias._known_coordinates((2, 2), (2, 2), "log")
    assert type(position_bias._known_coordinates((2, 2), (2, 2), "log")) is Tensor


@pytest.mark.parametrize("wrong", range(4), ids=lambda number: selfcheck_block.TABLE[number])
def test_the_self_check_notices(wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(check.passed for check in selfcheck_block.compare_table())
    right = selfcheck_block.native_table

    def table(*tensors: Tensor) -> list[Tensor]:
        found = right(*tensors)
        found[wrong] = found[wrong] * 1.0001
        return found

    monkeypatch.setattr(selfcheck_block, "native_table", table)
    failed = [check.tensor for check in selfcheck_block.compare_table() if not check.passed]
    assert failed == [selfcheck_block.TABLE[wrong]]
