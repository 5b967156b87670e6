"""What must not change a run: ranks, ZeRO stage, accumulation, launcher, recomputation, interruption."""

import csv
import json
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from real_runs import Run, kill_all
from torch import Tensor

from swinv2_scale.data.manifest import open_manifest
from swinv2_scale.data.shards import read_sample
from swinv2_scale.ops import native

Launch = Callable[..., Run]
STEPS = 6


def simmim(shards: Path) -> list[str]:
    return [
        f"data.train={shards}/photographs/train",
        f"steps={STEPS}",
        "epochs=null",
        "global_batch=60",  # 180 photographs: an epoch ends after 3 steps
        "model.image_size=64",
        "checkpoint_every=3",
    ]


def classification(shards: Path) -> list[str]:
    return [
        "task=classification",
        "model.num_classes=10",
        f"data.train={shards}/digits/train",
        f"data.validation={shards}/digits/validation",
        f"steps={STEPS}",
        "epochs=null",
        "global_batch=16",
    ]


def assert_close(a: Run, b: Run, limit: float) -> None:
    assert a.returncode == b.returncode == 0, a.output + b.output
    assert len(a.losses()) == len(b.losses()) == STEPS
    assert a.losses() == pytest.approx(b.losses(), rel=limit)
    ours, theirs = a.weights(), b.weights()
    assert ours.keys() == theirs.keys()
    for name in ours:
        difference = (ours[name] - theirs[name]).norm() / theirs[name].norm().clamp(min=1e-6)
        assert difference <= 100 * limit, (name, difference)


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_ranks_zero_stage_accumulation_and_launcher_do_not_matter(launch: Launch, shards: Path) -> None:
    """fp32, the same global batch: losses agree to rounding. One rank with plain python is the reference."""
    settings = [*classification(shards), "precision=fp32"]
    reference = launch("reference", *settings, "micro_batch=16")
    assert len(set(reference.losses())) == STEPS
    others = {
        "two_ranks_deepspeed": launch("a", *settings, "micro_batch=8", ranks=2, launcher="deepspeed"),
        "two_ranks_torchrun": launch("b", *settings, "micro_batch=4", ranks=2),
        "zero0": launch("c", *settings, "micro_batch=8", "parallel=zero0", ranks=2),
        "zero2": launch("d", *settings, "micro_batch=8", "parallel=zero2", ranks=2),
        "accumulation": launch("e", *settings, "micro_batch=4"),
    }
    for name, run in others.items():
        assert_close(run, reference, 2e-5)
        held_out = [r.events("evaluation")[STEPS] for r in (run, reference)]
        assert held_out[0]["samples"] == held_out[1]["samples"] == 359, name
        assert held_out[0]["loss"] == pytest.approx(held_out[1]["loss"], rel=1e-4)
    # whatever starts it, the configuration is the same
    resolved, *theirs = (
        yaml.safe_load((run.directory / "config.yaml").read_text())
        for run in (reference, others["two_ranks_deepspeed"], others["two_ranks_torchrun"])
    )
    for other in theirs:
        assert {key for key in resolved if resolved[key] != other[key]} == {"name", "run_dir", "micro_batch"}
    # two runs of the same command are equal to the last bit
    again = launch("again", *settings, "micro_batch=8", ranks=2)
    assert again.losses() == others["two_ranks_deepspeed"].losses()
    assert_equal(again.weights(), others["two_ranks_deepspeed"].weights())


@pytest.mark.parametrize("policy", ["block", pytest.param("offload", marks=pytest.mark.long)])
def test_recomputation_is_bit_identical_in_training(launch: Launch, shards: Path, policy: str) -> None:
    settings = [*simmim(shards), "micro_batch=30", "model.drop_path_rate=0.3"]
    plain, recomputed = launch("plain", *settings), launch("recomputed", *settings, f"memory={policy}")
    assert plain.losses() == recomputed.losses()
    assert_equal(plain.weights(), recomputed.weights())


@pytest.mark.parametrize(("ranks", "precision"), [(1, "fp32"), (2, "bf16")])
def test_a_run_cut_at_an_epochs_end_continues_bit_for_bit(
    launch: Launch, shards: Path, tmp_path: Path, ranks: int, precision: str
) -> None:
    settings = [*simmim(shards), "micro_batch=30", f"precision={precision}", "model.drop_path_rate=0.3"]
    whole = launch("whole", *settings, ranks=ranks)
    assert whole.returncode == 0, whole.output
    losses, weights = whole.losses(), whole.weights()
    # as a run that was killed after step 5: the last checkpoint is damaged, the last line of the record is cut off
    damaged = tmp_path / "whole/checkpoints/step_00000006/model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    record = tmp_path / "whole/metrics.jsonl"
    record.write_bytes(record.read_bytes()[: record.read_bytes().find(b'"event": "train", "step": 6') + 10])
    continued = launch("whole", *settings, ranks=ranks)
    assert "does not have the recorded SHA-256" in continued.output
    assert "at step 3" in continued.output
    assert continued.losses() == losses
    assert_equal(continued.weights(), weights)
    assert [
        line["attempt"] for line in map(json.loads, record.read_text().splitlines()) if line["event"] == "start"
    ] == [0, 1]
    # at another number of ranks: the same samples, the same losses to rounding
    shutil.rmtree(tmp_path / "whole/checkpoints/step_00000006")
    other = launch("whole", *settings, ranks=3 - ranks)
    assert "at step 3" in other.output
    assert other.losses() == pytest.approx(losses, rel=1e-5 if precision == "fp32" else 1e-2)


