"""Logits and every gradient equal timm's SwinTransformerV2 in float64, where timm's windows divide the maps."""

import importlib
import math

import pytest
import torch
from golden import relative_error

from swinv2_scale.models.swin_v2 import SwinTransformerV2

operator = importlib.import_module("swinv2_scale.ops.cosine_window_attention")  # the package exports the function
timm_model = pytest.importorskip("timm.models.swin_transformer_v2")

CASES = {  # image, window, pretrained windows; the last stages shrink the window, some to one axis, some to one token
    "w4": (64, 4, None),
    "w4 to 1 token": (32, 4, None),
    "w7 odd map": (112, 7, None),
    "w8": (128, 8, None),
    "w12": (96, 12, None),
    "w16": (128, 16, None),
    "w16 pretrained 8": (128, 16, [8, 8, 8, 4]),
    "w8 pretrained 12": (64, 8, [12, 12, 12, 6]),
    "w4 pretrained 1": (64, 4, [2, 2, 1, 1]),
    "w9 odd maps": (72, 9, None),
    "wide image": ((64, 128), 8, None),
    "high image": ((128, 32), 8, None),
    "window 4 by 6": ((64, 96), [(4, 6)] * 4, [(4, 6), (4, 6), (4, 6), (2, 3)]),
}


def timm_name(name: str) -> str:
    """timm puts patch merging at the start of the next stage, and the classifier inside its head."""
    parts = name.split(".")
    if parts[2:3] == ["downsample"]:
        parts[1] = str(int(parts[1]) + 1)
    if parts[0] == "head":
        parts.insert(1, "fc")
    return ".".join(parts)


@pytest.mark.parametrize(("image", "window", "pretrained"), CASES.values(), ids=CASES.keys())
def test_logits_and_gradients(image, window, pretrained, monkeypatch: pytest.MonkeyPatch) -> None:
    # timm clamps at the exact log 100. The float32 of the released code differs by 6e-8, which would hide all else.
    monkeypatch.setattr(operator, "MAX_LOGIT_SCALE", math.log(100))
    ours = SwinTransformerV2(
        in_channels=2,
        embed_dim=12,
        depths=[2, 2, 3, 2],
        num_heads=[1, 2, 3, 4],
        window_size=window,
        pretrained_window_size=pretrained,
        mlp_ratio=3.0,
        drop_path_rate=0.0,
        extra_norm_period=0,
        absolute_pos_embed=False,
        num_classes=7,
        image_size=image,
        weight_init="released",
    ).double()
    theirs = timm_model.SwinTransformerV2(
        img_size=image,
        in_chans=2,
        embed_dim=12,
        depths=(2, 2, 3, 2),
        num_heads=(1, 2, 3, 4),
        window_size=window,
        pretrained_window_sizes=pretrained or (0, 0, 0, 0),
        mlp_ratio=3.0,
        drop_path_rate=0.0,
        num_classes=7,
    ).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            if name.endswith("logit_scale"):
                parameter.add_(3.0)
            elif "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    ours.layers[0].blocks[1].attn.logit_scale.data.fill_(5.0)  # beyond the clamp
    theirs.load_state_dict({timm_name(name): tensor for name, tensor in ours.state_dict().items()})

    size = (image, image) if isinstance(image, int) else image
    images = torch.randn(2, 2, *size, generator=generator, dtype=torch.float64)
    expected, logits = theirs(images), ours(images)
    assert relative_error(logits, expected) < 1e-12
    weight = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    expected.backward(weight)
    logits.backward(weight)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    largest = max(gradient.norm() for gradient in gradients.values())
    for name, parameter in ours.named_parameters():
        gradient = gradients.pop(timm_name(name))
        # a window of one token has no use for its scale and its bias: their gradients are rounding
        assert relative_error(parameter.grad, gradient) < 1e-11 or gradient.norm() < 1e-12 * largest, name
    assert not gradients
