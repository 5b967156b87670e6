"""Files for other programs: weights that say what model they are of, and graphs that run without this project.

    .safetensors   the weights in the released naming, for any image size; the header holds the configuration
    .pt2           torch.export: runs where PyTorch is, `torch.export.load(path).module()(images)`
    .onnx          ONNX: runs in onnxruntime and others; input "images", output "logits" or "embedding"

A graph is of one image size and any number of images. In it the attention is written in basic operations, and the
position bias is a table: the network that computes it depends on nothing but the window, and stays behind.
"""

import copy
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from swinv2_scale import config
from swinv2_scale.models import memory
from swinv2_scale.models.convert import describe, load_checkpoint
from swinv2_scale.models.swin_v2 import SwinTransformerV2, WindowAttention

FORMATS = {".safetensors": "safetensors", ".pt2": "torch-export", ".onnx": "onnx"}
# The largest difference between a graph and the model, relative to the largest output; float32 gives about 1e-6.
TOLERANCE = 1e-4
CHECKED_BATCHES = (1, 3)


class Loaded(NamedTuple):
    """A model in evaluation mode, and what is known of it: "model" (arguments), "pretrained_windows", "classes"."""

    model: SwinTransformerV2
    metadata: dict[str, Any]


def model_of(path: str | Path, size: str | None = None, **overrides: Any) -> Loaded:
    """The model that a file of weights is of, with these weights; of a SimMIM, its encoder.

    Depths, widths and heads are the file's. What it leaves open (other libraries do not store window and image size)
    comes from conf/model/{size}.yaml, or from `overrides`, constructor arguments that replace everything else. Raises
    ValueError when something stays open, when `size` is another model, and for what `load_checkpoint` refuses.
    """
    found, report = describe(Path(path))
    usual = config.plain(config.compose_model(size or "t", **overrides))
    del usual["_target_"]
    known = {**found.arguments, **overrides}
    if size is None and (lost := [name for name in ("window_size", "image_size") if name not in known]):
        raise ValueError(
            f"checkpoint {path} does not say the {' and '.join(lost)} of its model: name its size (--model t) "
            f"or give {' '.join(f'{name}=…' for name in lost)}"
        )
    for name in ("embed_dim", "depths", "num_heads"):
        if size is not None and usual[name] != found.arguments[name]:
            raise ValueError(f"checkpoint {path} has {name}={found.arguments[name]}, model {size} has {usual[name]}")
    if strange := sorted(known.keys() - usual.keys()):
        raise ValueError(f"checkpoint {path} has a configuration with {', '.join(strange)}: a newer version wrote it")
    arguments = {**usual, **known}
    # Not config.instantiate: a configuration out of a file must not choose what is called.
    model = SwinTransformerV2(**arguments).eval()
    windows = model.pretrained_windows if overrides.get("pretrained_window_size") is not None else None
    load_checkpoint(model, path, pretrained_windows=windows)
    metadata = {"model": arguments, "pretrained_windows": model.pretrained_windows, "classes": report.classes}
    return Loaded(model, metadata)


def export(
    loaded: Loaded, destination: Path, *, image_size: Sequence[int] | None = None, opset: int | None = None
) -> float | None:
    """Write a model in the format that the suffix of `destination` says (see the head of this file).

    image_size (rows, columns) and opset (of ONNX; None: PyTorch's default) are for graphs. A graph is loaded again and
    compared with the model at batch sizes 1 and 3: returned is the largest difference, relative to the largest output;
    None for weights. Raises ValueError for what does not fit the format, a destination that exists, and an opset that
    ONNX cannot express the model in.
    """
    form = format_of(destination)
    if form == "safetensors":
        if image_size is not None or opset is not None:
            raise ValueError("safetensors holds weights, which fit any image size: leave out --image-size and --opset")
        save_weights(loaded, destination)
        return None
    if form == "torch-export" and opset is not None:
        raise ValueError(f"--opset {opset} is for ONNX files: leave it out, or name the destination .onnx")
    size = _pair(loaded.metadata["model"]["image_size"] if image_size is None else image_size)
    metadata = {**loaded.metadata, "image_size": size}
    if form == "onnx":
        save_onnx(loaded.model, destination, image_size=size, metadata=metadata, opset=opset)
    else:
        save_torch_export(loaded.model, destination, image_size=size, metadata=metadata)
    difference = largest_difference(loaded.model, destination, size)
    if not difference <= TOLERANCE:
        destination.unlink()
        raise RuntimeError(f"the graph does not compute what the model does: off by {difference:.1e}, not written")
    return difference


def format_of(destination: Path) -> str:
    """The format that a file's suffix stands for. Raises ValueError for an unknown one, and for a file that exists."""
    if destination.suffix not in FORMATS:
        raise ValueError(f"{destination} must end in one of {', '.join(FORMATS)}: that says what is written")
    if destination.exists():
        raise ValueError(f"{destination} exists: remove it or choose another name")
    return FORMATS[destination.suffix]


