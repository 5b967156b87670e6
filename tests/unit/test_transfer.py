"""What a file tells of its model, and weights at another window, size, number of channels or classes."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import swinv2_scale
from swinv2_scale.cli import main
from swinv2_scale.models.convert import CLASS_MAP, describe, fit_channels, fit_classes, load_checkpoint
from swinv2_scale.models.layouts import LAYOUTS, from_released
from swinv2_scale.models.simmim import SimMIM
from swinv2_scale.models.swin_v2 import SwinTransformerV2

SMALL = {"embed_dim": 8, "depths": [1, 2, 6, 2], "num_heads": [1, 2, 4, 8], "num_classes": 10}


def model(**arguments: object) -> SwinTransformerV2:
    built = swinv2_scale.create_model("debug", **{**SMALL, **arguments})
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(0, 0.3)
    return built


def released_tables(windows: list[int], references: list[int], grid: int) -> dict[str, Tensor]:
    """The buffers that the released code saves, written out as loops; its shift masks have one matrix per window."""
    tables = {}
    for stage, (w, p) in enumerate(zip(windows, references, strict=True)):
        table = torch.zeros(1, 2 * w - 1, 2 * w - 1, 2)
        for row in range(2 * w - 1):
            for column in range(2 * w - 1):
                for axis, offset in enumerate((row - w + 1, column - w + 1)):
                    x = offset / max(p - 1, 1) * 8
                    table[0, row, column, axis] = math.copysign(math.log2(abs(x) + 1) / math.log2(8), x)
        for block in range(SMALL["depths"][stage]):
            stem = f"layers.{stage}.blocks.{block}"
            tables[f"{stem}.attn.relative_coords_table"] = table.clone()
            tables[f"{stem}.attn.relative_position_index"] = torch.zeros(w * w, w * w, dtype=torch.int64)
            if block % 2 and w < grid >> stage:
                tables[f"{stem}.attn_mask"] = torch.zeros(((grid >> stage) // w) ** 2, w * w, w * w)
    return tables


@pytest.mark.parametrize("simmim", [False, True])
@pytest.mark.parametrize(
    ("windows", "references", "grid", "window_size"),
    [
        ([8, 8, 8, 8], [8, 8, 8, 8], 64, 8),
        ([12, 12, 12, 6], [12, 12, 12, 6], 48, 12),
        ([16, 16, 16, 8], [12, 12, 12, 6], 64, 16),
        ([24, 24, 24, 12], [12, 12, 12, 6], 96, 24),
        ([4, 4, 2, 1], [4, 4, 2, 1], 8, 4),
    ],
)
def test_a_released_file_tells_its_model(
    tmp_path: Path, windows: list[int], references: list[int], grid: int, window_size: int, simmim: bool
) -> None:
    source = model(extra_norm_period=6, in_channels=2, mlp_ratio=2.0, num_classes=0 if simmim else 10)
    tensors = {**source.state_dict(), **released_tables(windows, references, grid)}
    if simmim:
        tensors = {f"encoder.{name}": tensor for name, tensor in tensors.items()}
        tensors |= {"encoder.mask_token": torch.zeros(1, 1, 8), "decoder.0.bias": torch.zeros(2)}
    torch.save({"model": tensors}, tmp_path / "file.pth")
    found, report = describe(tmp_path / "file.pth")
    assert found.ambiguous == {}
    assert found.arguments == {
        **SMALL,
        "in_channels": 2,
        "mlp_ratio": 2.0,
        "extra_norm_period": 6,
        "absolute_pos_embed": False,
        "num_classes": 0 if simmim else 10,
        "image_size": 4 * grid,
        "window_size": window_size,
        "pretrained_window_size": [[p, p] for p in references],
    }
    opened = swinv2_scale.create_model(checkpoint=tmp_path / "file.pth", drop_path_rate=0.1)
    assert opened.windows == [[w, w] for w in windows]
    assert opened.pretrained_windows == report.pretrained_windows == [[p, p] for p in references]
    assert torch.equal(opened.layers[2].blocks[5].enorm.weight, source.layers[2].blocks[5].enorm.weight)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_without_tables_leaves_windows_open(
    tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(from_released(model().state_dict(), layout), tmp_path / "file.safetensors")
    found, _ = describe(tmp_path / "file.safetensors")
    assert {key: found.arguments[key] for key in SMALL} == SMALL
    assert list(found.ambiguous) == ["window_size", "image_size", "pretrained_window_size"]
    with pytest.raises(ValueError, match=r"leaves open image_size \(.*no tables.*give image_size=…"):
        swinv2_scale.create_model(checkpoint=tmp_path / "file.safetensors", window_size=6)
    opened = swinv2_scale.create_model(checkpoint=tmp_path / "file.safetensors", window_size=6, image_size=96)
    assert opened.pretrained_windows == [[6, 6], [6, 6], [6, 6], [3, 3]]
    assert "does not say at which window it was pretrained" in capsys.readouterr().out


def test_a_configuration_in_a_file_is_not_executed(tmp_path: Path) -> None:
    target = tmp_path / "executed"
    harmful = {"_target_": "pathlib.Path.touch", "_args_": [{"_target_": "pathlib.Path", "_args_": [str(target)]}]}
    arguments = {**SMALL, "window_size": 4, "image_size": 64, "mlp_ratio": harmful}
    save_file(model().state_dict(), tmp_path / "m.safetensors", {"model": json.dumps(arguments)})
    with pytest.raises((ValueError, TypeError)):
        swinv2_scale.create_model(checkpoint=tmp_path / "m.safetensors")
    assert not target.exists()


def test_shallow_models_leave_the_extra_norm_open(tmp_path: Path) -> None:
    save_file(model(depths=[1, 1, 1, 1]).state_dict(), tmp_path / "file.safetensors")
    assert "extra_norm_period" in describe(tmp_path / "file.safetensors")[0].ambiguous


def test_released_h_opens_without_a_configuration(tmp_path: Path) -> None:
    """Names and shapes of H (650 million parameters) without its values."""
    with torch.device("meta"):
        tensors = swinv2_scale.create_model("h").state_dict()
    from swinv2_scale.models.infer import infer

    found = infer(tensors, tensors).arguments
    expected = {"embed_dim": 352, "depths": [2, 2, 18, 2], "num_heads": [11, 22, 44, 88], "extra_norm_period": 6}
    assert {key: found[key] for key in expected} == expected


def test_odd_models_are_refused(tmp_path: Path) -> None:
    tensors = model(extra_norm_period=2).state_dict()
    del tensors["layers.2.blocks.3.enorm.weight"], tensors["layers.2.blocks.3.enorm.bias"]
    save_file(tensors, tmp_path / "holes.safetensors")
    with pytest.raises(ValueError, match=r"after every 2 blocks.*layers\.2\.blocks\.3"):
        describe(tmp_path / "holes.safetensors")
    tensors = model().state_dict()
    tensors["patch_embed.proj.weight"] = torch.zeros(8, 3, 2, 2)
    save_file(tensors, tmp_path / "patch.safetensors")
    with pytest.raises(ValueError, match=r"only patches of 4×4"):
        describe(tmp_path / "patch.safetensors")
    del tensors["patch_embed.proj.weight"]
    save_file(tensors, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match="not a whole model"):
        describe(tmp_path / "part.safetensors")


def test_the_pretrained_window_follows_the_weights_through_two_transfers(tmp_path: Path) -> None:
    """12 -> 16 -> 24, as a released file and then as ours: the bias at equal offsets never changes."""
    source = model(image_size=192, window_size=12)
    torch.save(
        {"model": {**source.state_dict(), **released_tables([12, 12, 12, 6], [12, 12, 12, 6], 48)}}, tmp_path / "r"
    )
    second = swinv2_scale.create_model("debug", **SMALL, image_size=256, window_size=16)
    report = load_checkpoint(second, tmp_path / "r")
    references = [[12, 12], [12, 12], [12, 12], [6, 6]]
    assert second.pretrained_windows == references
    assert any("windows [[12, 12]" in text and "[[16, 16]" in text for text in report.transferred)
    save_file(second.state_dict(), tmp_path / "s.safetensors", {"pretrained_windows": json.dumps(references)})
    # a pretrained_window_size that contradicts the file does not win: the file knows
    third = swinv2_scale.create_model(
        "debug",
        **SMALL,
        image_size=384,
        window_size=(24, 18),
        pretrained_window_size=16,
        checkpoint=tmp_path / "s.safetensors",
    )
    assert third.pretrained_windows == references
    a, b = source.layers[0].blocks[0], third.layers[0].blocks[0]
    small, large = a.attn.cpb_mlp([12, 12], a.reference_window), b.attn.cpb_mlp([24, 18], b.reference_window)
    assert torch.allclose(large[:, 12:35, 6:29], small, atol=1e-5)
    overridden = swinv2_scale.create_model("debug", **SMALL)
    load_checkpoint(overridden, tmp_path / "s.safetensors", pretrained_windows=[[8, 8]] * 4)
    assert overridden.pretrained_windows == [[8, 8]] * 4


def test_the_same_window_is_no_transfer(tmp_path: Path) -> None:
    source = model(image_size=192, window_size=12)
    meta = {"pretrained_windows": json.dumps(source.pretrained_windows)}
    save_file(source.state_dict(), tmp_path / "m.safetensors", meta)
    report = load_checkpoint(model(image_size=192, window_size=12), tmp_path / "m.safetensors")
    assert report.transferred == report.missing == report.dropped == report.warnings == []


def test_input_channels(tmp_path: Path) -> None:
    weight = torch.arange(6.0).view(1, 3, 2, 1)  # channel sums 1, 5, 9 over the patch
    assert fit_channels(weight, 1).flatten().tolist() == [6.0, 9.0]
    assert torch.allclose(fit_channels(weight, 5).sum((0, 2, 3)), torch.tensor([1.0, 5, 9, 1, 5]) * 3 / 5)
    assert torch.allclose(fit_channels(weight, 2).sum((0, 2, 3)), torch.tensor([1.0, 5]) * 3 / 2)
    source = model()
    save_file(source.state_dict(), tmp_path / "m.safetensors")
    grey = swinv2_scale.create_model("debug", **SMALL, in_channels=1)
    report = load_checkpoint(grey, tmp_path / "m.safetensors")
    assert report.transferred == ["patch_embed.proj.weight: 3 -> 1 input channels"]
    images = torch.rand(2, 1, 64, 64)
    assert torch.allclose(grey.eval()(images), source.eval()(images.expand(-1, 3, -1, -1)), atol=1e-4)


def test_absolute_positions_are_resized(tmp_path: Path) -> None:
    source = model(absolute_pos_embed=True, image_size=64)
    with torch.no_grad():
        rows = torch.arange(16.0).view(16, 1, 1).expand(16, 16, 8)
        source.absolute_pos_embed.copy_(rows.reshape(1, 256, 8))
    save_file(source.state_dict(), tmp_path / "m.safetensors")
    target = swinv2_scale.create_model("debug", **SMALL, absolute_pos_embed=True, image_size=(128, 64))
    load_checkpoint(target, tmp_path / "m.safetensors")
    resized = target.absolute_pos_embed.detach().view(32, 16, 8)
    assert torch.allclose(resized, resized[:, :1, :1].expand_as(resized), atol=1e-5)  # rows stay rows
    assert torch.allclose(resized[6:28, 0, 0] - resized[4:26, 0, 0], torch.tensor(1.0), atol=0.01)


def test_class_map_is_that_of_the_synset_lists() -> None:
    info = Path(pytest.importorskip("timm").__file__).parent / "data" / "_info"
    small, large = (
        [line.split()[0] for line in (info / name).read_text().splitlines()]
        for name in ("imagenet_synsets.txt", "imagenet22k_synsets.txt")
    )
    label = {synset: str(number) for number, synset in enumerate(large)}
    assert [line.split() for line in CLASS_MAP.read_text().splitlines()] == [[s, label.get(s, "-")] for s in small]
    assert len(large) == 21841 and len(small) == 1000 and [s for s in small if s not in label] == ["n04399382"]


def test_a_head_of_imagenet_22k_becomes_one_of_imagenet_1k(tmp_path: Path) -> None:
    source = model(num_classes=21841)
    save_file(source.state_dict(), tmp_path / "m.safetensors")
    target = swinv2_scale.create_model("debug", **{**SMALL, "num_classes": 1000})
    report = load_checkpoint(target, tmp_path / "m.safetensors")
    assert len(report.transferred) == 2 and report.missing == []
    images = torch.rand(2, 3, 64, 64)
    wide, narrow = source.eval()(images), target.eval()(images)
    index = [int(row) if row != "-" else -1 for row in (line.split()[1] for line in CLASS_MAP.read_text().splitlines())]
    known = [i for i, row in enumerate(index) if row >= 0]
    assert torch.allclose(narrow[:, known], wide[:, [index[i] for i in known]], atol=1e-4)
    assert torch.allclose(narrow[:, 850], narrow[:, known].mean(dim=1), atol=1e-3)  # teddy bear, not in ImageNet-22K


def test_classes_go_by_name_where_the_file_has_them() -> None:
    synsets = [line.split()[0] for line in CLASS_MAP.read_text().splitlines()]
    names = list(reversed(synsets))
    assert torch.equal(fit_classes(torch.arange(1000.0), names), torch.arange(999.0, -1.0, -1.0))
    with pytest.raises(ValueError, match=r"none of ImageNet-1K's synsets .*\(cat, dog …\)"):
        fit_classes(torch.zeros(2), ["cat", "dog"])


def test_another_number_of_classes_is_a_warning(tmp_path: Path) -> None:
    save_file(model(num_classes=7).state_dict(), tmp_path / "m.safetensors")
    report = load_checkpoint(swinv2_scale.create_model("debug", **SMALL), tmp_path / "m.safetensors")
    assert report.missing == ["head.weight", "head.bias"]
    assert any("the file has 7 classes, the model 10" in text for text in report.warnings)


def test_every_tensor_is_accounted_for(tmp_path: Path) -> None:
    pretrained = SimMIM(model(num_classes=0), norm_target_window=0).state_dict()
    save_file(pretrained, tmp_path / "m.safetensors")
    report = load_checkpoint(swinv2_scale.create_model("debug", **SMALL), tmp_path / "m.safetensors")
    assert sorted(report.loaded + [name.removeprefix("encoder.") for name in report.dropped]) == sorted(
        name.removeprefix("encoder.") for name in pretrained
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["m.safetensors", "m.pth"])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, name: str, value: float) -> None:
    tensors = model().state_dict()
    tensors["layers.1.blocks.0.norm1.bias"][3] = value
    if name.endswith("safetensors"):
        save_file(tensors, tmp_path / name)
    else:
        torch.save({"model": tensors}, tmp_path / name)
    with pytest.raises(ValueError, match=r"1 of 16 values of layers\.1\.blocks\.0\.norm1\.bias are not finite"):
        load_checkpoint(model(), tmp_path / name)


def test_inspect_and_convert_say_the_windows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = released_tables([16, 16, 16, 8], [12, 12, 12, 6], 64)
    torch.save({"model": {**model().state_dict(), **tables}}, tmp_path / "r.pth")
    assert main(["checkpoint", "inspect", str(tmp_path / "r.pth")]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["model"]["window_size"] == 16 and facts["pretrained_windows"][3] == [6, 6]
    assert facts["head_width"] == 8 and facts["open"] == {}
    assert main(["checkpoint", "convert", str(tmp_path / "r.pth"), str(tmp_path / "t"), "--to", "timm"]) == 0
    assert "load with pretrained_window_sizes=[12, 12, 12, 6]" in capsys.readouterr().out
    assert not any("table" in name for name in load_file(tmp_path / "t"))
    # what was only in the tables is in the converted file's metadata
    assert main(["checkpoint", "convert", str(tmp_path / "r.pth"), str(tmp_path / "o"), "--to", "released"]) == 0
    (tmp_path / "o").rename(tmp_path / "o.safetensors")
    assert describe(tmp_path / "o.safetensors")[0].pretrained_windows == [[12, 12], [12, 12], [12, 12], [6, 6]]
