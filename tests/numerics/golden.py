"""Load the golden vectors: models, inputs, outputs and gradients made once with the released research code."""

import json
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from swinv2_scale.models.simmim import SimMIM
from swinv2_scale.models.swin_v2 import SwinTransformerV2

GOLDEN = Path(__file__).parents[1] / "golden"


def load(name: str) -> tuple[dict, dict[str, dict[str, Tensor]]]:
    """The constructor arguments, and the tensors by part (param, input, output, grad) under this project's names."""
    config = json.loads((GOLDEN / f"{name}.json").read_text())
    parts: dict[str, dict[str, Tensor]] = {"param": {}, "input": {}, "output": {}, "grad": {}}
    for key, tensor in load_file(GOLDEN / f"{name}.safetensors").items():
        part, _, rest = key.partition(".")
        parts[part][rest.replace("rpe_mlp", "cpb_mlp")] = tensor
    return config, parts


def backbone(config: dict) -> SwinTransformerV2:
    """The model that a golden configuration describes, in this project's argument names."""
    return SwinTransformerV2(
        in_channels=config.get("in_chans", 3),
        embed_dim=config["embed_dim"],
        depths=config["depths"],
        num_heads=config["num_heads"],
        window_size=config["window_size"],
        pretrained_window_size=config.get("pretrained_window_sizes"),
        mlp_ratio=4.0,
        drop_path_rate=0.0,
        extra_norm_period=config.get("endnorm_interval", 0),
        absolute_pos_embed=config.get("ape", False),
        num_classes=config.get("num_classes", 0),
        image_size=config["img_size"],
        weight_init="released",
    )


def simmim(config: dict) -> SimMIM:
    """The SimMIM model of a golden configuration."""
    window = config["norm_target_patch_size"] if config["norm_target"] else 0
    return SimMIM(backbone(config), norm_target_window=window)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Length of the difference in units of the expected tensor's length; a tensor of zeros must be met exactly."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-300)).item()
