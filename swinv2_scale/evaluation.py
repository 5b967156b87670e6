"""Evaluation of a file of weights: configuration -> model, stream -> evaluation.json and per_class.csv."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from swinv2_scale import config, distributed
from swinv2_scale.models.convert import describe, load_checkpoint
from swinv2_scale.parallel import cast
from swinv2_scale.run import open_held_out, print_on_rank_0, start_weights
from swinv2_scale.train import Task, evaluate


class Trained(NamedTuple):
    """What a file of weights is of: its configuration, task and model, ready to evaluate, and its classes' names."""

    cfg: Any
    task: Task
    model: nn.Module
    classes: list[str]


def trained(file: Path, argv: Sequence[str]) -> Trained:
    """The model that a file says it is of, as far as `argv` (settings of conf/evaluate.yaml) does not, and its weights.

    Raises ValueError for a file that cannot be read, for settings that do not exist, and where the file has no weights
    for a part of the model.
    """
    found, _ = describe(file)
    saved = {**found.arguments, "num_classes": found.map_classes or found.arguments["num_classes"]}
    cfg, origin = config.compose_saved("evaluate", argv, saved, list(found.ambiguous))
    print_on_rank_0(origin)
    task: Task = config.instantiate(cfg.task)
    model = task.build(cfg.model)
    loaded = load_checkpoint(model, file)
    if loaded.missing:
        raise ValueError(
            f"checkpoint {file} has no {', '.join(loaded.missing)} of this shape, which would be evaluated untrained: "
            "set model.num_classes to that of the file, or task= to what it was trained for"
        )
    cast(model, cfg.precision)
    return Trained(cfg, task, model.to(distributed.device()), loaded.classes)


def evaluation(cfg: Any, argv: Sequence[str]) -> None:
    """Evaluate the weights of `checkpoint` on data.validation: run_dir/evaluation.json and run_dir/per_class.csv."""
    if not cfg.checkpoint or not cfg.data.validation:
        raise ValueError(
            "evaluation needs checkpoint=RUN_DIR (or a file of weights) and data.validation=SHARDS_OR_FOLDER"
        )
    # 1  the model: as the file says, as far as the command line does not
    file = start_weights(cfg.checkpoint)
    cfg, task, model, known = trained(file, argv)
    # 2  the data
    held_out = open_held_out(cfg, task)
    assert held_out is not None
    stream, manifest = held_out
    task.check_classes(known, manifest.classes, highest_label=manifest.highest_label)
    # 3  the result
    outcome = evaluate(model, task, stream, len(manifest))
    result: dict[str, Any] = {"checkpoint": str(file), "data": str(cfg.data.validation), "data_hash": manifest.hash}
    result |= {**outcome.means, "samples": outcome.samples, "images_per_second": outcome.images_per_second}
    result["settings"] = {**task.settings, "precision": cfg.precision, "ranks": distributed.world_size()}
    result["replaced"] = [name for names in distributed.gathered(stream.corrupt.names) for name in names]
    if distributed.rank() == 0:
        run_dir = Path(cfg.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
        if columns := task.per_class(outcome):
            write_per_class(run_dir / "per_class.csv", columns, manifest.classes or known)
    print_on_rank_0(json.dumps(result, indent=1))


def write_per_class(path: Path, columns: dict[str, list[float]], names: Sequence[str]) -> None:
    """A line for each class: number, name (empty if unknown), and the columns (empty for nan)."""
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(["class", "name", *columns])
        for number, values in enumerate(zip(*columns.values(), strict=True)):
            lines.writerow([number, names[number] if names else "", *map(_cell, values)])


def _cell(value: float) -> str:
    if math.isnan(value):
        return ""
    return str(int(value)) if value.is_integer() else f"{value:.6g}"
