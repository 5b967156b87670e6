"""Plans: what adds up, what fits, what is refused; and that every experiment can be planned for its hardware."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from swinv2_scale import config, plan_report, planner, telemetry
from swinv2_scale.cli import main

FILES = sorted((config.CONF / "experiment").glob("*.yaml"))
EXPERIMENTS = [path.stem for path in FILES]
SMALL = ["model=debug", "nodes=1", "gpus=2", "micro_batch=4", "global_batch=64"]


def planned(*settings: str) -> plan_report.Planned:
    return plan_report.planned([*SMALL, *settings])


@pytest.mark.parametrize(
    ("zero_stage", "precision", "total"),
    [(0, "fp32", 16), (1, "bf16", 2 + 4 + 3), (2, "bf16", 2 + 1 + 4), (3, "bf16", 5.5)],
)
def test_bytes_per_parameter(zero_stage: int, precision: str, total: float) -> None:
    """Of four ranks; without sharding 4 weights + 4 gradients + 8 moments."""
    states = planner.state_bytes(10, zero_stage=zero_stage, precision=precision, ranks=4, ema=False)
    assert sum(states.values()) == 10 * total


def test_a_sub_group_holds_whole_parameters() -> None:
    model = nn.Sequential(nn.Linear(10, 3, bias=False), nn.Linear(10, 10, bias=False), nn.Linear(10, 2, bias=False))
    assert planner._largest_sub_group(model, 20) == 100  # 30, 100, 20
    assert planner._largest_sub_group(model, 31) == 130  # 30 are not enough
    assert planner._largest_sub_group(model, 1e9) == 150
    model[1].weight.requires_grad_(False)
    assert planner._largest_sub_group(model, 20) == 30


def test_json_has_what_a_script_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *SMALL, "--json", "--search"]) == 0
    facts = json.loads(capsys.readouterr().out)
    states = ("weights_bytes", "gradients_bytes", "optimizer_bytes", "activations_bytes", "workspace_bytes")
    assert all(facts[key] > 0 for key in (*states, "parameters", "peak_bytes", "flops_per_step"))
    assert facts["peak_bytes"] == max(facts["backward_bytes"], facts["step_bytes"])
    assert facts["accumulation"] * facts["micro_batch"] * facts["ranks"] == facts["global_batch"]
    assert facts["search"][0]["memory"] == "none"  # all fits: nothing need be run again


def test_a_plan_of_clips(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["finetune", "checkpoint=a.safetensors", "model=video_debug", "data.validation=b"]
    clips = planned(*settings).plan
    images = planned(*settings, "model.frames=null", "model.window_size=4").plan
    assert clips.image_size == (4, 64, 64) and images.image_size == (64, 64)
    assert clips.batch_bytes > 3 * images.batch_bytes
    assert clips.activations_bytes == pytest.approx(4 * images.activations_bytes, rel=0.2)
    assert clips.flops_per_step == pytest.approx(4 * images.flops_per_step, rel=0.1)
    assert main(["plan", *SMALL, *settings]) == 0
    assert "4 frames of 64 x 64 pixels" in capsys.readouterr().out


def test_the_largest_clip_of_the_paper_fits() -> None:
    """By the kernel: the logits of windows of 8x24x24 alone would take more than a GPU has."""
    settings = ["experiment=g_kinetics_320", "model.image_size=384", "model.window_size=[8,24,24]", "gpu=A100-40"]
    one = plan_report.planned([*settings, "nodes=4"])
    assert one.plan.peak_bytes <= planner.capacity(one.cluster)
    one.cfg.memory.attention = "reference"
    without = planner.plan(one.cfg, ranks=one.ranks, model=one.model)
    assert without.peak_bytes > planner.capacity(one.cluster)


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_a_plan_of_heads(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["finetune", f"task={task}", "model.num_classes=10", "data.validation=b", "task.channels=32"]
    settings[-1:] = ["task.detector.channels=32"] if task == "detection" else settings[-1:]
    classifier = planned("finetune", "model.num_classes=10", "data.validation=b").plan
    small, large = (planned(*settings, f"model.image_size={size}").plan for size in (64, 128))
    assert large.parameters > classifier.parameters and large.flops_per_step > classifier.flops_per_step
    assert large.activations_bytes > small.activations_bytes
    assert large.batch_bytes == pytest.approx(4 * small.batch_bytes)
    assert main(["plan", *SMALL, *settings, "global_batch=8", "--search", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["search"][0]["memory"] == "none"
    assert sum(facts["activations_by_part"].values()) == facts["activations_bytes"]


def test_a_model_that_nobody_knows() -> None:
    one = planned()
    with pytest.raises(ValueError, match="a Linear cannot be planned: SimMIM, classifiers, UPerNet and detectors can"):
        planner.plan(one.cfg, ranks=2, model=torch.nn.Linear(1, 1))


def test_bars_add_up_to_the_peak() -> None:
    for settings in ([], ["micro_batch=32"], ["parallel=zero3"], ["parallel=zero0", "precision=fp32"]):
        plan = planned(*settings).plan
        assert sum(size for _, size in plan_report.rows(plan)) == pytest.approx(plan.peak_bytes)


def test_page_is_self_contained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "plan.html"
    assert main(["plan", *SMALL, "--search", "--html", str(page)]) == 0
    text = page.read_text()
    assert "stage 3" in text
    assert not re.search(r"(src|href)=\"?http", text)
    assert "fits" in capsys.readouterr().out


def test_the_largest_micro_batch_fits_and_the_next_does_not() -> None:
    one = planned()
    room = planned("micro_batch=8").plan.peak_bytes + 1
    arguments: dict[str, Any] = {"ranks": one.ranks, "bytes": room}
    assert planner.largest_micro_batch(one.cfg, **arguments) == 8
    assert planned("micro_batch=16").plan.peak_bytes > room
    assert planner.largest_micro_batch(one.cfg, ranks=2, bytes=1e6) == 0


def test_a_search_trades_operations_for_room() -> None:
    one = planned("model.image_size=256", "micro_batch=32", "gpu=0.35GB", "reserved=0GB")
    found = planner.search(one.cfg, one.cluster, ranks=one.ranks)
    assert all(plan.peak_bytes <= planner.capacity(one.cluster) for _, plan, _ in found)
    assert [seconds for *_, seconds in found] == sorted(seconds for *_, seconds in found)
    one.cluster.gpu = "10MB"
    with pytest.raises(ValueError, match=r"no policy fits .* the least takes .* Add nodes"):
        planner.search(one.cfg, one.cluster, ranks=one.ranks)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["noeds=2"], r"'noeds' in 'noeds=2' is not a setting. Did you mean 'nodes'\?"),
        (["gpuss=2"], r"Did you mean 'gpus'\?"),
        (["modle=g"], r"'modle' .* Did you mean 'model'\?"),
        (["gpu=A100"], r"gpu=A100 is not known: give one of A100-40, .* or a size such as 24GB"),
        (["nodes=0"], r"nodes=0 must be a whole number of at least 1"),
        (["efficiency=0"], r"^efficiency=0 must be a number above 0"),
        (["pretrian"], r"'pretrian' is no stage: give one of pretrain, finetune"),
        (["micro_batch=7"], r"global_batch=64 is not micro_batch=7 x world size 2"),
    ],
)
def test_mistakes_are_named(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        one = planned(*argv)
        planner.capacity(one.cluster)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_plans(name: str) -> None:
    """For the hardware that its header names, as far as it says how to plan it; there it must fit."""
    text = (config.CONF / f"experiment/{name}.yaml").read_text()
    commands = re.findall(r"swinv2-scale plan (.*)", text) or [f"experiment={name} gpus=1"]
    one = plan_report.planned(commands[0].split())
    for command in commands:
        given = dict(word.split("=") for word in command.split())
        one.cluster.gpu = given.get("gpu", one.cluster.gpu)
        policy = config.memory_policies()[given["memory"]] if "memory" in given else None
        size = int(given["micro_batch"]) if "micro_batch" in given else None
        plan = planner.plan(one.cfg, ranks=one.ranks, memory=policy, micro_batch=size, model=one.model)
        assert plan.peak_bytes <= planner.capacity(one.cluster), command


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("planned_gigabytes", "said"), [(10.0, 0), (8.0, 0), (6.0, 1), (15.0, 1), (None, 0)])
def test_a_departure_from_the_plan_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planned_gigabytes: float | None, said: int
) -> None:
    monkeypatch.setattr(telemetry, "peak_memory", lambda: 10.0)
    lengths: Any = {"total_steps": 10, "steps_per_epoch": 5, "images_per_step": 8}
    sinks: Any = {"wandb": "disabled", "project": "p", "tensorboard": False}
    one = telemetry.Telemetry(tmp_path, name="x", config={}, **lengths, **sinks)
    one.planned_gigabytes = planned_gigabytes
    for step in (1, 2, 3):
        one.step(torch.tensor(1.0), applied=True)
        one.train(step)
    lines = [line for line in telemetry.read_record(tmp_path) if line["event"] == "memory"]
    assert len(lines) == said
    assert all(line["planned_gigabytes"] == planned_gigabytes for line in lines)


def test_offloaded_states_cross_once_whatever_is_accumulated() -> None:
    """Gradients leave with each micro-batch, weights come back once; the states themselves stay with the host."""
    once, twice = (planned("parallel=zero1_host", f"micro_batch={size}") for size in (32, 16))
    link, weights = once.cluster.gigabytes_per_second * 1e9, once.plan.parameters / once.plan.ranks
    seconds = [planner.step_seconds(one.plan, one.cluster)["offload"] for one in (once, twice)]
    assert seconds == pytest.approx([weights * (4 + 2) / link, weights * (8 + 2) / link])
    assert once.plan.host_bytes == once.plan.host_states_bytes > 0
