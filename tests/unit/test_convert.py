"""Weights from files: ours, a SimMIM encoder's, released ones; other models and damaged files are refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import swinv2_scale
from swinv2_scale.cli import main
from swinv2_scale.models.convert import load_checkpoint, read_checkpoint
from swinv2_scale.models.layouts import from_released
from swinv2_scale.models.simmim import SimMIM


def model(**arguments: object) -> swinv2_scale.models.SwinTransformerV2:
    return swinv2_scale.create_model("debug", **{"num_classes": 10, **arguments})


def test_a_simmim_encoder_becomes_a_classifier_at_another_window(tmp_path: Path) -> None:
    pretrained = SimMIM(model(num_classes=0), norm_target_window=0)
    windows = pretrained.encoder.pretrained_windows
    save_file(pretrained.state_dict(), tmp_path / "m.safetensors", {"pretrained_windows": json.dumps(windows)})
    target = model(window_size=6, image_size=96)
    report = load_checkpoint(target, tmp_path / "m.safetensors")
    assert torch.equal(target.layers[1].blocks[0].mlp.fc1.weight, pretrained.encoder.layers[1].blocks[0].mlp.fc1.weight)
    assert sorted(report.missing) == ["head.bias", "head.weight"]
    assert sorted(report.dropped) == ["decoder.0.bias", "decoder.0.weight", "encoder.mask_token"]
    assert target.pretrained_windows == windows == [[8, 8], [8, 8], [8, 8], [4, 4]]
    assert "encoder.* -> *" in str(report)


def test_a_released_file_loads_without_its_buffers(tmp_path: Path) -> None:
    source, target = model(), model()
    buffers = {
        "layers.0.blocks.1.attn_mask": torch.zeros(4, 64, 64),
        "layers.0.blocks.0.attn.relative_coords_table": torch.zeros(1),
    }
    torch.save({"model": {**source.state_dict(), **buffers}}, tmp_path / "released.pth")
    report = load_checkpoint(target, tmp_path / "released.pth")
    assert sorted(report.dropped) == sorted(buffers)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


@pytest.mark.parametrize("layout", ["timm", "torchvision", "transformers"])
def test_every_layout_loads_and_is_written_back(tmp_path: Path, layout: str) -> None:
    source = model()
    save_file(from_released(source.state_dict(), layout), tmp_path / "theirs.safetensors")
    target = model()
    report = load_checkpoint(target, tmp_path / "theirs.safetensors")
    assert report.layout == layout
    assert report.missing == []
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))
    command = ["checkpoint", "convert", str(tmp_path / "theirs.safetensors"), str(tmp_path / "ours.safetensors")]
    assert main([*command, "--to", "released"]) == 0
    assert all(
        torch.equal(source.state_dict()[name], t) for name, t in load_file(tmp_path / "ours.safetensors").items()
    )
    assert main([*command, "--to", "released"]) == 2  # does not overwrite


def test_inspect_says_what_a_file_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(model().state_dict(), tmp_path / "m.safetensors", {"pretrained_windows": "[[8, 8]]"})
    assert main(["checkpoint", "inspect", str(tmp_path / "m.safetensors")]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["layout"] == "released"
    assert facts["parameters"] == sum(parameter.numel() for parameter in model().parameters())
    assert facts["pretrained_windows"] == [[8, 8]]
    save_file({"w": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert main(["checkpoint", "inspect", str(tmp_path / "other.safetensors")]) == 2
    assert "not the weights of a Swin Transformer V2 in a known layout" in capsys.readouterr().err


def test_another_number_of_classes_keeps_the_fresh_head(tmp_path: Path) -> None:
    save_file(model(num_classes=7).state_dict(), tmp_path / "m.safetensors")
    target = model()
    head = target.head.weight.clone()
    assert load_checkpoint(target, tmp_path / "m.safetensors").missing == ["head.weight", "head.bias"]
    assert torch.equal(target.head.weight, head)


def test_the_checkpoint_of_another_model_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    other = model(embed_dim=64)
    arguments = {"embed_dim": 64, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8]}
    save_file(other.state_dict(), tmp_path / "m.safetensors", {"model": json.dumps(arguments)})
    target = model()
    before = {name: parameter.clone() for name, parameter in target.named_parameters()}
    with pytest.raises(ValueError, match=r"of another model: .*\(64,\).*\(32,\).*saved with embed_dim=64"):
        load_checkpoint(target, tmp_path / "m.safetensors")
    assert all(torch.equal(before[name], parameter) for name, parameter in target.named_parameters())
    shallow = {k: v for k, v in model().state_dict().items() if "blocks.1" not in k}
    save_file(shallow, tmp_path / "s.safetensors")
    with pytest.raises(ValueError, match=r"lacks layers.0.blocks.1.* and \d+ more"):
        load_checkpoint(target, tmp_path / "s.safetensors")


class Settings(dict):
    """As the configuration objects that training scripts save beside the weights."""

    def __init__(self, **values: object) -> None:
        super().__init__(values)
        self.frozen = True


@pytest.mark.parametrize("zipped", [True, False])
def test_a_resumable_file_loads_although_it_pickles_objects_and_code(tmp_path: Path, zipped: bool) -> None:
    source, target = model(), model()
    harmful = Malicious(tmp_path / "executed")
    content = {"model": source.state_dict(), "config": Settings(lr=0.1, names=["a"]), "epoch": 3, "extra": [harmful]}
    torch.save(content, tmp_path / "ckpt_epoch_3.pth", _use_new_zipfile_serialization=zipped)
    load_checkpoint(target, tmp_path / "ckpt_epoch_3.pth")
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))
    assert not (tmp_path / "executed").exists()
    torch.load(tmp_path / "ckpt_epoch_3.pth", weights_only=False)  # the file does harm when it is read carelessly
    assert (tmp_path / "executed").exists()


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_damaged_and_malicious_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        read_checkpoint(tmp_path / "none.pth")
    save_file(model().state_dict(), tmp_path / "m.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "m.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or no safetensors"):
        read_checkpoint(tmp_path / "cut.safetensors")
    (tmp_path / "empty.pth").touch()
    with pytest.raises(ValueError, match=r"damaged or no file of torch\.save"):
        read_checkpoint(tmp_path / "empty.pth")
    torch.save({"model": model().state_dict()}, tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:-5000])
    with pytest.raises(ValueError, match=r"damaged or no file of torch\.save"):
        read_checkpoint(tmp_path / "cut.pth")
    torch.save({"model": Malicious(tmp_path / "executed")}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="holds no model weights"):
        read_checkpoint(tmp_path / "bad.pth")
    assert not (tmp_path / "executed").exists()
    torch.save({"epoch": 3}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="holds no model weights"):
        read_checkpoint(tmp_path / "odd.pth")


def test_a_simmim_is_converted_without_its_decoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(SimMIM(model(num_classes=0), norm_target_window=0).state_dict(), tmp_path / "m.safetensors")
    assert main(["checkpoint", "convert", str(tmp_path / "m.safetensors"), str(tmp_path / "t"), "--to", "timm"]) == 0
    left_out = capsys.readouterr().out.splitlines()[0].removeprefix("left out: ").split(", ")
    assert sorted(left_out) == ["decoder.0.bias", "decoder.0.weight", "encoder.mask_token"]
    assert "layers.1.downsample.norm.weight" in load_file(tmp_path / "t")
