"""Videos as a user runs them: motions packed as Kinetics, a training that is killed and goes on, tests of views."""

import csv
import json
from pathlib import Path

import pytest
import torch
from real_runs import Run, kill_all, run

from swinv2_scale.data.motions import write_tree
from swinv2_scale.data.pack import pack

STEPS = 12
SETTINGS = [
    "experiment=demo_video",
    "model.depths=[1,1]",
    "model.num_heads=[1,2]",
    "model.window_size=[4,4,4]",
    "model.drop_path_rate=0.2",
    "task.train_transform.randaugment_ops=2",
    "task.train_transform.erase_probability=0.5",
    "task.train_collate.mixup_alpha=0.8",
    "task.train_collate.cutmix_alpha=1.0",
    "evaluation_batch=3",
    "evaluate_every=0",
    "precision=fp32",
]


def packed(root: Path, split: str, number: int) -> Path:
    """Shards of that many motions."""
    write_tree(root, {split: number})
    pack(str(root / f"{split}.csv"), root / split / "shards", format="kinetics", shard_size=10, seed=0, jobs=1)
    return root / split / "shards"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("motions")
    data = [f"data.train={packed(root, 'training', 40)}", f"data.validation={packed(root, 'validation', 16)}"]
    return [*data, *SETTINGS, f"steps={STEPS}", "global_batch=8", "micro_batch=4", "checkpoint_every=4"]


def start(directory: Path, settings: list[str], at: int | None = None) -> Run:
    action = None if at is None else (at, kill_all)
    return run(directory, *settings, ranks=2, launcher="deepspeed", script="finetune", at=action)


@pytest.mark.long
def test_a_killed_training_has_the_losses_and_weights_of_one_that_was_not(tmp_path: Path, settings: list[str]) -> None:
    whole = start(tmp_path / "whole", settings)
    assert whole.returncode == 0, whole.output
    assert len(whole.losses()) == STEPS
    for step in (6, 10):
        killed = start(tmp_path / "killed", settings, at=step)
        assert killed.returncode != 0
    resumed = start(tmp_path / "killed", settings)
    assert resumed.returncode == 0, resumed.output
    assert "continuing" in resumed.output
    assert resumed.losses() == whole.losses()
    expected = whole.weights()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.weights().items())
    # Two views and three crops of every video, each video counted once on three ranks.
    views = ["task.evaluation_transform.views=2", "task.evaluation_transform.crops=3"]
    views += ["task.evaluation_transform.resize=1.25", f"checkpoint={whole.directory}"]
    found = []
    for ranks in (1, 3):
        place = tmp_path / f"on_{ranks}"
        evaluated = run(place, *settings, *views, ranks=ranks, script="evaluate")
        assert evaluated.returncode == 0, evaluated.output
        found.append(json.loads((place / "evaluation.json").read_text()))
    for name in ("top1", "top5", "samples"):
        assert found[0][name] == found[1][name], name
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-5)
    assert found[0]["samples"] == 16 and found[0]["settings"]["views"] == 2
    lines = list(csv.DictReader((tmp_path / "on_1/per_class.csv").open()))
    assert next(line["name"] for line in lines) == "coming closer" and len(lines) == 8
