"""Where the time of a training step goes, by part of the model: `profile=true`.

    RUN_DIR/profile/trace.json   for chrome://tracing or https://ui.perfetto.dev
    RUN_DIR/profile/parts.csv    part, seconds a step, share of the step, share of the rate of matrix products

Rank 0 looks at a few steps after warm-up; then training goes on without it. An operation in backward belongs to the
part whose forward operation it differentiates.
"""

import csv
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.profiler import ProfilerActivity, record_function

from swinv2_scale.models.accounting import forward_flops
from swinv2_scale.models.position_bias import PositionBias
from swinv2_scale.models.swin_v2 import (
    LayerNorm,
    Mlp,
    PatchEmbed,
    PatchMerging,
    PostNorm,
    SwinTransformerV2,
    WindowAttention,
)

FIRST, STEPS = 5, 3  # of the steps of this attempt
LABEL = "part: "
PARTS: dict[type[nn.Module], str] = {
    PatchEmbed: "embedding",
    WindowAttention: "attention",
    PositionBias: "position bias",
    Mlp: "mlp",
    LayerNorm: "norm",
    PostNorm: "norm",
    PatchMerging: "merging",
}
# Of a part, what `forward_flops` calls it.
FLOPS = {
    "embedding": ("embedding",),
    "attention": ("projections", "attention"),
    "mlp": ("mlp",),
    "merging": ("merging",),
}
COMMUNICATION = ("gloo:", "nccl:", "c10d::", "record_param_comms")


class Part(NamedTuple):
    """A line of the table; `of_matmul` is None where there is no matrix product."""

    name: str
    seconds: float
    share: float
    of_matmul: float | None


class Profiler:
    """Profiles STEPS steps of a run on this process; `tell` gets the table's parts after them.

    images: per step on this rank. matmul_rate: operations per second of this rank.
    """

    def __init__(
        self,
        run_dir: Path,
        backbone: SwinTransformerV2,
        *,
        images: int,
        matmul_rate: float,
        tell: Callable[[list[Part]], None],
    ) -> None:
        self._folder, self._tell, self._rate = run_dir / "profile", tell, matmul_rate
        flops = forward_flops(backbone, *backbone.input_size, training=True)
        self._flops = {part: 3 * images * sum(flops[name] for name in names) for part, names in FLOPS.items()}
        for module in backbone.modules():
            if type(module) in PARTS:
                _label(module, LABEL + PARTS[type(module)])
        kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self._profile = torch.profiler.profile(activities=kinds)
        self._steps = 0

    def before_step(self) -> None:
        """Begin or end, when it is time."""
        if self._steps == FIRST:
            self._profile.__enter__()
        elif self._steps == FIRST + STEPS:
            self._profile.__exit__(None, None, None)
            self._write()
        self._steps += 1

    def _write(self) -> None:
        self._folder.mkdir(exist_ok=True)
        self._profile.export_chrome_trace(str(self._folder / "trace.json"))
        seconds = {part: total / STEPS for part, total in by_part(self._profile.events() or ()).items()}
        whole = sum(seconds.values())
        parts = []
        for name, own in sorted(seconds.items(), key=lambda item: -item[1]):
            of_matmul = self._flops[name] / own / self._rate if name in self._flops and own else None
            parts.append(Part(name, own, own / whole, of_matmul))
        with (self._folder / "parts.csv").open("w", newline="") as file:
            lines = csv.writer(file, lineterminator="\n")
            lines.writerows([Part._fields, *(("" if v is None else v for v in part) for part in parts)])
        self._tell(parts)


def by_part(events: Iterable[Any]) -> dict[str, float]:
    """Seconds by part, of a profiler's events: of the device that computes, or of the CPU where there is none."""
    events = sorted(events, key=lambda event: event.time_range.start)
    on_device = any(event.self_device_time_total for event in events)
    forward: dict[int, str] = {}  # number of an operation in the graph -> part
    found: dict[int, str | None] = {}

    def part_of(event: Any) -> str | None:
        if event.id not in found:
            found[event.id] = _own_part(event, forward) or (part_of(event.cpu_parent) if event.cpu_parent else None)
        return found[event.id]

    seconds: Counter[str] = Counter()
    for event in events:
        part = part_of(event)
        if part is not None and event.sequence_nr >= 0 and not event.name.startswith("autograd::"):
            forward[event.sequence_nr] = part  # of operations that show a number, the last one has it
        time = event.self_device_time_total if on_device else event.self_cpu_time_total
        seconds[part or "other"] += time / 1e6
    return dict(seconds)


def _own_part(event: Any, forward: dict[int, str]) -> str | None:
    """What an event says by itself."""
    if event.name.startswith(LABEL):
        return str(event.name.removeprefix(LABEL))
    if event.name.startswith(COMMUNICATION):
        return "communication"
    if "AccumulateGrad" in event.name:
        return "gradient sums"
    if event.name.startswith("autograd::engine::evaluate_function"):
        return forward.get(event.sequence_nr)
    return None


def _label(module: nn.Module, name: str) -> None:
    """Have the profiler see when a module runs."""
    running: list[Any] = []

    def enter(*_: Any) -> None:
        running.append(record_function(name))
        running[-1].__enter__()

    def leave(*_: Any) -> None:
        running.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)
