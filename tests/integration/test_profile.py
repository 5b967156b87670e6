"""A run that profiles itself, and goes on."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from real_runs import Run

from swinv2_scale.dashboard import PICTURES, WORKSPACES


@pytest.mark.parametrize("memory", ["none", pytest.param("block", marks=pytest.mark.long)])
def test_a_run_says_where_its_time_goes(launch: Callable[..., Run], shards: Path, memory: str) -> None:
    data = [f"data.train={shards}/photographs/train", "epochs=null", "global_batch=20", "micro_batch=10"]
    data.append(f"data.validation={shards}/photographs/validation")
    run = launch("run", *data, "steps=12", "profile=true", f"memory={memory}", ranks=2)
    assert run.returncode == 0, run.output
    assert len(run.losses()) == 12
    with (run.directory / "profile/parts.csv").open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    shares = {name: float(row["share"]) for name, row in rows.items()}
    assert sum(shares.values()) == pytest.approx(1)
    expected = {
        "attention",
        "mlp",
        "norm",
        "merging",
        "embedding",
        "position bias",
        "data",
        "communication",
        "optimiser",
    }
    assert expected <= shares.keys()
    assert shares["attention"] > shares["merging"] > 0 and shares["mlp"] > 0.02
    assert shares.get("other", 0.0) < 0.8, shares  # which is most of so small a model
    assert 0 < float(rows["mlp"]["of_matmul"]) < 2 and rows["norm"]["of_matmul"] == ""
    seconds = sum(float(row["seconds"]) for row in rows.values())
    steps = [event["step_seconds"] for step, event in run.events("train").items() if 6 <= step <= 8]
    assert 0.3 < seconds / (sum(steps) / len(steps)) < 3
    assert json.loads((run.directory / "profile/trace.json").read_text())["traceEvents"]
    logged = {f"{line['event']}/{key}" for line in run.record() for key, value in line.items() if value is not None}
    panels = [keys for plots in WORKSPACES["pretraining"].values() for keys in plots.values()]
    assert {key for keys in panels for key in keys} <= logged
    assert PICTURES["pretraining"].removeprefix("pictures/") in {
        line["name"] for line in run.events("pictures").values()
    }
    (event,) = run.events("profile").values()
    assert event["parts"] == pytest.approx(shares) and "profile  attention" in run.output
