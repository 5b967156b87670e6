"""Weights from a file into a model, whatever layout the file has (see layouts.py).

Files are read as safetensors, or as pickles of which only tensors are rebuilt: nothing in them is executed.
"""

import json
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from swinv2_scale.models import inert_pickle
from swinv2_scale.models.layouts import DERIVED, detect, to_released
from swinv2_scale.models.simmim import SimMIM
from swinv2_scale.models.swin_v2 import SwinTransformerV2

# Parts that a model may have and a file may lack, and the other way round.
OPTIONAL = re.compile(r"(encoder\.)?(head\.|mask_token$)|decoder\.")


@dataclass
class Report:
    """What became of each tensor of a checkpoint. `fresh` are parameters of the model that it did not have."""

    path: Path
    layout: str
    loaded: list[str] = field(default_factory=list)
    renamed: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    pretrained_windows: list[list[int]] | None = None
    classes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.path} ({self.layout} layout): {len(self.loaded)} tensors loaded"]
        for name in ("renamed", "dropped", "fresh"):
            values = getattr(self, name)
            if values:
                lines.append(f"  {name} {len(values)}: {', '.join(values[:4])}{' …' if len(values) > 4 else ''}")
        if self.pretrained_windows:
            lines.append(f"  position bias measured in windows of {self.pretrained_windows}")
        return "\n".join(lines)


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file. Raises ValueError that says what is wrong with the file."""
    if not path.is_file():
        what = "this is a directory, name the file in it" if path.is_dir() else "there is no such file"
        raise ValueError(f"checkpoint {path}: {what}")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
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
    return tensors, {}


def load_checkpoint(model: nn.Module, path: str | Path) -> Report:
    """Load weights into a SwinTransformerV2 or a SimMIM, in place.

    What OPTIONAL lists may be missing or of another shape: then it stays fresh.

    Weights of another window or image size fit, because the position bias is a function of coordinates; a file of ours
    also says in which window's units they are measured. Raises ValueError for a file that cannot be read, and for the
    checkpoint of another model, naming the first tensor that differs; the model is unchanged then.
    """
    tensors, metadata, report = read_released(Path(path))
    own = dict(model.named_parameters())
    tensors = for_model(tensors, isinstance(model, SimMIM), report)
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
    report.fresh = [name for name in own if name not in tensors or name in report.dropped]
    missing = [name for name in report.fresh if not OPTIONAL.match(name)]
    if missing:
        raise ValueError(f"checkpoint {path} is of another model: it lacks {missing[0]} and {len(missing) - 1} more")
    with torch.no_grad():
        for name in report.loaded:
            own[name].copy_(tensors[name])
    if "pretrained_windows" in metadata:
        report.pretrained_windows = json.loads(metadata["pretrained_windows"])
        backbone = model.encoder if isinstance(model, SimMIM) else model
        assert isinstance(backbone, SwinTransformerV2)
        backbone.pretrained_windows = report.pretrained_windows
    return report


def read_released(path: Path) -> tuple[dict[str, Tensor], dict[str, str], Report]:
    """The tensors of a file of any layout under released names, its metadata, and what was renamed and dropped."""
    tensors, metadata = read_checkpoint(path)
    try:
        layout = detect(tensors)
        released = to_released(tensors, layout)
    except ValueError as error:
        raise ValueError(f"checkpoint {path}: {error}") from error
    dropped = [name for name in tensors if DERIVED.search(name) or name.endswith("attn.k_bias")]
    return (
        released,
        metadata,
        Report(path, layout=layout, dropped=dropped, classes=json.loads(metadata.get("classes", "[]"))),
    )


def for_model(tensors: dict[str, Tensor], for_simmim: bool, report: Report) -> dict[str, Tensor]:
    """The tensors with or without a SimMIM encoder's prefix, as the model has it."""
    from_simmim = any(name.startswith("encoder.") for name in tensors)
    if from_simmim and not for_simmim:
        report.renamed.append("encoder.* -> *")
        own = [name for name in tensors if not name.startswith("encoder.") or name == "encoder.mask_token"]
        report.dropped += own
        tensors = {name.removeprefix("encoder."): tensor for name, tensor in tensors.items() if name not in own}
    elif for_simmim and not from_simmim:
        report.renamed.append("* -> encoder.*")
        tensors = {f"encoder.{name}": tensor for name, tensor in tensors.items()}
    return tensors


def _fits(parameter: nn.Parameter | None, tensor: Tensor) -> bool:
    return parameter is not None and parameter.shape == tensor.shape


def _saved_as(metadata: dict[str, str]) -> str:
    if "model" not in metadata:
        return ""
    saved = json.loads(metadata["model"])
    return ": it was saved with " + ", ".join(f"{key}={saved[key]}" for key in ("embed_dim", "depths", "num_heads"))
