"""Logits and every gradient equal those of timm, torchvision and transformers in float64, for freshly drawn weights.

Where the libraries compute something else, tests/numerics/test_divergences.py says what, and why. Here they agree:
windows divide the maps, so that none pads; torchvision has no pretrained window and never shrinks one; transformers
wants square images whose maps halve evenly; it adds the shift mask twice, so its logits stay where -100 hides a token.
"""

import importlib
import math
from collections.abc import Sequence

import pytest
import torch
from golden import relative_error
from torch import Tensor, nn

from swinv2_scale.models.layouts import DERIVED, from_released
from swinv2_scale.models.swin_v2 import SwinTransformerV2

operator = importlib.import_module("swinv2_scale.ops.cosine_window_attention")  # the package exports the function
LIBRARIES = ("timm", "torchvision", "transformers")
CLASSES, WIDTH, HEADS = 5, 8, (1, 2, 4, 4)
Size = int | tuple[int, int]
Windows = int | Sequence[int | tuple[int, int]]


def build_ours(image: Size, window: Windows, depths: Sequence[int], pretrained: Windows | None = None) -> nn.Module:
    return SwinTransformerV2(
        in_channels=3,
        embed_dim=WIDTH,
        depths=depths,
        num_heads=HEADS[: len(depths)],
        window_size=window,
        pretrained_window_size=pretrained,
        mlp_ratio=4.0,
        drop_path_rate=0.0,
        extra_norm_period=0,
        absolute_pos_embed=False,
        num_classes=CLASSES,
        image_size=image,
        weight_init="released",
    ).double()


def build_timm(image: Size, window: Windows, depths: Sequence[int], pretrained: Windows | None = None) -> nn.Module:
    timm_model = pytest.importorskip("timm.models.swin_transformer_v2")
    return timm_model.SwinTransformerV2(
        img_size=image,
        embed_dim=WIDTH,
        depths=depths,
        num_heads=HEADS[: len(depths)],
        window_size=window,
        pretrained_window_sizes=pretrained or [0] * len(depths),
        drop_path_rate=0.0,
        num_classes=CLASSES,
    ).double()


def build_torchvision(image: Size, window: int, depths: Sequence[int], pretrained: None = None) -> nn.Module:
    vision = pytest.importorskip("torchvision.models.swin_transformer")
    return vision.SwinTransformer(
        [4, 4],
        WIDTH,
        list(depths),
        list(HEADS[: len(depths)]),
        [window, window],
        stochastic_depth_prob=0.0,
        num_classes=CLASSES,
        block=vision.SwinTransformerBlockV2,
        downsample_layer=vision.PatchMergingV2,
    ).double()


def transformers_config(image: Size, window: int, depths: Sequence[int], pretrained: Sequence[int] | None = None):
    return pytest.importorskip("transformers").Swinv2Config(
        image_size=image,
        embed_dim=WIDTH,
        depths=list(depths),
        num_heads=list(HEADS[: len(depths)]),
        window_size=window,
        pretrained_window_sizes=pretrained or [0] * len(depths),
        drop_path_rate=0.0,
        num_labels=CLASSES,
        encoder_stride=4 * 2 ** (len(depths) - 1),
    )


class Logits(nn.Module):
    """A model of transformers whose forward returns what the others return; parameters keep their names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images).logits

    def named_parameters(self, *args, **kwargs):
        return self.inner.named_parameters(*args, **kwargs)

    def load_state_dict(self, *args, **kwargs):
        return self.inner.load_state_dict(*args, **kwargs)


def build_transformers(image: Size, window: int, depths: Sequence[int], pretrained=None) -> nn.Module:
    config = transformers_config(image, window, depths, pretrained)
    return Logits(pytest.importorskip("transformers").Swinv2ForImageClassification(config)).double()


BUILD = {"timm": build_timm, "torchvision": build_torchvision, "transformers": build_transformers}


def draw(model: nn.Module, logit_scale: float, seed: int = 0) -> None:
    """Every parameter random; exp(logit_scale) is about the scale of the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            if name.endswith("logit_scale"):
                parameter.add_(logit_scale)
            elif "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)


def load_into(model: nn.Module, ours: nn.Module, library: str) -> None:
    """Our weights into a library's model: all of them, and all of its own except derived buffers."""
    result = model.load_state_dict(from_released(ours.state_dict(), library), strict=False)
    assert not result.unexpected_keys
    assert [name for name in result.missing_keys if not DERIVED.search(name)] == []


