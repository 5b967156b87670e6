"""The record: what is written, what a crash leaves, what a failing sink costs (nothing), what NaN does."""

import json
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from swinv2_scale.report import headline, write_report
from swinv2_scale.telemetry import Picture, Telemetry, read_record, upload

pytestmark = pytest.mark.usefixtures("one_rank")


def telemetry(run_dir: Path, wandb: str = "disabled", tensorboard: bool = False) -> Telemetry:
    return Telemetry(
        run_dir,
        name="x",
        total_steps=10,
        steps_per_epoch=5,
        images_per_step=8,
        wandb=wandb,
        project="p",
        tensorboard=tensorboard,
        config={"name": "x"},
    )


def record(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_steps_are_averaged_and_samples_that_were_replaced_are_named(tmp_path: Path) -> None:
    t = telemetry(tmp_path)
    t.start(0, world_size=1)
    for batch in t.timed([{"corrupt": [], "reads": [{"read_retries": 2}]}, {"corrupt": ["a.tar:7: cut"], "reads": []}]):
        assert "corrupt" in batch
    t.step(torch.tensor(1.0), applied=True)
    t.step(torch.tensor(2.0), applied=True)
    t.train(2, learning_rate=0.5, gradient_norm=None)
    t.end("finished")
    start, train, corrupt, end = record(tmp_path)
    assert (start["event"], start["attempt"]) == ("start", 0)
    assert (train["step"], train["loss"], train["epoch"], train["gradient_norm"]) == (2, 1.5, 0.4, None)
    assert train["images_per_second"] == pytest.approx(8 / train["step_seconds"])
    assert 0 <= train["data_wait"] <= train["data_wait_max"] <= 1
    assert train["utilisation"] is None
    assert corrupt["sample"] == "a.tar:7: cut"
    assert end["reason"] == "finished"


def test_a_line_that_a_crash_cut_off_is_removed_by_the_next_attempt(tmp_path: Path) -> None:
    telemetry(tmp_path).start(0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "st')
    again = telemetry(tmp_path)
    again.start(0)
    assert [(line["event"], line["attempt"]) for line in record(tmp_path)] == [("start", 0), ("start", 1)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_skipped_steps_are_counted_and_the_record_stays_json(tmp_path: Path, value: float) -> None:
    t = telemetry(tmp_path)
    t.start(0)
    t.step(torch.tensor(value), applied=False)
    t.train(1, gradient_norm=value)
    assert (record(tmp_path)[-1]["loss"], record(tmp_path)[-1]["skipped"]) == (None, 1)
    assert record(tmp_path)[-1]["gradient_norm"] is None
    t.step(torch.tensor(value), applied=False)
    t.step(torch.tensor(2.0), applied=True)
    t.skipped(2, "gradients are not finite")
    t.train(3)
    assert [line["event"] for line in record(tmp_path)[-2:]] == ["skipped", "train"]
    assert (record(tmp_path)[-1]["loss"], record(tmp_path)[-1]["skipped"]) == (2.0, 1)


class Failing:
    """A function of wandb that raises."""

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise ConnectionError("no route to host")


class Hanging:
    """A function of wandb that returns when it is released, and gives up where nobody does."""

    def __init__(self) -> None:
        self.release, self.called, self.gave_up = Event(), Event(), False

    def __call__(self, *_: Any, **__: Any) -> None:
        self.called.set()
        self.gave_up = not self.release.wait(20)


def wandb_that(where: str, what: Any) -> Any:
    """A module wandb whose function `where` (init, log or finish) is `what`."""
    stub: Any = ModuleType("wandb")
    stub.Settings = SimpleNamespace
    stub.Image = lambda path, caption: path
    calls = {name: what if name == where else lambda *_, **__: None for name in ("log", "finish", "define_metric")}
    stub.init = what if where == "init" else lambda **_: SimpleNamespace(**calls)
    return stub


@pytest.mark.parametrize("where", ["absent", "init", "log", "finish"])
def test_wandb_may_fail_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, where: str) -> None:
    """It is told once, and the record is whole."""
    stub = None if where == "absent" else wandb_that(where, Failing())  # None makes `import wandb` raise ImportError
    monkeypatch.setitem(sys.modules, "wandb", stub)
    train_with_wandb(tmp_path, steps=20).end("finished")
    assert [line["event"] for line in record(tmp_path)] == ["start", *["train"] * 20, "end"]
    assert capsys.readouterr().out.count("the run goes on, and metrics.jsonl is the record") == 1


@pytest.mark.parametrize("lines", [1000, 3])
@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_no_step_waits_for_a_wandb_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, where: str, lines: int
) -> None:
    """All steps are in the record, and the run ends, while wandb still hangs; also if its queue is full."""
    monkeypatch.setattr("swinv2_scale.telemetry.SINK_SECONDS", 0.1)
    monkeypatch.setattr("swinv2_scale.telemetry.SINK_LINES", lines)
    hanging = Hanging()
    monkeypatch.setitem(sys.modules, "wandb", wandb_that(where, hanging))
    t = train_with_wandb(tmp_path, steps=20)
    assert [line["event"] for line in record(tmp_path)] == ["start", *["train"] * 20]
    if where != "finish":
        assert hanging.called.wait(20) and not hanging.gave_up
    t.end("finished")
    assert not hanging.gave_up
    hanging.release.set()
    assert record(tmp_path)[-1]["event"] == "end"
    assert capsys.readouterr().out.count("the run goes on, and metrics.jsonl is the record") == 1


def train_with_wandb(run_dir: Path, steps: int) -> Telemetry:
    """A run that has not ended yet."""
    t = telemetry(run_dir, wandb="online")
    t.start(0)
    for step in range(1, steps + 1):
        t.step(torch.tensor(1.0), applied=True)
        t.train(step)
    return t


def test_wandb_gets_some_of_many_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict[str, Any]] = []
    monkeypatch.setitem(sys.modules, "wandb", wandb_that("log", logged.append))
    t = telemetry(tmp_path, wandb="online")
    t.pictures(2, "predictions", [Picture(torch.zeros(3, 4, 4, dtype=torch.uint8), "7", False)] * 40)
    t.end("finished")
    (images,) = [line["pictures/predictions"] for line in logged if "pictures/predictions" in line]
    assert len(images) == 16 and len(list((tmp_path / "pictures").iterdir())) == 40


