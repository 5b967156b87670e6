"""What model a file of weights is of, read from the names and shapes of its tensors.

Released files say nothing of their model but hold its derived tables, from which the windows follow; files without
tables (timm, safetensors, the SimMIM hub after conversion) leave the windows open.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from swinv2_scale.models.swin_v2 import PATCH

BLOCK = re.compile(r"(?:encoder\.)?layers\.(\d+)\.blocks\.(\d+)\.")
# Where a derived tensor lies, in any layout; torchvision counts stages and mergings together.
DERIVED_AT = re.compile(r"(?:layers\.(\d+)\.blocks|features\.(\d+))\.(\d+)\..*?(relative_coords_table|attn_mask)$")


@dataclass
class Inferred:
    """Constructor arguments of SwinTransformerV2 that a file determines, and those that it leaves open, and why.

    `pretrained_windows`: per stage, the window in whose units the file's position bias measures; None if not known.
    `map_classes`: of the classifier of pixels or boxes behind the model (upernet.py, detection/); 0 without one.
    """

    arguments: dict[str, Any]
    pretrained_windows: list[list[int]] | None = None
    ambiguous: dict[str, str] = field(default_factory=dict)
    map_classes: int = 0


def infer(released: Mapping[str, Tensor], raw: Mapping[str, Tensor]) -> Inferred:
    """The model of a state dict: `released` under released names, `raw` as it was read, with its derived tables.

    Raises ValueError when the tensors do not make up a model of this design, naming the first that does not fit.
    """
    tensors = {name.removeprefix("encoder."): tensor for name, tensor in released.items()}
    patch = _shape(tensors, "patch_embed.proj.weight")
    if patch[-2:] != (PATCH, PATCH):
        raise ValueError(f"patch_embed.proj.weight has shape {patch}: only patches of {PATCH}×{PATCH} pixels are known")
    places = {(int(match[1]), int(match[2])) for name in tensors if (match := BLOCK.match(name))}
    depths = [1 + max(b for s, b in places if s == stage) for stage in range(1 + max(s for s, _ in places))]
    heads = [_shape(tensors, f"layers.{stage}.blocks.0.attn.logit_scale")[0] for stage in range(len(depths))]
    hidden = _shape(tensors, "layers.0.blocks.0.mlp.fc1.weight")[0]
    arguments: dict[str, Any] = {
        "in_channels": patch[1],
        "embed_dim": patch[0],
        "depths": depths,
        "num_heads": heads,
        "mlp_ratio": hidden / patch[0],
        "extra_norm_period": _extra_norm_period(tensors, depths),
        "absolute_pos_embed": "absolute_pos_embed" in tensors,
        "num_classes": len(tensors["head.weight"]) if "head.weight" in tensors else 0,
    }
    found = Inferred(arguments)
    if len(patch) == 5:
        arguments["patch_frames"] = patch[2]
        found.ambiguous["frames"] = "weights fit clips of any length"
    if "decoder.classifier.weight" in tensors:
        found.map_classes = len(tensors["decoder.classifier.weight"])
    if "decoder.box_heads.0.classes.weight" in tensors:
        found.map_classes = len(tensors["decoder.box_heads.0.classes.weight"]) - 1  # the last one is background
    _add_windows(found, raw)
    if "absolute_pos_embed" in tensors:
        side = math.isqrt(tensors["absolute_pos_embed"].shape[1])
        arguments["image_size"] = side * PATCH
        found.ambiguous["image_size"] = f"{side * PATCH} if it was square, from absolute_pos_embed"
    if not arguments["extra_norm_period"] and max(depths) < 6:
        found.ambiguous["extra_norm_period"] = "no stage is deep enough to tell none from one after every 6 blocks"
    return found


def windows_of(raw: Mapping[str, Tensor]) -> tuple[list[list[int]], list[list[int]]] | None:
    """Per stage: the window, and the one in whose units its bias measures, from saved tables; None without them.

    A table's largest coordinate is log8(8·(w-1)/(p-1) + 1) for window w and reference p.
    """
    tables = {place[0]: table for place, table in _derived(raw, "relative_coords_table").items() if table.dim() == 4}
    if not tables or sorted(tables) != list(range(len(tables))):
        return None
    windows, references = [], []
    for _, table in sorted(tables.items()):
        sizes = [(n + 1) // 2 for n in table.shape[1:3]]
        largest = (float(table[0, -1, 0, 0]), float(table[0, 0, -1, 1]))
        windows.append(sizes)
        references.append(
            [round(1 + 8 * (w - 1) / (8**x - 1)) if w > 1 else 1 for w, x in zip(sizes, largest, strict=True)]
        )
    return windows, references


def _add_windows(found: Inferred, raw: Mapping[str, Tensor]) -> None:
    known = windows_of(raw)
    if known is None:
        for name in ("window_size", "image_size", "pretrained_window_size"):
            found.ambiguous[name] = "the file has no tables from which it could be read"
        return
    windows, found.pretrained_windows = known
    found.arguments |= {"window_size": windows, "pretrained_window_size": found.pretrained_windows}
    grid = _grid(windows, raw)
    if grid is None:
        found.ambiguous["image_size"] = "the file has neither a shift mask nor a window that shrank"
    else:
        found.arguments["image_size"] = _simple([g * PATCH for g in grid])
        fitted = [
            [min(w, math.ceil(g / 2**i)) for w, g in zip(windows[0], grid, strict=True)] for i in range(len(windows))
        ]
        if fitted == windows:
            found.arguments["window_size"] = _simple(windows[0])  # which later stages shrink to their map by themselves


def _grid(windows: list[list[int]], raw: Mapping[str, Tensor]) -> list[int] | None:
    """Patches per axis of the image size that the file was made for, taken as square, in proportion to the window."""
    for (stage, _), mask in sorted(_derived(raw, "attn_mask").items()):
        side = math.isqrt(len(mask))
        if side**2 == len(mask):
            return [side * w * 2**stage for w in windows[stage]]
    for stage, window in enumerate(windows):
        if window != windows[0]:  # it shrank to the map
            return [w * 2**stage for w in window]
    return None


def _extra_norm_period(tensors: Mapping[str, Tensor], depths: list[int]) -> int:
    """After every how many blocks of a stage an extra norm stands; 0 for none."""
    marked = {(int(m[1]), int(m[2])) for name in tensors if "enorm" in name and (m := BLOCK.match(name))}
    if not marked:
        return 0
    period = 1 + min(block for _, block in marked)
    expected = {(s, b) for s, depth in enumerate(depths) for b in range(period - 1, depth, period)}
    if marked != expected:
        odd = min(marked ^ expected)
        raise ValueError(
            f"extra norms do not stand after every {period} blocks of a stage: see layers.{odd[0]}.blocks.{odd[1]}"
        )
    return period


def _derived(raw: Mapping[str, Tensor], kind: str) -> dict[tuple[int, int], Tensor]:
    """Derived tensors of one kind by (stage, block)."""
    found = {}
    for name, tensor in raw.items():
        if (match := DERIVED_AT.search(name)) and match[4] == kind:
            found[int(match[1]) if match[1] else int(match[2]) // 2, int(match[3])] = tensor
    return found


def _simple(pair: list[int]) -> int | list[int]:
    return pair[0] if pair[0] == pair[1] else pair


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    if name not in tensors:
        raise ValueError(f"these weights have no {name}: they are not a whole model")
    return tuple(tensors[name].shape)
