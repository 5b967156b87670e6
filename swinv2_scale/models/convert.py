"""Weights from a file into a model, whatever layout the file has (see layouts.py).

Files are read as safetensors, or as pickles of which only tensors are rebuilt: nothing in them is executed.
"""

import json
import math
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from swinv2_scale import distributed
from swinv2_scale.models import inert_pickle
from swinv2_scale.models.infer import Inferred, infer, windows_of
from swinv2_scale.models.layouts import DERIVED, detect, to_released
from swinv2_scale.models.swin_v2 import SwinTransformerV2
from swinv2_scale.models.video import inflate, is_of_images

# Parts that a model may have and a file may lack, and the other way round.
OPTIONAL = re.compile(r"(encoder\.)?(head\.|mask_token$)|decoder\.")


# Synsets of ImageNet-1K in the order of its labels, each with its label in the 21,841 classes of ImageNet-22K, or -.
CLASS_MAP = Path(__file__).parent / "imagenet_22k_to_1k.txt"
IMAGENET_22K, IMAGENET_1K = 21_841, 1000


@dataclass
class Report:
    """What became of each tensor of a checkpoint: every one is in `loaded` or in `dropped`.

    renamed      prefixes that went or came
    transferred  what was fitted to another window, image size, number of channels or classes, and how
    missing      parameters of the model that the file does not have; they stay fresh
    warnings     what the user should know or decide
    """

    path: Path
    layout: str
    tensors: int = 0
    parameters: int = 0
    loaded: list[str] = field(default_factory=list)
    renamed: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    transferred: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    pretrained_windows: list[list[int]] | None = None
    classes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.path} ({self.layout} layout): {len(self.loaded)} tensors loaded"]
        for name in ("renamed", "dropped", "missing"):
            values = getattr(self, name)
            if values:
                lines.append(f"  {name} {len(values)}: {', '.join(values[:4])}{' …' if len(values) > 4 else ''}")
        lines += [f"  transferred: {text}" for text in self.transferred]
        if self.pretrained_windows:
            lines.append(f"  position bias measured in windows of {self.pretrained_windows}")
        return "\n".join(lines + [f"  warning: {text}" for text in self.warnings])


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file. Raises ValueError that says what is wrong with the file."""
    if not path.is_file():
        what = "this is a directory, name the file in it" if path.is_dir() else "there is no such file"
        raise ValueError(f"checkpoint {path}: {what}")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return _finite({name: file.get_tensor(name) for name in file.keys()}, path), file.metadata() or {}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"checkpoint {path} is damaged or no safetensors file: {error}") from error
    try:
        content = inert_pickle.load(path)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"checkpoint {path} is damaged or no file of torch.save: {reason}") from error
    tensors = content.get("model", content.get("state_dict", content)) if isinstance(content, dict) else {}
    if not isinstance(tensors, dict) or not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"checkpoint {path} holds no model weights: expected tensors by name, or those under 'model'")
    return _finite(tensors, path), {}


def load_checkpoint(
    model: nn.Module, path: str | Path, *, pretrained_windows: Sequence[Sequence[int]] | None = None
) -> Report:
    """Load weights into a SwinTransformerV2, SimMIM or UPerNet, in place, and say what became of them; see `fitted`.

    What the file lacks stays fresh. The model is unchanged if the file is refused.
    """
    tensors, report = fitted(model, path, pretrained_windows=pretrained_windows)
    own = model.state_dict()
    with torch.no_grad():
        for name in report.loaded:
            own[name].copy_(tensors[name])
    return report


def fitted(
    model: nn.Module, path: str | Path, *, pretrained_windows: Sequence[Sequence[int]] | None = None
) -> tuple[dict[str, Tensor], Report]:
    """A file's tensors as they fit a SwinTransformerV2, SimMIM or UPerNet, maybe on the meta device; and a report.

    What OPTIONAL lists may be missing or of another shape: then it stays fresh, and a head with a warning.
    Transferred are: any window and image size, because the position bias is a function of coordinates, measured in
    units of the windows that the file was pretrained at (it says so in its metadata or its tables;
    `pretrained_windows` overrides, one per stage), which the model is set to; an absolute position embedding,
    bicubically; input channels, see `fit_channels`; a head of ImageNet-22K's 21,841 classes to ImageNet-1K's, see
    `fit_classes`; and weights of images to a model of clips, see video.py. Tensors of safetensors files are mapped:
    they are read when they are used. Raises ValueError for a file that cannot be read, and for the checkpoint of
    another model, naming the first tensor that differs.
    """
    tensors, metadata, report = read_released(Path(path))
    own = model.state_dict()
    backbone = model if isinstance(model, SwinTransformerV2) else model.encoder
    assert isinstance(backbone, SwinTransformerV2)
    tensors = for_model(tensors, backbone is not model, report)
    if backbone.patch_embed.frames is not None and is_of_images(tensors):
        tensors = inflate(tensors, backbone.patch_embed.frames)
        report.transferred.append("weights of images -> clips, position bias equal at all times")
    transfer(tensors, own, backbone, report)
    for name, tensor in tensors.items():
        if OPTIONAL.match(name) and not _fits(own.get(name), tensor):
            report.dropped.append(name)
        elif not _fits(own.get(name), tensor):
            ours = f"has {name} with shape {tuple(own[name].shape)}" if name in own else f"has no {name}"
            raise ValueError(
                f"checkpoint {path} is of another model: it has {name} with shape {tuple(tensor.shape)}, "
                f"this model {ours}. Choose the one that was saved (embed_dim, depths, num_heads){_saved_as(metadata)}"
            )
        else:
            report.loaded.append(name)
    report.missing = [name for name in own if name not in tensors or name in report.dropped]
    lacking = [name for name in report.missing if not OPTIONAL.match(name)]
    if lacking:
        raise ValueError(f"checkpoint {path} is of another model: it lacks {lacking[0]} and {len(lacking) - 1} more")
    if "head.weight" in report.missing and "head.weight" in tensors:
        kinds = f"{len(tensors['head.weight'])} classes, the model {len(own['head.weight'])}"
        report.warnings.append(f"the file has {kinds}: the head is fresh and must be trained")
    transfer_windows(backbone, pretrained_windows or report.pretrained_windows, report)
    if distributed.rank() == 0:
        print(report, flush=True)
    return {name: tensors[name] for name in report.loaded}, report


def read_released(path: Path) -> tuple[dict[str, Tensor], dict[str, str], Report]:
    """The tensors of a file of any layout under released names, its metadata, and what was renamed and dropped."""
    raw, metadata = read_checkpoint(path)
    released, report = _released(path, raw, metadata)
    return released, metadata, report


def describe(path: Path) -> tuple[Inferred, Report]:
    """The model that a file is of: as its metadata say, else as its names and shapes tell."""
    raw, metadata = read_checkpoint(path)
    released, report = _released(path, raw, metadata)
    try:
        found = infer(released, raw)
    except ValueError as error:
        raise ValueError(f"checkpoint {path}: {error}") from error
    if "model" in metadata:
        saved = {key: value for key, value in json.loads(metadata["model"]).items() if key != "_target_"}
        found = Inferred(saved | {"num_classes": found.arguments["num_classes"]}, map_classes=found.map_classes)
    found.pretrained_windows = report.pretrained_windows
    return found, report


def _released(path: Path, raw: dict[str, Tensor], metadata: dict[str, str]) -> tuple[dict[str, Tensor], Report]:
    try:
        layout = detect(raw)
        released = to_released(raw, layout)
    except ValueError as error:
        raise ValueError(f"checkpoint {path}: {error}") from error
    dropped = [name for name in raw if DERIVED.search(name) or name.endswith("attn.k_bias")]
    report = Report(
        path,
        layout,
        tensors=len(released),
        parameters=sum(tensor.numel() for tensor in released.values()),
        dropped=dropped,
        classes=json.loads(metadata.get("classes", "[]")),
    )
    tables = windows_of(raw)
    if "pretrained_windows" in metadata:
        report.pretrained_windows = json.loads(metadata["pretrained_windows"])
    elif tables is not None:
        report.pretrained_windows = tables[1]
    return released, report


def transfer(
    tensors: dict[str, Tensor], own: Mapping[str, Tensor], backbone: SwinTransformerV2, report: Report
) -> None:
    """Fit, in place, the tensors that may have another shape than the model's."""
    for name, tensor in tensors.items():
        target = own.get(name)
        if target is None or target.shape == tensor.shape:
            continue
        if name.endswith("patch_embed.proj.weight") and tensor.shape[0] == target.shape[0]:
            tensors[name] = fit_channels(tensor, target.shape[1])
            report.transferred.append(f"{name}: {tensor.shape[1]} -> {target.shape[1]} input channels")
        elif name.endswith("absolute_pos_embed") and tensor.shape[2] == target.shape[2]:
            tensors[name] = _fit_positions(tensor, backbone.absolute_grid)
            report.transferred.append(f"{name}: {tensor.shape[1]} -> {target.shape[1]} positions, bicubic")
        elif name in ("head.weight", "head.bias") and (len(tensor), len(target)) == (IMAGENET_22K, IMAGENET_1K):
            tensors[name] = fit_classes(tensor, report.classes)
            report.transferred.append(f"{name}: {len(tensor)} -> {len(target)} classes, ImageNet-22K to ImageNet-1K")
    if any(name.startswith("head.") for name in report.transferred):
        report.classes = []  # the names of the 21,841


