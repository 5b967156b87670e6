"""Log and linear spacing of the position bias: what a model trained at window 4 sees at 12, and how models carry it."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from swinv2_scale import config, create_model, load_checkpoint
from swinv2_scale.models.position_bias import PositionBias, relative_coordinates

CPU = torch.device("cpu")
SMALL = {"depths": [1, 2], "num_heads": [1, 2], "embed_dim": 16, "image_size": 32, "window_size": 4, "num_classes": 3}


@pytest.mark.parametrize("spacing", ["log", "linear"])
@pytest.mark.parametrize("window", [4, 6, 8, 12])
def test_coordinates_against_the_formula(spacing: str, window: int) -> None:
    table = relative_coordinates((window, window), (4, 4), CPU, spacing)
    assert table.shape == (2 * window - 1, 2 * window - 1, 2)
    for dy in range(1 - window, window):
        for dx in range(1 - window, window):
            x = [dy / 3, dx / 3]
            if spacing == "log":
                x = [math.copysign(math.log(8 * abs(v) + 1) / math.log(8), v) for v in x]
            assert table[dy + window - 1, dx + window - 1].tolist() == pytest.approx(x, abs=1e-6)


def test_how_far_coordinates_reach_beyond_those_of_training() -> None:
    largest = {
        (spacing, window): relative_coordinates((window, window), (4, 4), CPU, spacing).max().item()
        for spacing in ("log", "linear")
        for window in (4, 12)
    }
    assert largest["linear", 4] == 1.0  # both train at inputs of one size
    assert largest["log", 4] == pytest.approx(math.log(9, 8))
    assert largest["linear", 12] / largest["linear", 4] == pytest.approx(11 / 3)
    assert largest["log", 12] / largest["log", 4] == pytest.approx(math.log(8 * 11 / 3 + 1) / math.log(9))  # 1.57


def test_linear_extrapolates_further() -> None:
    torch.manual_seed(0)
    log, linear = PositionBias(4, spacing="log"), PositionBias(4, spacing="linear")
    linear.load_state_dict(log.state_dict())  # same names, same shapes
    change = {bias.spacing: (bias((12, 12), (4, 4)) - bias((1, 1), (4, 4))).abs().max() for bias in (log, linear)}
    assert change["linear"] > 1.5 * change["log"]


def test_a_linear_model_saves_and_loads(tmp_path: Path) -> None:
    cfg = config.compose_model("debug", **SMALL, position_bias="linear")
    assert config.plain(cfg)["position_bias"] == "linear"  # what checkpoints record, and what identifies a run
    torch.manual_seed(0)
    model = create_model("debug", **SMALL, position_bias="linear", weight_init="research")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    windows = json.dumps(model.pretrained_windows)
    save_file(model.state_dict(), tmp_path / "m.safetensors", {"pretrained_windows": windows})
    images = torch.randn(2, 3, 96, 96)
    same, other = (
        create_model("debug", **(SMALL | {"image_size": 96, "window_size": 12}), position_bias=spacing)
        for spacing in ("linear", "log")
    )
    wider = create_model("debug", **SMALL, position_bias="linear")
    assert list(model.state_dict()) == list(other.state_dict())
    for target in (same, other, wider):
        load_checkpoint(target, tmp_path / "m.safetensors")
    assert torch.equal(wider(images), model(images))
    assert {block.attn.cpb_mlp.spacing for blocks in same.blocks() for block in blocks} == {"linear"}
    assert not torch.allclose(same(images), other(images), rtol=1e-3)


def test_log_is_the_configured_spacing() -> None:
    model = create_model("debug")
    assert {block.attn.cpb_mlp.spacing for blocks in model.blocks() for block in blocks} == {"log"}


def test_an_unknown_spacing_is_refused() -> None:
    with pytest.raises(ValueError, match="position_bias must be 'log' or 'linear', got 'cubic'"):
        create_model("debug", **SMALL, position_bias="cubic")
