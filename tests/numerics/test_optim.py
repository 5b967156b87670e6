"""Parameter groups and learning rates equal the released recipes, value by value."""

import json

import pytest
import torch
from golden import GOLDEN
from torch import nn

import swinv2_scale
from swinv2_scale.models.simmim import SimMIM
from swinv2_scale.optim import Schedule, decays, parameter_groups

SCHEDULES = json.loads((GOLDEN / "lr_schedules.json").read_text())


@pytest.mark.parametrize("golden", SCHEDULES, ids=["cosine", "cosine_laid_over", "multistep", "linear"])
def test_learning_rate_of_every_step(golden: dict) -> None:
    per_epoch = golden["steps_per_epoch"]
    steps, warmup = golden["epochs"] * per_epoch, golden["warmup_epochs"] * per_epoch
    drop = next((i for i, lr in enumerate(golden["lr"]) if i > warmup and lr < golden["base_lr"]), steps)
    schedule = Schedule(
        kind=golden["name"],
        lr=golden["base_lr"],
        # the released linear schedule ends at 1 % of the peak, whatever its configuration's minimum says
        minimum_lr=0.01 * golden["base_lr"] if golden["name"] == "linear" else golden["min_lr"],
        warmup_lr=golden["warmup_lr"],
        steps=steps,
        warmup_steps=warmup,
        warmup_prefix=golden["warmup_prefix"],
        milestones=(drop,),
    )
    assert [schedule(step) for step in range(steps)] == pytest.approx(golden["lr"], rel=1e-12)


def test_groups_of_every_parameter() -> None:
    golden = json.loads((GOLDEN / "param_groups_layer_decay.json").read_text())
    model = swinv2_scale.create_model(
        "t", embed_dim=32, num_heads=[1, 2, 4, 8], absolute_pos_embed=True, image_size=64, num_classes=10
    )
    groups = parameter_groups(model, golden["depths"], weight_decay=0.05, layer_decay=golden["layer_decay"])
    ours = {name: group for group in groups for name in group["names"]}
    assert sorted(ours) == sorted(parameter["name"] for parameter in golden["parameters"])
    assert sum(len(group["params"]) for group in groups) == len(ours), "a parameter stands in two groups"
    for parameter in golden["parameters"]:
        group = ours[parameter["name"]]
        assert group["lr_scale"] == pytest.approx(parameter["lr_scale"], rel=1e-12), parameter["name"]
        assert (group["weight_decay"] > 0) == parameter["weight_decay"], parameter["name"]


def test_simmim_names_have_the_same_layers_as_the_backbone() -> None:
    model = SimMIM(swinv2_scale.create_model("debug", num_classes=0), norm_target_window=0)
    groups = parameter_groups(model, [2, 2, 2, 2], weight_decay=0.05, layer_decay=0.5)
    scale = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert scale["encoder.mask_token"] == scale["encoder.patch_embed.proj.weight"] == 0.5**9
    assert scale["encoder.layers.3.blocks.1.mlp.fc1.weight"] == 0.5
    assert scale["decoder.0.weight"] == scale["encoder.norm.weight"] == 1.0


def test_a_parameter_without_pattern_is_refused() -> None:
    with pytest.raises(ValueError, match=r"WEIGHT_DECAY covers the parameter 'gain'"):
        decays("gain", nn.Parameter(torch.zeros(2, 2)))


def test_impossible_schedules_are_refused() -> None:
    values = {"lr": 1.0, "minimum_lr": 0.0, "warmup_lr": 0.0, "steps": 10, "warmup_prefix": True}
    with pytest.raises(ValueError, match="'exponential'"):
        Schedule(kind="exponential", warmup_steps=2, **values)
    with pytest.raises(ValueError, match="11 steps is longer than the run of 10"):
        Schedule(kind="cosine", warmup_steps=11, **values)


def test_the_rate_of_an_encoder_is_scaled():
    from tiny_detector import detector

    groups = parameter_groups(detector(), [2, 2, 2, 2], weight_decay=0.05, layer_decay=None, encoder_scale=0.1)
    scales = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert {scale for name, scale in scales.items() if name.startswith("encoder.")} == {0.1}
    assert {scale for name, scale in scales.items() if not name.startswith("encoder.")} == {1.0}
