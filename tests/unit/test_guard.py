"""Verdicts over sequences of steps, in one process."""

import math
import os
import signal
from typing import Any

import pytest
import torch

from swinv2_scale import signals
from swinv2_scale.guard import Guard, Verdict

pytestmark = pytest.mark.usefixtures("one_rank")
C, R, A = Verdict.CONTINUE, Verdict.ROLLBACK, Verdict.ABORT


def make(told: list[Any] | None = None, **changes: Any) -> Guard:
    settings: dict[str, Any] = {"nonfinite": "abort", "spike": None, "patience": 3, "rollbacks": 1}
    lines = [] if told is None else told
    return Guard(**{**settings, **changes}, tell=lambda step, text: lines.append((step, text)))


def verdicts(guard: Guard, steps: str, first: int = 1) -> list[Verdict]:
    """Of steps spelled x (not finite) and . (fine)."""
    losses = {"x": math.nan, ".": 1.0}
    return [guard.after(first + n, torch.tensor(losses[step]), step == ".") for n, step in enumerate(steps)]


@pytest.mark.parametrize(
    ("action", "steps", "expected"),
    [
        ("abort", "xx.xx.xxx", [C] * 8 + [A]),
        ("skip", "xxxxxxx", [C] * 7),
        ("rollback", "xxx.xxxxxx", [C, C, R, C, C, C, A, A, A, A]),
    ],
)
def test_steps_in_a_row(action: str, steps: str, expected: list[Verdict]) -> None:
    told: list[Any] = []
    guard = make(told, nonfinite=action)
    assert verdicts(guard, steps) == expected
    assert len(told) == steps.count("x")
    assert told[0][0] == 1 + steps.index("x") and told[0][1].endswith("loss by rank: nan")
    if expected[-1] is A:
        assert guard.cause == "3 steps in a row were not finite"


def spiky(guard: Guard, losses: list[float]) -> list[Verdict]:
    return [guard.after(number, torch.tensor(loss), True) for number, loss in enumerate(losses)]


def usual(steps: int) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    return (2.0 + 0.1 * torch.randn(steps, generator=generator)).tolist()


def test_a_loss_that_leaves_its_range_and_stays_there_is_rolled_back() -> None:
    guard = make(spike=8.0, patience=2)
    assert spiky(guard, usual(60)) == [C] * 60
    assert spiky(guard, [5.0, 2.0, 5.0, 2.1]) == [C] * 4  # single ones pass, and do not count as usual
    assert spiky(guard, [4.0, 4.0]) == [C, R]
    assert (
        guard.cause
        == f"the loss rose to 4, usual is {sorted(guard.state['losses'])[len(guard.state['losses']) // 2]:.4g}"
    )
    assert spiky(guard, usual(10)) == [C] * 10
    assert spiky(guard, [math.inf, 4.0]) == [C, A]


def test_the_beginning_a_slow_rise_and_a_fall_are_no_spikes() -> None:
    assert spiky(make(spike=8.0, patience=1), [*usual(30), 100.0, *usual(10)]) == [C] * 41
    rising = [loss + 0.002 * step for step, loss in enumerate(usual(1000))]
    assert set(spiky(make(spike=8.0, patience=1), rising)) == {C}
    assert set(spiky(make(spike=8.0, patience=1), usual(100) + [0.1] * 50)) == {C}
    assert set(spiky(make(spike=None, patience=1), usual(100) + [50.0] * 50)) == {C}


def test_a_guard_goes_on_from_its_state() -> None:
    losses = [*usual(70), 5.0, 5.0, 2.0]
    whole = make(spike=8.0, patience=3)
    spiky(whole, losses)
    for cut in (10, 71, 72):
        first, second = make(spike=8.0, patience=3), make(spike=8.0, patience=3)
        spiky(first, losses[:cut])
        second.state = first.state
        spiky(second, losses[cut:])
        assert second.state == whole.state


@pytest.mark.parametrize("number", signals.STOPPING)
def test_a_signal_stops_at_the_next_step(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_received", [])
    before = signal.getsignal(number)
    try:
        signals.listen()
        guard = make()
        assert verdicts(guard, "..") == [C, C]
        os.kill(os.getpid(), number)
        assert verdicts(guard, "x") == [Verdict.STOP]
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nonfinite": "ignore"}, "must be skip, rollback or abort, got 'ignore'"),
        ({"patience": 0}, "guard.patience=0 must be 1 or more"),
        ({"rollbacks": -1}, "guard.rollbacks=-1 0 or more"),
        ({"spike": 0.0}, "guard.spike=0.0 positive or null"),
    ],
)
def test_settings_that_cannot_work(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_a_loss_scale_that_is_still_sought_does_not_count() -> None:
    told: list[Any] = []
    guard = make(told)
    assert [guard.after(step, torch.tensor(1.0), False, True) for step in range(9)] == [C] * 9
    assert told[0] == (0, "gradients are too large for the loss scale, halved; skipped; loss by rank: 1")
    assert [guard.after(step, torch.tensor(math.nan), False, True) for step in range(3)] == [C, C, A]