def transfer_windows(backbone: SwinTransformerV2, references: Sequence[Sequence[int]] | None, report: Report) -> None:
    """Let the position bias measure in the units that the weights were trained with, and report what that means."""
    if references is None:
        report.warnings.append(
            "the file does not say at which window it was pretrained: its position bias is taken to measure in windows "
            f"of {backbone.pretrained_windows}; if that is wrong, give pretrained_window_size"
        )
        return
    windows = backbone.windows
    if len(references) != len(windows):
        raise ValueError(f"pretrained_windows {references}: give one (rows, columns) for each of {len(windows)} stages")
    # Windows of images have no time, which is then measured in windows of the model.
    report.pretrained_windows = [
        [*own[: len(own) - len(reference)], *reference]
        for own, reference in zip(backbone.pretrained_windows, references, strict=True)
    ]
    backbone.pretrained_windows = report.pretrained_windows
    if windows != report.pretrained_windows:
        report.transferred.append(f"position bias of windows {report.pretrained_windows} -> windows {windows}")


def fit_channels(weight: Tensor, channels: int) -> Tensor:
    """A patch convolution (C, old, 4, 4) for another number of input channels.

    One channel takes the sum, so that a grey image gives what its copy in every channel gave. Otherwise channel j takes
    the weights of channel j mod old, all scaled by old / channels, so that activations keep their size.
    """
    old = weight.shape[1]
    if channels == 1:
        return weight.sum(dim=1, keepdim=True)
    return weight[:, torch.arange(channels) % old] * (old / channels)


