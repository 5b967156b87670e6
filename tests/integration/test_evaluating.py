"""Evaluation of what a run has trained: on any number of ranks, from shards or a folder, as its checkpoint says."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from real_runs import STEPS, Run, classification, simmim

from swinv2_scale.data.manifest import open_manifest
from swinv2_scale.data.shards import read_sample

Launch = Callable[..., Run]


def test_pretraining_feeds_fine_tuning_and_evaluation(launch: Launch, shards: Path, tmp_path: Path) -> None:
    pretrained = launch(
        "pretrained", *simmim(shards), "micro_batch=30", f"data.validation={shards}/photographs/validation"
    )
    assert pretrained.returncode == 0, pretrained.output
    settings = [
        *classification(shards)[1:],
        "micro_batch=8",
        f"checkpoint={tmp_path}/pretrained",
        "model.window_size=2",
    ]
    tuned = launch("tuned", *settings, "optim.layer_decay=0.8", "evaluate_first=true", script="finetune")
    assert tuned.returncode == 0, tuned.output
    assert "dropped 3: decoder.0.bias" in tuned.output
    assert "position bias measured in windows of [[4, 4], [4, 4], [4, 4], [2, 2]]" in tuned.output
    assert (tuned.directory / "report.html").stat().st_size > 10_000
    assert (tuned.directory / "deepspeed.json").exists()
    evaluated = launch("evaluated", *settings, f"checkpoint={tmp_path}/tuned", script="evaluate", ranks=2)
    assert evaluated.returncode == 0, evaluated.output
    result = json.loads((tmp_path / "evaluated/evaluation.json").read_text())
    assert result["samples"] == 359
    assert result["loss"] == pytest.approx(tuned.events("evaluation")[STEPS]["loss"], rel=2e-2)  # bf16 weights
    assert result["replaced"] == []
    assert result["top1"] == pytest.approx(tuned.events("evaluation")[STEPS]["top1"], abs=3 / 359)


@pytest.mark.long
def test_a_simmim_run_is_evaluated_and_continued(launch: Launch, shards: Path, tmp_path: Path) -> None:
    held_out = f"data.validation={shards}/photographs/validation"
    first = launch("first", *simmim(shards), "micro_batch=30", held_out, "precision=fp32")
    assert first.returncode == 0, first.output
    evaluated = launch(
        "e", "task=simmim", held_out, f"checkpoint={tmp_path}/first", "precision=fp32", script="evaluate"
    )
    assert evaluated.returncode == 0, evaluated.output
    result = json.loads((tmp_path / "e/evaluation.json").read_text())
    assert result["loss"] == pytest.approx(first.events("evaluation")[STEPS]["loss"], rel=1e-6)
    continued = launch("second", *simmim(shards), "micro_batch=30", f"checkpoint={tmp_path}/first", "precision=fp32")
    assert continued.losses()[0] < 0.95 * first.losses()[0]
    headless = launch(
        "h",
        "model.num_classes=10",
        f"data.validation={shards}/digits/validation",
        f"checkpoint={tmp_path}/first",
        script="evaluate",
    )
    assert headless.returncode == 2
    assert "has no head.weight, head.bias of this shape" in headless.output


def test_evaluation_is_exact_on_any_number_of_ranks_from_shards_or_a_folder(
    launch: Launch, shards: Path, tmp_path: Path
) -> None:
    """359 digits, which neither 2 nor 3 ranks divide; the model is what the run's checkpoint says."""
    tuned = launch("tuned", *classification(shards), "micro_batch=16", "precision=fp32", "model.window_size=8")
    assert tuned.returncode == 0, tuned.output
    packed, folder = open_manifest(shards / "digits/validation"), tmp_path / "folder"
    for index in range(len(packed)):  # unpacked into directories that are numbers, as ImageNet-V2 has them
        key, members = read_sample(packed, index)
        path = folder / members.pop("cls").decode() / f"{key.replace('/', '_')}.{min(members)}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(members[min(members)])

    def evaluated(name: str, data: Path, *settings: str, ranks: int = 1) -> Run:
        common = [f"checkpoint={tmp_path}/tuned", "precision=fp32", "evaluation_batch=25", "workers=1"]
        places = [f"data.validation={data}", f"run_dir={tmp_path}/{name}"]
        return launch(name, *common, *places, *settings, ranks=ranks, script="evaluate", tiny=False)

    last = tuned.events("evaluation")[STEPS]
    for ranks, data in ((1, packed.root), (3, folder)):
        run = evaluated(f"{ranks}_{data.name}", data, ranks=ranks)
        assert run.returncode == 0, run.output
        assert "model: as the checkpoint says" in run.output
        result = json.loads((run.directory / "evaluation.json").read_text())
        assert (result["samples"], result["top1"], result["top5"]) == (359, last["top1"], last["top5"])
        assert result["loss"] == pytest.approx(last["loss"], rel=1e-6)
        assert result["images_per_second"] > 0
        assert [result["settings"][key] for key in ("image_size", "crop", "ranks")] == [64, True, ranks]
        lines = list(csv.DictReader((run.directory / "per_class.csv").open()))
        assert [line["name"] for line in lines] == list(packed.classes), (
            "known from the checkpoint, if not from the data"
        )
        assert sum(int(line["samples"]) for line in lines) == 359
        assert sum(float(line["top1"]) * int(line["samples"]) for line in lines) / 359 == pytest.approx(result["top1"])
    squash = ["task.evaluation_flip=true", "task.evaluation_transform.crop=false"]
    squashed = evaluated("squashed", folder, "model.image_size=96", *squash)
    assert squashed.returncode == 0, squashed.output
    assert "but model.image_size=96" in squashed.output
    found = json.loads((squashed.directory / "evaluation.json").read_text())["settings"]
    assert [found[key] for key in ("image_size", "crop", "resize", "flip")] == [96, False, [96, 96], True]
    (folder / "9").rename(folder / "12")
    outside = evaluated("outside", folder)
    assert outside.returncode == 2
    assert "numbers, which are its labels, up to 12, and the model has classes 0 to 9" in outside.output
    assert not outside.directory.exists()
