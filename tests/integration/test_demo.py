"""The demo's own experiments, started as `make demo` starts them."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from real_runs import ROOT, Run


@pytest.mark.long
def test_the_demos_pretraining_learns(launch: Callable[..., Run], shards: Path, tmp_path: Path) -> None:
    """A quarter of the demo's steps lowers the loss on held-out photographs by what the whole promises."""
    data = [f"data.train={shards}/photographs/train", f"data.validation={shards}/photographs/validation"]
    run = launch(
        "demo",
        "experiment=demo_simmim",
        "steps=60",
        f"run_dir={tmp_path}/demo",
        *data,
        ranks=2,
        launcher="deepspeed",
        tiny=False,
    )
    assert run.returncode == 0, run.output
    held_out = run.events("evaluation")
    assert held_out[0]["samples"] == held_out[60]["samples"] == 42
    assert held_out[60]["loss"] < 0.7 * held_out[0]["loss"]
    assert "% lower" in run.output
    assert list((run.directory / "wandb").glob("offline-run-*/*.wandb")), "wandb records offline by default"
    pictures = [item for event in run.events("pictures").values() for item in event["items"]]
    assert len(pictures) == 16
    assert all((run.directory / item["file"]).exists() for item in pictures)
    assert "data:image/png;base64" in (run.directory / "report.html").read_text()


def made(target: str) -> subprocess.CompletedProcess[str]:
    venv = Path(sys.executable).parents[1]
    process = subprocess.run(
        ["make", target, f"VENV={venv}"], cwd=ROOT, capture_output=True, text=True, timeout=2400, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process


@pytest.mark.long
def test_make_demo_keeps_its_promises() -> None:
    process = made("demo")
    accuracy = re.search(r"held-out top-1 .* -> ([\d.]+) %", process.stdout)
    lower = re.search(r"held-out loss .* \(([\d.]+) % lower\)", process.stdout)
    assert accuracy is not None and float(accuracy.group(1)) >= 97
    assert lower is not None and float(lower.group(1)) >= 30
    assert (ROOT / "runs/demo_classification/report.html").exists()


@pytest.mark.long
def test_make_demo_dense_keeps_its_promises() -> None:
    made("demo-dense")
    detection = json.loads((ROOT / "runs/demo_evaluation_detection/evaluation.json").read_text())
    assert detection["box_ap"] >= 0.50 and detection["mask_ap"] >= 0.45 and detection["samples"] == 100
    segmentation = json.loads((ROOT / "runs/demo_evaluation_segmentation/evaluation.json").read_text())
    assert segmentation["miou"] >= 0.70 and segmentation["samples"] == 100
    for name in ("demo_detection", "demo_segmentation"):
        assert (ROOT / "runs" / name / "report.html").exists()
