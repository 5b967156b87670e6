"""The native step of AdamW and the sum of a gradient's squares against float64, in every instruction set."""

import pytest
import torch
from torch import Tensor

from swinv2_scale.ops import adamw, native, selfcheck_block

pytestmark = pytest.mark.skipif("cpu" in native.missing, reason="no native kernels: " + native.missing.get("cpu", ""))
SIZES = (1, 15, 16, 17, 33, 70_001)  # parts of a vector, and more than one part of a sum
SETTINGS = {"lr": 3e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.05}
TYPES = [(dtype, dtype) for dtype in native.TYPES] + [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]


@pytest.fixture(params=[] if "cpu" in native.missing else native.instruction_sets())
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(native.FORCE, request.param)
    return request.param


def gradients(size: int, dtype: torch.dtype, count: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(size)
    return [(torch.randn(size, generator=generator) / 8).to(dtype) for _ in range(count)]


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize(("trains", "kind"), TYPES)
@pytest.mark.parametrize("size", SIZES)
def test_steps_are_those_of_float64(size: int, trains: torch.dtype, kind: torch.dtype) -> None:
    """Three of them, with gradients that count 1/4, to what rounding of float32 leaves. What lies behind the
    last weight is not touched."""
    weights = torch.linspace(-1, 1, size)
    expected = torch.nn.Parameter(weights.double())
    reference = torch.optim.AdamW([expected], **SETTINGS)
    padded = torch.full((4, size + 1), 7.0)
    padded[0, :size], padded[1:3, :size] = weights, 0.0
    ours, mean, square, _ = padded[:, :size]
    trained = torch.full((size + 1,), 7.0, dtype=trains)
    for steps, gradient in enumerate(gradients(size, kind, 3), 1):
        adamw.step(ours, mean, square, trained[:size], gradient, scale=0.25, steps=steps, **SETTINGS)
        expected.grad = gradient.double() / 4
        reference.step()
    state = reference.state[expected]
    torch.testing.assert_close(ours.double(), expected.detach(), rtol=0, atol=3e-7)
    torch.testing.assert_close(mean.double(), state["exp_avg"], rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(square.double(), state["exp_avg_sq"], rtol=2e-6, atol=1e-12)
    assert torch.equal(trained[:size], ours.to(trains))
    assert (padded[:, size] == 7).all() and trained[size] == 7


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("kind", native.TYPES)
@pytest.mark.parametrize("size", SIZES)
def test_squares_are_those_of_float64_at_any_number_of_threads(size: int, kind: torch.dtype) -> None:
    (values,) = gradients(size, kind)
    threads, sums = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        sums.append(adamw.sum_of_squares(values))
    torch.set_num_threads(threads)
    assert sums[0] == sums[1] == sums[2]
    torch.testing.assert_close(sums[0], values.double().square().sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen(value: float) -> None:
    (values,) = gradients(70_001, torch.bfloat16)
    values[69_999] = value
    assert not adamw.sum_of_squares(values).isfinite()


def test_tensors_that_do_not_fit_are_told() -> None:
    good = {name: torch.zeros(8) for name in ("weights", "mean", "square", "trained", "gradient")}
    for name, wrong, message in (
        ("gradient", torch.zeros(8, dtype=torch.bfloat16), "a gradient must be float32 or of the type"),
        ("trained", torch.zeros(8, dtype=torch.float64), "weights must train in float32, bfloat16 or float16"),
        ("mean", torch.zeros(7), "mean has 7 elements, not 8"),
        ("square", torch.zeros(8, 2)[:, 0], "square must be contiguous"),
        ("weights", torch.zeros(8, dtype=torch.bfloat16), "weights has the wrong type"),
    ):
        with pytest.raises(RuntimeError, match=message):
            adamw.step(**good | {name: wrong}, scale=1.0, steps=1, **SETTINGS)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("kind", native.TYPES)
@pytest.mark.parametrize("wrong", range(3), ids=lambda number: selfcheck_block.STEP[number])
def test_the_self_check_sees_what_is_wrong(wrong: int, kind: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that is 1 % too long; 1 % too much of the weights that train, and of the sum."""
    assert all(check.passed for check in selfcheck_block.compare_step(kind))
    right = selfcheck_block.native_step

    def step(weights: Tensor, *others: Tensor) -> list[Tensor]:
        found = right(weights, *others)
        found[wrong] = found[wrong] + (0.01 * (found[0] - weights) if wrong == 0 else 0.01 * found[wrong])
        return found

    monkeypatch.setattr(selfcheck_block, "native_step", step)
    failed = [check.tensor for check in selfcheck_block.compare_step(kind) if not check.passed]
    assert failed == [selfcheck_block.STEP[wrong]]