def test_a_run_killed_inside_an_epoch_continues_as_if_it_had_not_been(launch: Launch, shards: Path) -> None:
    """At a random step, of which an epoch has 9; then at other numbers of ranks."""
    settings = [*simmim(shards), "precision=fp32", "model.drop_path_rate=0.3", "optim.ema_decay=0.99"]
    settings += [
        "checkpoint_every=2",
        "global_batch=20",
        "micro_batch=10",
        "steps=14",
        "data.open_shards=1",
    ]  # 9 steps an epoch
    whole = launch("whole", *settings)
    kill_at = random.randint(3, 8)
    cut = launch("cut", *settings, at=(kill_at, kill_all))
    assert cut.returncode == -signal.SIGKILL and len(cut.losses()) < 14, kill_at
    continued = launch("cut", *settings)
    resumed = int(continued.output.partition("at step ")[2].partition("\n")[0])
    assert kill_at - 2 <= resumed <= kill_at + 2, continued.output  # the record of a step comes before its checkpoint
    assert continued.losses() == whole.losses(), kill_at
    assert_equal(continued.weights(), whole.weights())
    # one rank, two ranks, one rank: the same samples, the same losses to rounding
    launch("changing", *settings, at=(3, kill_all))
    launch("changing", *settings, ranks=2, at=(random.randint(5, 11), kill_all))
    changing = launch("changing", *settings)
    assert changing.returncode == 0, changing.output
    assert changing.losses() == pytest.approx(whole.losses(), rel=1e-5)


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
    for ranks, data in ((1, packed.root), (1, folder), (2, folder), (3, folder)):
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


def test_mistakes_end_with_one_clear_message(launch: Launch, shards: Path, tmp_path: Path) -> None:
    settings = [*classification(shards), "micro_batch=8"]
    misspelt = launch("x", *settings, "optim.weigth_decay=0", ranks=2, launcher="deepspeed")
    assert misspelt.returncode != 0
    assert "Did you mean 'optim.weight_decay'?" in misspelt.output
    missing = launch("x", *settings, f"data.train={tmp_path}/nowhere")
    assert missing.returncode == 2
    assert f"{tmp_path}/nowhere" in missing.output
    batch = launch("x", *settings, "micro_batch=12")
    assert batch.returncode == 2
    assert "global_batch=12 or global_batch=24 or micro_batch=8" in batch.output
    first = launch("x", *settings)
    assert first.returncode == 0, first.output
    trained_with = (first.directory / "config.yaml").read_text()
    other_model = launch("x", *settings, "model.embed_dim=32")
    assert (first.directory / "config.yaml").read_text() == trained_with
    assert other_model.returncode == 2
    assert "was trained with model.embed_dim=16, not 32 as here" in other_model.output
    assert "Traceback" in (other_model.directory / "error.txt").read_text()
    other_data = launch("x", *settings, f"data.train={shards}/digits/validation")
    assert other_data.returncode == 2
    assert "this run cannot be continued" in other_data.output
    classes = launch("y", *settings, "model.num_classes=12")
    assert classes.returncode == 2
    assert "set model.num_classes=10" in classes.output
    for run in (misspelt, missing, batch, other_model, other_data, classes):
        assert "Traceback" not in run.output
        assert len(run.output.splitlines()) < 40


@pytest.mark.skipif("cpu" in native.missing, reason=native.missing.get("cpu", ""))
def test_a_kernel_that_fails_its_self_check_is_refused(launch: Launch, shards: Path, monkeypatch) -> None:
    monkeypatch.setenv(native.FORCE, "none")  # the kernel raises
    settings = [*classification(shards), "micro_batch=4"]
    refused = launch("x", *settings, ranks=2)
    assert refused.returncode != 0
    message = "rank 0: the cpu attention kernel fails its self-check at window 7x9"
    assert message in refused.output, refused.output[-3000:]
    trained = launch("x", *settings, "memory.attention=reference", ranks=2)
    assert trained.returncode == 0, trained.output


def test_a_sample_that_does_not_decode_is_replaced_and_counted(launch: Launch, shards: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(shards / "photographs/train", damaged)
    shard = sorted(damaged.glob("*.tar"))[0]
    content = bytearray(shard.read_bytes())
    begin = content.find(b"\xff\xd8\xff")  # the first JPEG
    content[begin : begin + 512] = bytes(512)
    shard.write_bytes(content)
    settings = [*simmim(shards), "micro_batch=30", f"data.train={damaged}"]
    run = launch("damaged_run", *settings)
    assert run.returncode == 0, run.output
    assert run.output.count("replaced a sample that cannot be used") == 2  # once in each of two epochs
    assert shard.name in next(iter(run.events("corrupt").values()))["sample"]
    strict = launch("strict", *settings, "max_corrupt_share=0.001")
    assert strict.returncode == 2
    assert "max_corrupt_share" in strict.output
    assert "Traceback" not in strict.output
