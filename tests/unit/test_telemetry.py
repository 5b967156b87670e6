"""The record: what is written, what a crash leaves, what a failing sink costs (nothing), what NaN does."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from swinv2_scale.report import headline, write_report
from swinv2_scale.telemetry import Picture, Telemetry

pytestmark = pytest.mark.usefixtures("one_rank")


def telemetry(run_dir: Path, wandb: str = "disabled") -> Telemetry:
    return Telemetry(
        run_dir,
        name="x",
        total_steps=10,
        steps_per_epoch=5,
        images_per_step=8,
        wandb=wandb,
        project="p",
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
    assert 0 <= train["data_wait"] <= 1
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
    """A wandb run whose every call raises."""

    def __getattr__(self, name: str) -> Any:
        raise ConnectionError("no route to host")


@pytest.mark.parametrize("where", ["absent", "init", "log"])
def test_wandb_may_fail_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, where: str) -> None:
    stub: Any = None  # makes `import wandb` raise ImportError
    if where != "absent":
        stub = ModuleType("wandb")
        stub.Settings = SimpleNamespace
        run = SimpleNamespace(define_metric=lambda *a, **k: None, finish=Failing, log=lambda values: Failing().log)
        stub.init = (lambda **k: run) if where == "log" else (lambda **k: Failing().x)
    monkeypatch.setitem(sys.modules, "wandb", stub)
    t = telemetry(tmp_path, wandb="online")
    t.start(0)
    t.step(torch.tensor(1.0), applied=True)
    t.train(1)
    t.end("finished")
    assert [line["event"] for line in record(tmp_path)] == ["start", "train", "end"]
    assert "wandb" in capsys.readouterr().out


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