def save_weights(loaded: Loaded, destination: Path) -> None:
    """Write the weights in the released naming, with the configuration in the header."""
    header = {name: json.dumps(value) for name, value in loaded.metadata.items()} | {"format": "pt"}
    save_file({name: p.detach().contiguous() for name, p in loaded.model.named_parameters()}, destination, header)


def save_torch_export(
    model: SwinTransformerV2, destination: Path, *, image_size: Sequence[int], metadata: dict[str, Any]
) -> None:
    """Write the graph as torch.export does; the metadata lies beside it as the extra file metadata.json."""
    program = _program(model, image_size)
    torch.export.save(program, destination, extra_files={"metadata.json": json.dumps(metadata)})


def save_onnx(
    model: SwinTransformerV2,
    destination: Path,
    *,
    image_size: Sequence[int],
    metadata: dict[str, Any],
    opset: int | None = None,
) -> None:
    """Write the graph as ONNX with the metadata as JSON strings; beyond 2 GB the weights lie in a file beside it."""
    require("export", "onnx", "onnxscript", "onnxruntime")
    output = "embedding" if isinstance(model.head, nn.Identity) else "logits"
    program = torch.onnx.export(
        _program(model, image_size),
        input_names=["images"],
        output_names=[output],
        opset_version=opset,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    written = program.model.opset_imports[""]
    if opset not in (None, written):
        raise ValueError(f"--opset {opset}: this model needs opset {written}, and cannot be converted from it")
    program.model.metadata_props.update({name: json.dumps(value) for name, value in metadata.items()})
    program.save(destination)


class Table(nn.Module):
    """Stands for a PositionBias at one window: returns its table, (heads, *(2·w - 1 per axis))."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, window: Sequence[int], reference_window: Sequence[int]) -> Tensor:
        return self.get_buffer("table")


@torch.no_grad()
def frozen(model: SwinTransformerV2, image_size: Sequence[int]) -> SwinTransformerV2:
    """A copy that shares the weights, as it computes images of one size: no policies, plain attention, bias tables."""
    twin = copy.deepcopy(model, memo={id(p): p for p in model.parameters()}).eval()
    memory.remove(twin)
    for module in twin.modules():
        if isinstance(module, WindowAttention):
            module.implementation = "reference"
            module.cpb_mlp.register_forward_hook(_keep_table)
    twin(torch.zeros(1, twin.patch_embed.proj.in_channels, *image_size, device=twin.norm.weight.device))
    for module in twin.modules():
        if isinstance(module, WindowAttention):
            module.cpb_mlp = Table(module.cpb_mlp.table)  # type: ignore[assignment,arg-type]
    return twin


def _keep_table(bias: nn.Module, _: Any, table: Tensor) -> None:
    bias.table = table.contiguous()


def _program(model: SwinTransformerV2, image_size: Sequence[int]) -> torch.export.ExportedProgram:
    twin = frozen(model, image_size)
    # Two images: a batch of one would be taken for a constant.
    images = torch.zeros(2, twin.patch_embed.proj.in_channels, *image_size, device=twin.norm.weight.device)
    with torch.no_grad():
        return torch.export.export(twin, (images,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})


@torch.no_grad()
def largest_difference(model: SwinTransformerV2, file: Path, image_size: Sequence[int]) -> float:
    """Between a file of a graph and the model, for random images at CHECKED_BATCHES, relative to the largest output."""
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for batch in CHECKED_BATCHES:
        images = torch.randn(batch, model.patch_embed.proj.in_channels, *image_size, generator=generator)
        expected = model(images.to(model.norm.weight.device)).cpu()
        ratios.append(float((run(file, images) - expected).abs().max() / expected.abs().max()))
    return max(ratios)


def run(file: Path, images: Tensor) -> Tensor:
    """What a .pt2 or .onnx file computes from images (B, in_channels, Y, X), on the CPU."""
    if file.suffix == ".onnx":
        require("export", "onnxruntime")
        import onnxruntime

        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    return torch.export.load(file).module()(images)


def require(extra: str, *modules: str) -> None:
    """Raises ValueError that names the pip extra when a module that it brings is missing."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(f"this needs {module} ({error}): pip install 'swinv2-scale[{extra}]'") from error


def settings(words: Sequence[str]) -> dict[str, Any]:
    """key=value words as arguments, the values read as YAML: window_size=[8,16]. Raises ValueError for other words."""
    pairs = [word.partition("=") for word in words]
    if wrong := [word for word, (key, _, value) in zip(words, pairs, strict=True) if not key or not value]:
        raise ValueError(f"{wrong[0]!r} is not a setting: write key=value, for example window_size=16")
    return {key: yaml.safe_load(value) for key, _, value in pairs}


def size_in_pixels(text: str) -> list[int]:
    """256 or 256x320 (rows x columns) as (rows, columns). Raises ValueError for anything else."""
    parts = text.lower().split("x")
    if len(parts) not in (1, 2) or not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"image size {text!r}: write pixels, 256, or rows x columns, 256x320")
    return _pair([int(part) for part in parts] * (2 // len(parts)))


def _pair(size: int | Sequence[int]) -> list[int]:
    return [size, size] if isinstance(size, int) else list(size)
