"""The feature interface: maps of every stage for necks and heads of other projects, and the page that describes it."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models.swin_transformer_v2 import SwinTransformerV2 as TimmSwinTransformerV2
from torchvision.ops import FeaturePyramidNetwork

import swinv2_scale
from swinv2_scale import config
from swinv2_scale.cli import main
from swinv2_scale.models.layouts import from_released
from swinv2_scale.models.swin_v2 import SwinTransformerV2

PAGE = Path(__file__).parents[2] / "docs/features.md"


def trained(**arguments: object) -> SwinTransformerV2:
    """A model whose every parameter matters: norms of a fresh block are zero."""
    torch.manual_seed(0)
    model = swinv2_scale.create_model("debug", **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.5 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("size", [(128, 128), (64, 96), (50, 70), (33, 4)])
def test_one_map_per_stage_channels_last(size: tuple[int, int]) -> None:
    model = trained(num_classes=0)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        maps = model.forward_features(images)
        pooled = model.norm(maps[-1]).mean(dim=(1, 2))
        torch.testing.assert_close(model(images), pooled)
    strides = (4, 8, 16, 32)
    assert [tuple(m.shape) for m in maps] == [
        (2, -(-size[0] // s), -(-size[1] // s), c) for s, c in zip(strides, model.widths, strict=True)
    ]
    assert model.widths == [32, 64, 128, 256]


def test_the_maps_are_those_of_timm() -> None:
    model = trained(image_size=64, window_size=4, num_classes=0)
    other = TimmSwinTransformerV2(
        img_size=64, window_size=4, embed_dim=32, depths=(2,) * 4, num_heads=(1, 2, 4, 8), num_classes=0
    ).eval()
    other.load_state_dict(from_released(dict(model.named_parameters()), "timm"), strict=False)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        theirs = other.forward_intermediates(images, intermediates_only=True, output_fmt="NCHW")
        for ours, map_BCYX in zip(model.forward_features(images), theirs, strict=True):
            torch.testing.assert_close(ours.permute(0, 3, 1, 2), map_BCYX, rtol=0, atol=2e-5)


def test_a_feature_pyramid_trains_the_backbone() -> None:
    model = trained(image_size=64, window_size=4, num_classes=0).train()
    pyramid = FeaturePyramidNetwork(model.widths, out_channels=16)
    parameters = [*model.parameters(), *pyramid.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=1e-5)
    images = torch.randn(2, 3, 64, 80)

    def loss() -> torch.Tensor:
        maps = model.forward_features(images)
        levels = pyramid({str(i): m.permute(0, 3, 1, 2) for i, m in enumerate(maps)})
        assert [tuple(level.shape) for level in levels.values()] == [
            (2, 16, 16, 20),
            (2, 16, 8, 10),
            (2, 16, 4, 5),
            (2, 16, 2, 3),
        ]
        return sum(((level - 1) ** 2).mean() for level in levels.values())  # type: ignore[return-value]

    before = loss()
    before.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert sorted(without) == ["norm.bias", "norm.weight"]  # the maps are taken before it
    assert model.patch_embed.proj.weight.grad.isfinite().all()
    weight = model.patch_embed.proj.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(weight, model.patch_embed.proj.weight)
    assert loss() < before


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_the_page_shows_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands in their order, then its blocks of Python, where there is a run and a folder of pictures."""
    arguments = {"num_classes": 3, "depths": [1, 1], "num_heads": [1, 2]}  # exporting takes a second a block
    model = trained(**arguments)
    header = {
        "model": config.plain(config.compose_model("debug", **arguments)),
        "pretrained_windows": model.pretrained_windows,
        "classes": ["cat", "dog", "cow"],
    }
    (tmp_path / "runs/mine").mkdir(parents=True)
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    save_file(
        tensors, tmp_path / "runs/mine/model.safetensors", {key: json.dumps(value) for key, value in header.items()}
    )
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "IMAGES" / name).mkdir(parents=True)
        Image.new("RGB", (40, 30), (100 * number, 50, 200)).save(tmp_path / "IMAGES" / name / "a.jpg")
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text()
    commands = re.findall(r"^    swinv2-scale (.*)$", text, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        assert main(shlex.split(command)) == 0, command
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        names: dict = {}
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["logits"].shape == (5, 3) and json.loads(names["names"]) == ["cat", "dog", "cow"]
