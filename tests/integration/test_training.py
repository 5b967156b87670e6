"""What must not change a run: ranks, ZeRO stage, accumulation, launcher, recomputation, interruption."""

import json
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from real_runs import STEPS, Run, classification, kill_all, simmim
from torch import Tensor

from swinv2_scale.ops import native

Launch = Callable[..., Run]


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


def test_ranks_and_launcher_do_not_matter(launch: Launch, shards: Path) -> None:
    """fp32, the same global batch: losses agree to rounding. One rank with plain python is the reference."""
    settings = [*classification(shards), "precision=fp32"]
    reference = launch("reference", *settings, "micro_batch=16")
    assert len(set(reference.losses())) == STEPS
    others = {
        "two_ranks_deepspeed": launch("a", *settings, "micro_batch=8", ranks=2, launcher="deepspeed"),
        "two_ranks_torchrun": launch("b", *settings, "micro_batch=4", ranks=2),
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


@pytest.mark.long
def test_zero_stage_and_accumulation_do_not_matter(launch: Launch, shards: Path) -> None:
    settings = [*classification(shards), "precision=fp32"]
    reference = launch("reference", *settings, "micro_batch=16")
    for stage in (0, 2):
        run = launch(f"zero{stage}", *settings, "micro_batch=8", f"parallel=zero{stage}", ranks=2)
        assert_close(run, reference, 2e-5)
    assert_close(launch("accumulation", *settings, "micro_batch=4"), reference, 2e-5)


@pytest.mark.long
@pytest.mark.parametrize("policy", ["block", "offload"])
def test_recomputation_is_bit_identical_in_training(launch: Launch, shards: Path, policy: str) -> None:
    settings = [*simmim(shards), "micro_batch=30", "model.drop_path_rate=0.3"]
    plain, recomputed = launch("plain", *settings), launch("recomputed", *settings, f"memory={policy}")
    assert plain.losses() == recomputed.losses()
    assert_equal(plain.weights(), recomputed.weights())


@pytest.mark.long
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


INSIDE_AN_EPOCH = [
    "precision=fp32",
    "model.drop_path_rate=0.3",
    "optim.ema_decay=0.99",
    "checkpoint_every=2",
    "global_batch=20",  # 9 steps an epoch
    "micro_batch=10",
    "steps=14",
    "data.open_shards=1",
]


def test_a_run_killed_inside_an_epoch_continues_as_if_it_had_not_been(launch: Launch, shards: Path) -> None:
    """At a random step, of which an epoch has 9."""
    settings = [*simmim(shards), *INSIDE_AN_EPOCH]
    whole = launch("whole", *settings)
    kill_at = random.randint(3, 8)
    cut = launch("cut", *settings, at=(kill_at, kill_all))
    assert cut.returncode == -signal.SIGKILL and len(cut.losses()) < 14, kill_at
    continued = launch("cut", *settings)
    resumed = int(continued.output.partition("at step ")[2].partition("\n")[0])
    assert kill_at - 2 <= resumed <= kill_at + 2, continued.output  # the record of a step comes before its checkpoint
    assert continued.losses() == whole.losses(), kill_at
    assert_equal(continued.weights(), whole.weights())


@pytest.mark.long
def test_a_run_killed_again_and_again_continues_on_other_numbers_of_ranks(launch: Launch, shards: Path) -> None:
    """One rank, two ranks, one rank: the same samples, the same losses to rounding."""
    settings = [*simmim(shards), *INSIDE_AN_EPOCH]
    whole = launch("whole", *settings)
    launch("changing", *settings, at=(3, kill_all))
    launch("changing", *settings, ranks=2, at=(random.randint(5, 11), kill_all))
    changing = launch("changing", *settings)
    assert changing.returncode == 0, changing.output
    assert changing.losses() == pytest.approx(whole.losses(), rel=1e-5)


def test_a_mistake_ends_with_one_clear_message(launch: Launch, shards: Path) -> None:
    settings = [*classification(shards), "micro_batch=8"]
    misspelt = launch("x", *settings, "optim.weigth_decay=0", ranks=2, launcher="deepspeed")
    assert misspelt.returncode != 0
    assert "Did you mean 'optim.weight_decay'?" in misspelt.output
    first = launch("x", *settings)
    assert first.returncode == 0, first.output
    trained_with = (first.directory / "config.yaml").read_text()
    other_model = launch("x", *settings, "model.embed_dim=32")
    assert (first.directory / "config.yaml").read_text() == trained_with
    assert other_model.returncode == 2
    assert "was trained with model.embed_dim=16, not 32 as here" in other_model.output
    assert "Traceback" in (other_model.directory / "error.txt").read_text()
    assert_short(misspelt, other_model)


@pytest.mark.long
def test_more_mistakes(launch: Launch, shards: Path, tmp_path: Path) -> None:
    settings = [*classification(shards), "micro_batch=8"]
    missing = launch("x", *settings, f"data.train={tmp_path}/nowhere")
    assert missing.returncode == 2
    assert f"{tmp_path}/nowhere" in missing.output
    batch = launch("x", *settings, "micro_batch=12")
    assert batch.returncode == 2
    assert "global_batch=12 or global_batch=24 or micro_batch=8" in batch.output
    assert launch("x", *settings).returncode == 0
    other_data = launch("x", *settings, f"data.train={shards}/digits/validation")
    assert other_data.returncode == 2
    assert "this run cannot be continued" in other_data.output
    classes = launch("y", *settings, "model.num_classes=12")
    assert classes.returncode == 2
    assert "set model.num_classes=10" in classes.output
    assert_short(missing, batch, other_data, classes)


def assert_short(*runs: Run) -> None:
    for run in runs:
        assert "Traceback" not in run.output
        assert len(run.output.splitlines()) < 40


@pytest.mark.skipif("cpu" in native.missing, reason=native.missing.get("cpu", ""))
def test_a_kernel_that_fails_its_self_check_is_refused(launch: Launch, shards: Path, monkeypatch) -> None:
    monkeypatch.setenv(native.FORCE, "unknown")  # the kernel raises
    settings = [*classification(shards), "micro_batch=4"]
    refused = launch("x", *settings, ranks=2)
    assert refused.returncode != 0
    message = "rank 0: the cpu kernels of a block fail their self-check at 3 x 5 x 7 x 96"
    assert message in refused.output, refused.output[-3000:]
    monkeypatch.setenv(native.FORCE, native.OFF)
    trained = launch("x", *settings, ranks=2)
    assert trained.returncode == 0, trained.output


@pytest.mark.long
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
