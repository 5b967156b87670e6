"""What goes wrong while ranks train, numbers, signals, deaths: what was promised happens, and nothing is lost."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from real_runs import Run, kill_all

from swinv2_scale.signals import EXIT_CODE

Launch = Callable[..., Run]
STEPS = 12


def settings(shards: Path) -> list[str]:
    """12 steps of 20 photographs, 9 to an epoch, saved after every fourth."""
    return [
        f"data.train={shards}/photographs/train",
        f"steps={STEPS}",
        "epochs=null",
        "global_batch=20",
        "micro_batch=10",
        "precision=fp32",
        "checkpoint_every=4",
    ]


def injected(launch: Launch, shards: Path, name: str, faults: str, *more: str) -> Run:
    """Faults on rank 1 of two."""
    environment = {
        "INJECT": faults,
        "INJECT_RANK": "1",
        "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}",
    }
    task = "task._target_=injected.Injected"
    return launch(name, *settings(shards), task, *more, ranks=2, environment=environment)


def test_one_rank_without_finite_gradients_is_a_skipped_step_of_all(launch: Launch, shards: Path) -> None:
    run = injected(launch, shards, "skip", "3:nan 4:inf 7:nan 8:inf 9:nan", "guard.nonfinite=skip")
    assert run.returncode == 0, run.output
    assert sorted(run.events("skipped")) == [4, 5, 8, 9, 10]
    assert all("not finite" in event["text"] for event in run.events("skipped").values())
    skipped = {step: event["skipped"] for step, event in run.events("train").items()}
    assert [step for step, count in skipped.items() if count] == [4, 5, 8, 9, 10]
    rates = [event["learning_rate"] for _, event in sorted(run.events("train").items())]
    plain = launch("plain", *settings(shards), ranks=2)
    assert rates == [event["learning_rate"] for _, event in sorted(plain.events("train").items())]
    assert run.losses()[:3] == plain.losses()[:3] and run.losses()[5] != plain.losses()[5]


@pytest.mark.long
def test_a_slow_rank_can_be_told_from_one_that_waits_for_it(launch: Launch, shards: Path) -> None:
    run = injected(launch, shards, "slow", "1:slow 2:slow", "steps=4")
    assert run.returncode == 0, run.output
    for step, line in run.events("train").items():
        slow = step in (2, 3)
        assert (line["forward_seconds_max"] - line["forward_seconds_min"] > 0.5) == slow, line
        assert line["slowest_rank"] == 1 or not slow


@pytest.mark.long
def test_three_in_a_row_abort_or_roll_back(launch: Launch, shards: Path) -> None:
    faults = "5:nan 6:nan 7:nan"
    aborted = injected(launch, shards, "abort", faults)
    assert aborted.returncode != 0
    assert "3 steps in a row were not finite before step 8; the last checkpoint is from before" in aborted.output
    assert [path.name for path in sorted((aborted.directory / "checkpoints").glob("step_*"))] == ["step_00000004"]
    rolled = injected(launch, shards, "roll", faults, "guard.nonfinite=rollback")
    assert rolled.returncode == 0, rolled.output
    assert "back to step_00000004, on with the batches after step 8" in rolled.output
    assert list(rolled.events("rollback")) == [8]
    assert len(rolled.events("train")) == STEPS
    early = injected(launch, shards, "early", "0:nan 1:nan 2:nan", "guard.nonfinite=rollback")
    assert early.returncode != 0 and "there is no checkpoint yet to roll back to" in early.output


@pytest.mark.parametrize(
    ("number", "launcher", "ranks"),
    [pytest.param(signal.SIGTERM, "python", 1, marks=pytest.mark.long), (signal.SIGUSR2, "deepspeed", 2)],
)
def test_a_signal_to_one_rank_saves_once_and_the_run_goes_on(
    launch: Launch, shards: Path, number: signal.Signals, launcher: str, ranks: int
) -> None:
    def strike(processes: list[int]) -> None:
        assert len(processes) == ranks
        os.kill(processes[-1], number)

    begin = time.monotonic()
    cut = launch("run", *settings(shards), ranks=ranks, launcher=launcher, at=(5, strike))
    assert cut.returncode == EXIT_CODE, cut.output
    stopped = max(cut.events("train"))
    assert 5 <= stopped < STEPS and time.monotonic() - begin < 240
    assert sorted(cut.events("checkpoint"))[-1] == stopped and f"signalled at step {stopped}, saved" in cut.output
    assert cut.events("end")[stopped]["reason"].startswith("Stopped: signalled")
    continued = launch("run", *settings(shards), ranks=ranks, launcher=launcher)
    assert f"at step {stopped}" in continued.output
    whole = launch("whole", *settings(shards), ranks=ranks)
    assert continued.losses() == whole.losses()


@pytest.mark.long
@pytest.mark.parametrize(("meanwhile", "at"), [("saving", 4), ("evaluating", 6)])
def test_a_signal_while_saving_or_evaluating_waits_for_its_end(
    launch: Launch, shards: Path, meanwhile: str, at: int
) -> None:
    """The step is in the record before either begins: the signal comes right after."""

    def strike(processes: list[int]) -> None:
        time.sleep(0.1 * (meanwhile == "evaluating"))
        os.kill(processes[1], signal.SIGTERM)

    validation = f"data.validation={shards}/photographs/validation"
    more = [validation, "evaluate_every=6", "evaluation_batch=1", "steps=100"]
    started = {"ranks": 2, "launcher": "deepspeed"}
    cut = launch("run", *settings(shards), *more, **started, at=(at, strike))
    assert cut.returncode == EXIT_CODE, cut.output
    stopped = max(cut.events("train"))
    assert at < stopped <= at + 2
    saved = [line["step"] for line in cut.record() if line["event"] == "checkpoint"]
    assert saved == sorted({*range(4, stopped, 4), stopped})
    assert sorted(cut.events("evaluation")) == ([6] if meanwhile == "evaluating" else [])
    assert cut.events("end")[stopped]["reason"].startswith(f"Stopped: signalled at step {stopped}, saved")


@pytest.mark.long
def test_moments_pass_from_world_to_world_and_stage_to_stage(launch: Launch, shards: Path) -> None:
    """Two ranks under ZeRO 1, one under ZeRO 3, two under ZeRO 2: to rounding what two under ZeRO 1 do alone."""
    average = "optim.ema_decay=0.9"
    whole = launch("whole", *settings(shards), average, ranks=2)
    attempts = [(2, "zero1", 5), (1, "zero3", 9), (2, "zero2", None)]
    for number, (ranks, parallel, killed) in enumerate(attempts):
        at = None if killed is None else (killed, kill_all)
        run = launch("run", *settings(shards), average, f"parallel={parallel}", ranks=ranks, at=at)
        assert f"at step {4 * number}" in run.output or number == 0, run.output
    assert run.returncode == 0, run.output
    assert run.losses() == pytest.approx(whole.losses(), rel=1e-5)
    expected, found = whole.weights(), run.weights()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name.startswith(("optimizer.exp_avg.", "ema.")) and value.norm() > 1e-6:
            assert (found[name] - value).norm() < 0.01 * value.norm(), name


@pytest.mark.parametrize("victim", ["rank", pytest.param("worker", marks=pytest.mark.long)])
def test_a_killed_process_ends_the_run_soon_and_the_rest_is_kept(launch: Launch, shards: Path, victim: str) -> None:
    struck: list[float] = []

    def strike(processes: list[int]) -> None:
        struck.append(time.monotonic())
        target = processes[1]
        if victim == "worker":
            target = int(Path(f"/proc/{target}/task/{target}/children").read_text().split()[-1])
        os.kill(target, signal.SIGKILL)

    more = ["workers=1", "steps=400", "log_every=1"]
    cut = launch("run", *settings(shards), *more, ranks=2, at=(5, strike))
    assert cut.returncode != 0
    assert time.monotonic() - struck[0] < 120
    if victim == "worker":
        assert "DataLoader worker" in cut.output and "killed by signal" in cut.output
    saved = int(max((cut.directory / "checkpoints").glob("step_*")).name.removeprefix("step_"))
    continued = launch("run", *settings(shards), f"steps={saved + 2}", "workers=1", ranks=2)
    assert continued.returncode == 0 and f"at step {saved}" in continued.output, continued.output


@pytest.mark.long
def test_a_rank_that_stands_still_ends_the_run_with_the_stacks_of_all(launch: Launch, shards: Path) -> None:
    begin = time.monotonic()
    run = injected(launch, shards, "stall", "5:hang", "stall_minutes=0.05", "timeout_minutes=2.0")
    assert run.returncode != 0 and time.monotonic() - begin < 60
    waiting, hanging = ((run.directory / "heartbeat" / f"rank_{rank}.txt").read_text() for rank in (0, 1))
    assert all("UTC, step 5, training" in text.splitlines()[0] for text in (waiting, hanging))
    assert "injected.py" in hanging and "Timeout" in hanging
    assert "injected.py" not in waiting and "engine.py" in waiting
    refused = launch("refused", *settings(shards), "stall_minutes=30")
    assert refused.returncode == 2
    assert "stall_minutes=30 must be positive and less than timeout_minutes=20.0" in refused.output
    finished = launch("finished", *settings(shards))
    assert (finished.directory / "heartbeat/rank_0.txt").read_text().strip() == "finished"