def fit_classes(tensor: Tensor, classes: Sequence[str]) -> Tensor:
    """Rows of a head for ImageNet-22K's 21,841 classes, in ImageNet-1K's order: (21841, …) -> (1000, …).

    `classes` are the synsets of the rows when the file names them; else they are taken in their usual order, sorted.
    ImageNet-22K lacks one synset, n04399382 (teddy bear): its row becomes the mean of the others.
    """
    rows = [line.split() for line in CLASS_MAP.read_text().splitlines()]
    label = {synset: number for number, synset in enumerate(classes)}
    source = [label.get(synset) if classes else None if row == "-" else int(row) for synset, row in rows]
    known = [row for row in source if row is not None]
    if not known:
        raise ValueError(f"none of ImageNet-1K's synsets is among the classes of the file ({', '.join(classes[:3])} …)")
    mean = tensor[known].mean(dim=0)
    return torch.stack([mean if row is None else tensor[row] for row in source])


def for_model(tensors: dict[str, Tensor], for_encoder: bool, report: Report) -> dict[str, Tensor]:
    """The tensors with or without the prefix of an encoder (of a SimMIM, of a UPerNet), as the model has it."""
    from_encoder = any(name.startswith("encoder.") for name in tensors)
    if from_encoder and not for_encoder:
        report.renamed.append("encoder.* -> *")
        own = [name for name in tensors if not name.startswith("encoder.") or name == "encoder.mask_token"]
        report.dropped += own
        tensors = {name.removeprefix("encoder."): tensor for name, tensor in tensors.items() if name not in own}
    elif for_encoder and not from_encoder:
        report.renamed.append("* -> encoder.*")
        tensors = {f"encoder.{name}": tensor for name, tensor in tensors.items()}
    return tensors


def _finite(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    for name, tensor in tensors.items():
        if not DERIVED.search(name) and not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise ValueError(
                f"checkpoint {path}: {count} of {tensor.numel()} values of {name} are not finite. The training that "
                "wrote it diverged, or the file is damaged: take an earlier one"
            )
    return tensors


def _fit_positions(embedding: Tensor, grid: Sequence[int]) -> Tensor:
    """Absolute position embedding (1, N, C) of a square image for another grid, as the released code resizes it."""
    side = math.isqrt(embedding.shape[1])
    if side**2 != embedding.shape[1]:
        raise ValueError(
            f"absolute_pos_embed has {embedding.shape[1]} positions, which is no square: cannot be resized"
        )
    square = embedding.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    return F.interpolate(square, size=list(grid), mode="bicubic").flatten(2).transpose(1, 2)


def _fits(parameter: Tensor | None, tensor: Tensor) -> bool:
    return parameter is not None and parameter.shape == tensor.shape


def _saved_as(metadata: dict[str, str]) -> str:
    if "model" not in metadata:
        return ""
    saved = json.loads(metadata["model"])
    return ": it was saved with " + ", ".join(f"{key}={saved[key]}" for key in ("embed_dim", "depths", "num_heads"))
