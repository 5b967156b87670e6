"""The self-check passes the kernel that is here, and refuses every way of being wrong."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from swinv2_scale.ops import native, selfcheck
from swinv2_scale.ops.selfcheck import Case

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif("cpu" in native.missing, reason=native.missing.get("cpu", ""))
right = native.cosine_window_attention


def refusal(monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., Tensor]) -> str:
    monkeypatch.setattr(native, "cosine_window_attention", kernel)
    with pytest.raises(ValueError, match="cpu attention kernel fails its self-check at window") as error:
        selfcheck.check_kernel(CPU)
    assert "memory.attention=reference" in str(error.value)
    return str(error.value)


def test_the_kernel_passes() -> None:
    selfcheck.check_kernel(CPU)


def test_wrong_values_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    message = refusal(monkeypatch, lambda *inputs: right(*inputs) * (1 + 1e-4))
    assert "window 7x9 on 10x11 shifted" in message and "float32, out: error" in message and "budget" in message


def test_values_wrong_in_one_type_or_window_only_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(qkv: Tensor, *rest) -> Tensor:
        out = right(qkv, *rest)
        return out * 1.02 if qkv.dtype == torch.bfloat16 and qkv.dim() == 6 + 1 else out

    message = refusal(monkeypatch, wrong)
    assert "window 2x7x7" in message and "bfloat16, out" in message


@pytest.mark.parametrize("place", range(3))
def test_wrong_gradients_are_refused(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*inputs) -> Tensor:
        changed = list(inputs)
        x = changed[place]
        changed[place] = x.detach() + 1.05 * (x - x.detach())  # the same value, another gradient
        return right(*changed)

    message = refusal(monkeypatch, wrong)
    assert f"float32, gradient of {selfcheck.TENSORS[1 + place]}: error" in message


def test_a_second_run_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = itertools.count()

    def wrong(*inputs) -> Tensor:
        out = right(*inputs)
        return out + 1e-7 * (next(runs) % 2)

    assert "second run: error 1" in refusal(monkeypatch, wrong)


def test_results_that_are_not_finite_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "out: error nan" in refusal(monkeypatch, lambda *inputs: right(*inputs).clone().fill_(math.nan))


def test_a_kernel_that_raises_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*inputs) -> Tensor:
        raise RuntimeError("CUDA error: no kernel image is available\nfor execution on the device")

    assert "float32, out: CUDA error: no kernel image is available. " in refusal(monkeypatch, wrong)


@pytest.mark.parametrize(
    ("width", "scales"), [(8, (0.0, 0.0)), (32, (2.3, 2.3)), (64, selfcheck.ONE_TO_CLAMP)], ids=str
)
def test_the_error_of_a_scales_gradient_is_foreseen(width: int, scales: tuple[float, float]) -> None:
    """In the mean over many draws, where it is no luck."""
    case = Case((4, 4), (9, 10), heads=3, width=width, scales=scales)
    draws = [selfcheck.draw(case, torch.bfloat16, CPU, seed) for seed in range(40)]
    errors = [(draw.plain[2].double() - draw.exact[2]).square().mean() for draw in draws]
    assert 0.4 < selfcheck.scale_noise(case, draws) / torch.stack(errors).mean().sqrt() < 2.5


def test_the_matrix_crosses_every_boundary() -> None:
    cases = selfcheck.matrix()
    squares = [(w, w) for w in (1, 2, 3, 5, 7, 8, 12, 16, 24, 32, 48)]
    assert {case.window for case in cases} >= {*squares, (7, 9), (1, 8), (2, 7, 7), (8, 16, 16)}
    assert {case.width for case in cases} >= {8, 32, 64, 128}
    assert {case.batch for case in cases} >= {1, 3} and {case.shifted for case in cases} == {True, False}
    assert {case.mask_value for case in cases} == {-100.0, -math.inf} and 1.0 in {case.zeros for case in cases}
    assert {case.scales for case in cases} >= {(0.0, 0.0), (4.7, 4.7), selfcheck.ONE_TO_CLAMP}
    divided = {all(g % w == 0 for g, w in zip(case.grid, case.window, strict=True)) for case in cases}
    assert divided == {True, False}
    assert len({str(case) for case in cases}) == len(cases)