def test_unknown_wandb_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"telemetry\.wandb must be offline, online or disabled, got 'on'"):
        telemetry(tmp_path, wandb="on")


def test_the_report_reads_what_telemetry_writes(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: x\n")
    t = telemetry(tmp_path)
    t.start(0, world_size=1, device="cpu", precision="fp32", parameters=7, versions={"torch": "2"}, data={})
    t.evaluation(0, {"loss": 2.0, "top1": 0.1, "samples": 10.0})
    t.step(torch.tensor(1.0), applied=True)
    t.train(1, learning_rate=0.1, gradient_norm=1.0)
    t.evaluation(1, {"loss": 1.0, "top1": 0.9, "samples": 10.0})
    t.pictures(1, "predictions", [Picture(torch.zeros(3, 4, 4, dtype=torch.uint8), "7 <b>", False)])
    t.end("finished")
    page = write_report(tmp_path).read_text()
    assert "7 &lt;b&gt;" in page
    assert "data:image/png;base64" in page
    assert "held-out top-1 10.0 % -> 90.0 %" in headline(tmp_path).replace("\n", " ")


def test_the_slowest_rank_is_known_by_its_forward_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the sum over a step's; those of the record before are forgotten."""
    marks = iter([0.0, 0.25, 1.0, 1.5, 2.0, 2.125, 3.0, 3.0])
    monkeypatch.setattr("swinv2_scale.telemetry._mark", lambda: next(marks))
    monkeypatch.setattr(
        "swinv2_scale.telemetry.distributed.gathered", lambda own: [0.001, own, 0.002] if own else [own]
    )
    t = telemetry(tmp_path)
    t.start(0)
    loss = t.forward(lambda model, batch: batch["x"])
    for step in (1, 2):
        assert loss(None, {"x": 5}) == loss(None, {"x": 5}) == 5
        t.step(torch.tensor(1.0), applied=True)
        t.train(step)
    keys = ("forward_seconds_min", "forward_seconds_max", "slowest_rank")
    found = [tuple(line[key] for key in keys) for line in record(tmp_path)[1:]]
    assert found == [(0.001, 0.75, 1), (0.001, 0.125, 1)]


def test_forward_passes_on_an_accelerator_are_timed_without_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[int] = []

    class Clock:
        """An event whose accelerator takes 250 ms from one to the next."""

        count = 0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            Clock.count += 1
            self.at = 250.0 * Clock.count

        def synchronize(self) -> None:
            waits.append(1)

        def elapsed_time(self, other: "Clock") -> float:
            return other.at - self.at

    t = telemetry(tmp_path)
    t.start(0)
    with monkeypatch.context() as patch:
        patch.setattr("torch.cuda.Event", Clock)
        patch.setattr("swinv2_scale.telemetry.distributed.device", lambda: torch.device("cuda"))
        loss = t.forward(lambda model, batch: batch["x"])
        for _ in range(3):
            loss(None, {"x": 5})
            t.step(torch.tensor(1.0), applied=True)
    assert not waits, "a step waited"
    t.train(3)
    assert record(tmp_path)[-1]["forward_seconds_max"] == pytest.approx(0.25)


def test_utilisation_is_of_what_matrix_products_reach(tmp_path: Path) -> None:
    t = telemetry(tmp_path)
    t.start(0, flops_per_image=3e9, flops_of_matmul=1e12)
    t.step(torch.tensor(1.0), applied=True)
    t.train(1)
    t.blocks(1, {"amplitude": [1.0, float("nan")], "logit_scale_mean": [10.0, 11.0]})
    t.blocks(1, {})
    _, train, blocks = record(tmp_path)
    assert train["model_teraflops"] == pytest.approx(train["images_per_second"] * 3e-3)
    assert train["utilisation"] == pytest.approx(train["images_per_second"] * 3e-3)
    assert blocks["amplitude"] == [1.0, None] and blocks["logit_scale_mean"] == [10.0, 11.0]


def two_attempts(run_dir: Path) -> None:
    """Six steps, then again from the fourth on, to the eighth."""
    for first, last in ((0, 6), (3, 8)):
        t = telemetry(run_dir)
        t.start(first)
        for step in range(first + 1, last + 1):
            t.step(torch.tensor(float(step + 100 * first)), applied=True)
            t.train(step)
        t.pictures(last, "predictions", [Picture(torch.zeros(3, 4, 4, dtype=torch.uint8), "7", False)])
        t.end("finished" if first else "killed")


def test_what_was_done_again_counts_once(tmp_path: Path) -> None:
    two_attempts(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "st')
    steps = [(line["step"], line["loss"]) for line in read_record(tmp_path) if line["event"] == "train"]
    assert steps == [(1, 1.0), (2, 2.0), (3, 3.0), *((step, 300.0 + step) for step in range(4, 9))]
    with pytest.raises(ValueError, match="is not a run directory"):
        read_record(tmp_path / "nowhere")


def messages(file: Path) -> Iterator[bytes]:
    """What a .wandb file holds: after 7 bytes a log as LevelDB writes it, in blocks of 32 KiB."""
    content, at, message = file.read_bytes(), 7, b""
    while at < len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        message += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield message
            message = b""


def test_a_record_becomes_one_wandb_run(tmp_path: Path) -> None:
    """Written offline, and read as wandb's messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    two_attempts(tmp_path)
    assert upload(tmp_path, mode="offline", project="p") == len(read_record(tmp_path))
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    records: list[Any] = []
    deadline = time.monotonic() + 20  # wandb's own process may still be writing
    while not any(found.HasField("exit") for found in records) and time.monotonic() < deadline:
        records = [Record.FromString(message) for message in messages(file)]
    history, runs = [], []
    for found in records:
        if found.HasField("run"):
            runs.append(found.run.run_id)
        if found.HasField("history"):
            items = found.history.item
            history.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    assert set(runs) == {(tmp_path / "wandb_id").read_text()}
    losses = [(line["step"], line["train/loss"]) for line in history if "train/loss" in line]
    assert losses == [(1, 1.0), (2, 2.0), (3, 3.0), *((step, 300.0 + step) for step in range(4, 9))]
    assert [line["step"] for line in history if any(key.startswith("pictures/predictions") for key in line)] == [8]


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    t = telemetry(tmp_path, tensorboard=True)
    t.start(0)
    for step in (1, 2):
        t.step(torch.tensor(float(step)), applied=True)
        t.train(step)
    t.pictures(2, "predictions", [Picture(torch.zeros(3, 4, 4, dtype=torch.uint8), "7", False)])
    t.end("finished")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0)]
    assert events.Tags()["images"] == ["pictures/predictions/0"]
