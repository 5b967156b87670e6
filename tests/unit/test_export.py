"""Exported files compute what the model does, at every batch size, and say what model they are of."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import swinv2_scale
from swinv2_scale import config
from swinv2_scale.cli import main
from swinv2_scale.export import export, frozen, model_of, require, run, save_onnx, settings, size_in_pixels
from swinv2_scale.models import memory
from swinv2_scale.models.simmim import SimMIM
from swinv2_scale.models.swin_v2 import SwinTransformerV2

# A map of 18 x 25 patches: windows that do not divide it, shifts, odd merging, padding, an extra norm.
UGLY = {"image_size": [72, 100], "window_size": [4, 3], "extra_norm_period": 2, "num_classes": 5, "depths": [2, 1]}
UGLY |= {"num_heads": [1, 2]}
PLAIN = {"image_size": 64, "window_size": 4, "num_classes": 0, "depths": [1, 2], "num_heads": [1, 2]}


def trained(**arguments: object) -> SwinTransformerV2:
    """A model whose every parameter matters: norms of a fresh block are zero."""
    torch.manual_seed(0)
    model = swinv2_scale.create_model("debug", **arguments)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "cpb_mlp" in name:  # else the biases hardly vary, and attention does not see a constant
                parameter.mul_(10)
            if parameter.dim() == 1 or "logit_scale" in name:
                parameter.add_(0.5 * torch.randn_like(parameter))
    return model.eval()


def saved(path: Path, model: torch.nn.Module, backbone: SwinTransformerV2, arguments: dict, classes: list) -> Path:
    """A checkpoint as a run writes it."""
    cfg = config.plain(config.compose_model("debug", **arguments))
    header = {"model": cfg, "pretrained_windows": backbone.pretrained_windows, "classes": classes}
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    save_file(tensors, path, {key: json.dumps(value) for key, value in header.items()} | {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def ugly(tmp_path_factory: pytest.TempPathFactory) -> tuple[SwinTransformerV2, Path]:
    model = trained(**UGLY)
    return model, saved(tmp_path_factory.mktemp("ugly") / "model.safetensors", model, model, UGLY, list("abcde"))


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_graph_computes_what_the_model_does(suffix: str, ugly, tmp_path: Path, capsys) -> None:
    model, checkpoint = ugly
    file = tmp_path / f"model{suffix}"
    assert main(["checkpoint", "export", str(checkpoint), str(file)]) == 0
    assert str(file) in capsys.readouterr().out
    for batch in (1, 2, 3):  # the graph was made from two
        images = torch.randn(batch, 3, 72, 100)
        with torch.no_grad():
            expected = model(images)
        logits = run(file, images)
        assert logits.shape == (batch, 5)
        assert expected.std() > 0.1
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
        assert (logits.argmax(1) == expected.argmax(1)).all()
    names, metadata = inside(file)
    assert metadata["model"]["embed_dim"] == 32 and metadata["image_size"] == [72, 100]
    assert metadata["classes"] == list("abcde") and metadata["pretrained_windows"] == model.pretrained_windows
    # The network of the position bias is a table, and nothing of our own is called.
    assert not any("sigmoid" in name.lower() or "swinv2" in name.lower() for name in names)


def inside(file: Path) -> tuple[set[str], dict]:
    """The operators of a graph, and the metadata."""
    if file.suffix == ".onnx":
        import onnx

        model = onnx.load(file)
        onnx.checker.check_model(model)
        names = {f"{node.domain}.{node.op_type}" for node in model.graph.node}
        return names, {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    extra = {"metadata.json": ""}
    program = torch.export.load(file, extra_files=extra)
    graphs = [module for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    names = {str(node.target) for module in graphs for node in module.graph.nodes if node.op == "call_function"}
    return names, json.loads(extra["metadata.json"])


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_another_size_and_opset_and_no_head(tmp_path: Path, capsys) -> None:
    import onnx

    model = trained(**PLAIN)
    checkpoint = saved(tmp_path / "model.safetensors", model, model, PLAIN, [])
    file = tmp_path / "model.onnx"
    options = ["window_size=6", "--format", "onnx", "--image-size", "96x64", "--opset", "18"]
    assert main(["checkpoint", "export", str(checkpoint), str(file), *options]) == 0, capsys.readouterr().err
    wider = swinv2_scale.create_model("debug", **PLAIN | {"window_size": 6}).eval()
    swinv2_scale.load_checkpoint(wider, checkpoint)
    images = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        torch.testing.assert_close(run(file, images), wider(images), rtol=0, atol=1e-5)
        assert (model(images) - wider(images)).abs().max() > 1e-3
    graph = onnx.load(file)
    assert [node.name for node in graph.graph.output] == ["embedding"]
    assert [entry.version for entry in graph.opset_import if not entry.domain] == [18]


def test_a_copy_for_export_has_no_policies_and_shares_the_weights() -> None:
    model = trained(**PLAIN)
    policy = {"stages": None, "every": 1, "attention_stages": None, "mlp_tokens": 16}
    memory.apply(model, activations="recompute", attention="sequential", **policy)
    model.train()
    twin = frozen(model, (64, 64))
    assert not twin.training and model.training
    attention = [module for module in twin.modules() if hasattr(module, "implementation")]
    assert len(attention) == 3 and all(module.implementation == "reference" for module in attention)
    assert not any("forward" in module.__dict__ for module in twin.modules())
    assert all("forward" in block.__dict__ for blocks in model.blocks() for block in blocks)
    assert not any(block.attn.cpb_mlp._forward_hooks for blocks in model.blocks() for block in blocks)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in twin.parameters()} < own
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(twin(images), model.eval()(images), rtol=0, atol=1e-6)


def test_weights_with_their_configuration(ugly, tmp_path: Path) -> None:
    model, checkpoint = ugly
    file = tmp_path / "weights.safetensors"
    assert main(["checkpoint", "export", str(checkpoint), str(file), "--format", "safetensors"]) == 0
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == "pt" and json.loads(metadata["model"])["depths"] == [2, 1]
    assert json.loads(metadata["classes"]) == list("abcde")
    images = torch.randn(2, 3, 72, 100)
    with torch.no_grad():
        expected = model(images)
        assert torch.equal(model_of(file).model(images), expected)
        assert torch.equal(swinv2_scale.create_model("debug", checkpoint=file, **UGLY).eval()(images), expected)


def test_of_a_simmim_the_encoder(tmp_path: Path) -> None:
    arguments = {**PLAIN, "num_classes": 1000}  # as the run's configuration says, while the encoder has no head
    encoder = trained(**PLAIN)
    simmim = SimMIM(encoder, norm_target_window=0)
    checkpoint = saved(tmp_path / "simmim.safetensors", simmim, encoder, arguments, [])
    export(model_of(checkpoint), tmp_path / "encoder.safetensors")
    with safe_open(tmp_path / "encoder.safetensors", framework="pt") as opened:
        names = set(opened.keys())
        assert json.loads(opened.metadata()["model"])["num_classes"] == 0
    assert names == {name for name, _ in encoder.named_parameters() if name != "mask_token"}
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model_of(tmp_path / "encoder.safetensors").model(images), encoder(images))


def test_a_file_that_does_not_say_its_windows(tmp_path: Path) -> None:
    size = {"window_size": 8, "image_size": 128}
    model = trained(**size)
    bare = tmp_path / "bare.pth"
    torch.save({"model": model.state_dict()}, bare)
    with pytest.raises(ValueError, match=r"does not say the window_size and image_size.*--model t.* window_size=…"):
        model_of(bare)
    with pytest.raises(ValueError, match=r"has embed_dim=32, model t has 96"):
        model_of(bare, "t")
    images = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        for loaded in (model_of(bare, "debug"), model_of(bare, **size)):
            assert torch.equal(loaded.model(images), model(images))
            assert loaded.metadata["model"]["window_size"] == 8


def test_a_pretrained_window_that_the_user_knows_better(ugly) -> None:
    _, checkpoint = ugly
    assert model_of(checkpoint, pretrained_window_size=7).model.pretrained_windows == [[7, 7]] * 2
    assert model_of(checkpoint, window_size=2).model.pretrained_windows == [[4, 3]] * 2


def test_a_configuration_in_a_file_calls_nothing(tmp_path: Path) -> None:
    model = trained(**PLAIN)
    whole = config.plain(config.compose_model("debug", **PLAIN))
    touched = tmp_path / "touched"
    file = tmp_path / "evil.safetensors"
    call = {"_target_": "pathlib.Path.touch", "_args_": [{"_target_": "pathlib.Path", "_args_": [str(touched)]}]}
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    save_file(tensors, file, {"model": json.dumps({**whole, "mlp_ratio": call}), "format": "pt"})
    with pytest.raises((TypeError, ValueError)):
        model_of(file)
    assert not touched.exists()
    save_file(tensors, file, {"model": json.dumps({**whole, "soul": 1}), "format": "pt"})
    with pytest.raises(ValueError, match="a configuration with soul"):
        model_of(file)


@pytest.mark.parametrize(
    ("destination", "options", "message"),
    [
        ("model.bin", [], r"must end in one of \.safetensors, \.pt2, \.onnx"),
        ("model.pt2", ["--format", "onnx"], r"model\.pt2 is no name for onnx"),
        ("model.pt2", ["--opset", "18"], "--opset 18 is for ONNX"),
        ("model.safetensors", ["--image-size", "64"], "leave out --image-size"),
        ("model.pt2", ["--image-size", "64x"], "image size '64x'"),
        ("model.pt2", ["window"], "'window' is not a setting"),
        ("model.pt2", ["window_sise=3"], "Did you mean 'window_size'"),
        ("taken.pt2", [], "exists"),
    ],
)
def test_what_cannot_be_exported(destination: str, options: list[str], message: str, ugly, tmp_path: Path, capsys):
    _, checkpoint = ugly
    (tmp_path / "taken.pt2").touch()
    assert main(["checkpoint", "export", str(checkpoint), str(tmp_path / destination), *options]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert [path.name for path in tmp_path.iterdir()] == ["taken.pt2"]


def test_a_graph_that_computes_something_else_is_not_left(ugly, tmp_path: Path, monkeypatch) -> None:
    _, checkpoint = ugly
    monkeypatch.setattr("swinv2_scale.export.run", lambda file, images: torch.zeros(len(images), 5))
    with pytest.raises(RuntimeError, match="does not compute what the model does"):
        export(model_of(checkpoint), tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_a_missing_library_names_the_extra(tmp_path: Path, monkeypatch) -> None:
    for name in ("onnx", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"needs onnx .*pip install 'swinv2-scale\[export\]'"):
        save_onnx(trained(**PLAIN), tmp_path / "model.onnx", image_size=(64, 64), metadata={})
    with pytest.raises(ValueError, match=r"needs pyarrow .*swinv2-scale\[embed\]"):
        require("embed", "pyarrow")


def test_words() -> None:
    assert settings(["window_size=[8,16]", "drop_path_rate=0.1", "pretrained_window_size=null"]) == {
        "window_size": [8, 16],
        "drop_path_rate": 0.1,
        "pretrained_window_size": None,
    }
    assert size_in_pixels("256") == [256, 256] and size_in_pixels("256x320") == [256, 320]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near_single(dtype: torch.dtype) -> None:
    """model.half() casts the logit scale and the bias network too; the operator still computes them in float32."""
    model = trained(**UGLY)
    images = torch.randn(4, 3, 72, 100)
    with torch.no_grad():
        expected = model(images)
        maps = model.forward_features(images)
        half = trained(**UGLY).to(dtype)
        assert {parameter.dtype for parameter in half.parameters()} == {dtype}
        logits, half_maps = half(images), half.forward_features(images.to(dtype))
    assert logits.dtype == dtype and logits.isfinite().all()
    # One rounding of a value of order 1 is epsilon / 2; a dozen roundings lie one after the other.
    bound = 8 * torch.finfo(dtype).eps * float(expected.abs().max())
    assert 0 < (logits.float() - expected).abs().max() < bound
    for single, other in zip(maps, half_maps, strict=True):
        assert other.dtype == dtype and (other.float() - single).norm() < 8 * torch.finfo(dtype).eps * single.norm()