def random_images(size: Size, batch: int = 2) -> Tensor:
    edges = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, 3, *edges, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gradients(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradient of a random combination of them by every parameter."""
    logits = model(images)
    generator = torch.Generator().manual_seed(2)
    logits.backward(torch.randn(logits.shape, generator=generator, dtype=torch.float64))
    return logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


CASES = {  # image, window, depths, pretrained windows, libraries; maps are a quarter of the image, halved at each stage
    "w4": (64, 4, (2, 2, 2), None, LIBRARIES),
    "w7": (112, 7, (2, 2, 2), None, LIBRARIES),
    "w8": (128, 8, (2, 2, 2), None, LIBRARIES),
    "w12": (96, 12, (2, 2), None, LIBRARIES),
    "w16": (128, 16, (2, 2), None, LIBRARIES),
    # the window shrinks, in the last stage or in the last two; w7 on maps of 4, 2 and 1 tokens
    "w4 to 1 token": (32, 4, (2, 2, 3, 2), None, ("timm", "transformers")),
    "w7 shrinks": (16, 7, (2, 2, 2), None, ("timm", "transformers")),
    "w8 to 4": (128, 8, (2, 2, 2, 2), None, ("timm", "transformers")),
    "w12 to 6": (96, 12, (2, 2, 2), None, ("timm", "transformers")),
    "w16 to 4": (128, 16, (2, 2, 2, 2), None, ("timm", "transformers")),
    # pretrained windows, smaller or larger than the window that runs
    "w8 pretrained 4": (64, 8, (2, 2, 2), [4, 4, 2], ("timm", "transformers")),
    "w16 pretrained 8": (128, 16, (2, 2, 2, 2), [8, 8, 8, 4], ("timm", "transformers")),
    "w8 pretrained 12": (64, 8, (2, 2, 2), [12, 12, 6], ("timm", "transformers")),
    "w4 pretrained 7": (64, 4, (2, 2), [7, 7], ("timm", "transformers")),
    # what timm alone has: maps of odd size that still fit, pretrained windows of one token, rectangles
    "w7 map of 7 halved to 4": (112, 7, (2, 2, 2, 2), None, ("timm",)),
    "w9 odd maps": (72, 9, (2, 2, 2), None, ("timm",)),
    "w4 pretrained 1": (64, 4, (2, 2), [2, 1], ("timm",)),
    "wide image": ((64, 128), 8, (2, 2, 2), None, ("timm",)),
    "high image": ((128, 32), 8, (2, 2, 2), None, ("timm",)),
    "window 4 by 6": ((64, 96), [(4, 6)] * 3, (2, 2, 2), [(4, 6), (4, 6), (2, 3)], ("timm",)),
}


@pytest.mark.parametrize(
    ("library", "case"), [(library, case) for case, (*_, libraries) in CASES.items() for library in libraries]
)
def test_logits_and_gradients(library: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # They clamp at the exact log 100. The float32 of the released code differs by 6e-8, which would hide all else.
    monkeypatch.setattr(operator, "MAX_LOGIT_SCALE", math.log(100))
    image, window, depths, pretrained, _ = CASES[case]
    ours = build_ours(image, window, depths, pretrained)
    # One and two shift masks differ by exp(scale + 16 - 100): nothing at a scale of 7, everything at 100.
    draw(ours, 2.0 if library == "transformers" else 3.0)
    ours.layers[0].blocks[0].attn.logit_scale.data.fill_(5.0)  # beyond the clamp, in a block without shift
    if library != "transformers":
        ours.layers[0].blocks[1].attn.logit_scale.data.fill_(5.0)  # and in one whose mask is not strict
    theirs = BUILD[library](image, window, depths, pretrained)
    load_into(theirs, ours, library)

    images = random_images(image)
    expected, expected_gradients = gradients(theirs, images)
    logits, released_gradients = gradients(ours, images)
    assert relative_error(logits, expected) < 1e-12
    found = from_released(released_gradients, library)
    assert found.keys() == expected_gradients.keys()
    largest = max(gradient.norm() for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        # a window of one token has no use for its scale and its bias: their gradients are rounding
        assert relative_error(found[name], gradient) < 1e-10 or gradient.norm() < 1e-12 * largest, name
