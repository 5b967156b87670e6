"""Segmentation as a user runs it: packed scenes, training that learns and resumes on other ranks, evaluation."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from real_runs import Run, run

from swinv2_scale.data.pack import pack
from swinv2_scale.data.scenes import write_tree

Launch = Callable[..., Run]
STEPS = 16


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("scenes")
    write_tree(root, {"training": 24, "validation": 7})
    for split in ("training", "validation"):
        pack(str(root / f"images/{split}"), root / f"{split}_shards", format="ade20k", shard_size=10, seed=0, jobs=1)
    return [
        "experiment=demo_segmentation",
        "checkpoint=null",
        f"data.train={root}/training_shards",
        f"data.validation={root}/validation_shards",
        "task.channels=16",
        "task.auxiliary_channels=8",
        "task.dropout=0",  # drawn for a micro-batch, and so not the same on other ranks
        f"steps={STEPS}",
        "global_batch=8",
        "evaluation_batch=2",
        "checkpoint_every=12",
        "optim.lr=1e-2",
        "workers=0",
        "precision=fp32",
        "optim.ema_decay=0.9",
    ]


@pytest.mark.long
def test_training_learns_resumes_on_other_ranks_and_is_evaluated(tmp_path: Path, settings: list[str]) -> None:
    first = run(tmp_path / "first", *settings, "micro_batch=8", script="finetune")
    assert first.returncode == 0, first.output
    losses = first.losses()
    assert len(losses) == STEPS and losses[-1] < 0.75 * losses[0]
    held_out = first.events("evaluation")[STEPS]
    assert {"loss", "miou", "pixel_accuracy", "mean_accuracy"} <= set(held_out)
    assert held_out["loss"] < 2.3 and held_out["pixel_accuracy"] > 0.7  # log 11 = 2.4
    weights = first.weights()
    variances = {name: value for name, value in weights.items() if name.endswith("running_var")}
    assert len(variances) == 2 * 13 and all((value != 1).any() for value in variances.values())
    # From its checkpoint of step 12, on two ranks: batch norm sees the same images, and the same statistics go on.
    shutil.copytree(first.directory, tmp_path / "second")
    shutil.rmtree(tmp_path / f"second/checkpoints/step_{STEPS:08d}")
    second = run(tmp_path / "second", *settings, "micro_batch=4", ranks=2, script="finetune")
    assert second.returncode == 0, second.output
    assert "continuing" in second.output and "at step 12" in second.output
    assert second.losses()[12:] == pytest.approx(losses[12:], rel=1e-4)
    for name, value in second.weights().items():
        assert torch.allclose(value, weights[name], rtol=1e-2, atol=1e-4), name
    # The checkpoint says what model it is of.
    evaluated = run(tmp_path / "evaluated", *settings, f"checkpoint={first.directory}", script="evaluate")
    assert evaluated.returncode == 0, evaluated.output
    result = json.loads((tmp_path / "evaluated/evaluation.json").read_text())
    for name in ("miou", "pixel_accuracy", "mean_accuracy", "loss"):
        assert result[name] == pytest.approx(held_out[name], rel=1e-5), name
    assert result["samples"] == 7 and result["settings"]["inference"] == "whole"
    lines = list(csv.DictReader((tmp_path / "evaluated/per_class.csv").open()))
    assert [line["name"] for line in lines][-2:] == ["digit 9", "photograph"]
    ious = [float(line["iou"]) for line in lines if line["iou"]]
    assert sum(ious) / len(ious) == pytest.approx(result["miou"], rel=1e-4)


@pytest.mark.long
def test_every_pixel_counts_once_on_any_number_of_ranks(tmp_path: Path, settings: list[str]) -> None:
    trained = run(tmp_path / "trained", *settings, "micro_batch=8", script="finetune")
    views = ["task.inference=sliding", "task.flip=true", "task.evaluation_transform.ratios=[0.5,1.25]"]
    found = []
    for ranks in (1, 3):
        place = tmp_path / f"on_{ranks}"
        evaluated = run(place, *settings, *views, f"checkpoint={trained.directory}", ranks=ranks, script="evaluate")
        assert evaluated.returncode == 0, evaluated.output
        found.append(json.loads((place / "evaluation.json").read_text()))
    for name in ("miou", "pixel_accuracy", "mean_accuracy"):
        assert found[0][name] == found[1][name], name
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-9)


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 2])
def test_other_zero_stages_train_alike(tmp_path: Path, settings: list[str], stage: int) -> None:
    plain = run(tmp_path / "plain", *settings, "steps=4", "micro_batch=4", ranks=2, script="finetune")
    staged = [*settings, f"parallel=zero{stage}", "steps=4", "micro_batch=4"]
    other = run(tmp_path / "other", *staged, ranks=2, script="finetune")
    assert other.returncode == 0, other.output
    assert other.losses() == pytest.approx(plain.losses(), rel=1e-4)
    assert other.events("evaluation")[4]["loss"] == pytest.approx(plain.events("evaluation")[4]["loss"], rel=1e-3)
