"""Outputs and every gradient equal the released research code, in float64 and float32."""

import pytest
import torch
from golden import backbone, load, relative_error, simmim
from torch import Tensor, nn

CLASSIFIERS = [
    "classifier_w4_64px",
    "classifier_w4to8_128px",
    "classifier_ape_w7_112px_5ch",
    "classifier_extra_norm_every2",
]
SIMMIM = ["simmim_plain", "simmim_norm_target47"]


def bounds(name: str, dtype: torch.dtype) -> tuple[float, float]:
    """Relative bounds for outputs and for gradients, which are stored as float32."""
    if name == "classifier_extra_norm_every2":  # computed in float32: its own rounding remains in float64
        return (1e-5, 5e-5)  # in float32 the order of sums is the processor's: 1.4e-6 on one, below 1e-6 on another
    return (1e-4, 1e-4) if dtype == torch.float32 else (1e-8, 1e-7)


def check_gradients(model: nn.Module, expected: dict[str, Tensor], limit: float) -> None:
    parameters = dict(model.named_parameters())
    assert parameters.keys() == expected.keys()
    for name, gradient in expected.items():
        assert parameters[name].grad is not None, name
        assert relative_error(parameters[name].grad, gradient) <= limit, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier(name: str, dtype: torch.dtype) -> None:
    config, golden = load(name)
    model = backbone(config).to(dtype)
    model.load_state_dict(golden["param"])
    limit, gradient_limit = bounds(name, dtype)

    image = golden["input"]["image"].to(dtype)
    maps = model.forward_features(image)
    for stage, (layer, feature_map) in enumerate(zip(model.layers, maps, strict=True)):
        merged = feature_map if layer.downsample is None else layer.downsample(feature_map)
        if f"after_layer{stage}" in golden["output"]:
            assert relative_error(merged.flatten(1, 2), golden["output"][f"after_layer{stage}"]) <= limit

    logits = model(image)
    assert relative_error(logits, golden["output"]["logits"]) <= limit
    loss = (logits * golden["input"]["weight"].to(dtype)).sum()
    assert relative_error(loss, golden["output"]["loss"]) <= 10 * limit  # a sum that cancels
    loss.backward()
    check_gradients(model, golden["grad"], gradient_limit)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", SIMMIM)
def test_simmim(name: str, dtype: torch.dtype) -> None:
    config, golden = load(name)
    model = simmim(config).to(dtype)
    model.load_state_dict(golden["param"])
    loss = model(golden["input"]["image"].to(dtype), golden["input"]["mask"])
    limit, gradient_limit = bounds(name, dtype)
    assert relative_error(loss, golden["output"]["loss"]) <= limit
    loss.backward()
    check_gradients(model, golden["grad"], gradient_limit)
