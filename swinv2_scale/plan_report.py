"""`swinv2-scale plan`: settings -> a plan -> a table and bars in the terminal, a page, or JSON."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from torch import nn

from swinv2_scale import config, planner
from swinv2_scale.data.manifest import open_manifest
from swinv2_scale.report import page, table

GIB = planner.GIB
STAGES = ("pretrain", "finetune")


class Planned(NamedTuple):
    """A plan with what it was made of."""

    cfg: Any
    cluster: Any
    model: nn.Module
    plan: planner.Plan
    settings: list[str]

    @property
    def ranks(self) -> int:
        return self.cluster.nodes * self.cluster.gpus


def planned(argv: Sequence[str]) -> Planned:
    """The plan of settings as launch/pretrain.py takes them, and of those of conf/plan.yaml.

    The first word may be pretrain or finetune; otherwise an experiment says which it is. What only a run needs (name,
    data.train, its length) may be left out, and the global batch too: then it is one micro-batch of every rank.
    """
    words, settings = [a for a in argv if "=" not in a], [a for a in argv if "=" in a]
    if len(words) > 1 or not set(words) <= set(STAGES):
        raise ValueError(f"{' '.join(words)!r} is no stage: give one of {', '.join(STAGES)}, then key=value settings")
    own, others = config.own_settings("plan", settings)
    cluster = config.compose("plan", own)
    stage = words[0] if words else config.stage_of(others)
    cfg = config.compose(stage, others, fill={"name": "plan", "data.train": None, "global_batch": None})
    ranks = cluster.nodes * cluster.gpus
    cfg.global_batch = cfg.global_batch or ranks * cfg.micro_batch
    model = planner.build(cfg)
    return Planned(cfg, cluster, model, planner.plan(cfg, ranks=ranks, model=model), [stage, *settings])


def run(argv: Sequence[str], *, html: Path | None, as_json: bool, search: bool) -> int:
    """Print what `argv` plans, or what a search finds; 1 if it does not fit, 0 if it does."""
    one = planned(argv)
    found = planner.search(one.cfg, one.cluster, ranks=one.ranks, model=one.model) if search else []
    if as_json:
        facts = {**one.plan.as_dict(), **_outcome(one)}
        if search:
            facts["search"] = [{"memory": name, **_choice(plan, seconds)} for name, plan, seconds in found]
        print(json.dumps(facts, indent=1))
    else:
        _print(one, found)
    if html is not None:
        html.write_text(_page(one, found), encoding="utf-8")
        if not as_json:
            print(f"page: {html}")
    return 0 if one.plan.peak_bytes <= planner.capacity(one.cluster) or found else 1


def rows(plan: planner.Plan) -> list[tuple[str, float]]:
    """What the peak is made of; the last row is what the moment itself needs, so that all add up to it."""
    named = [("weights", plan.weights_bytes), ("optimiser", plan.optimizer_bytes), ("batch", plan.batch_bytes)]
    in_step = plan.step_bytes >= plan.backward_bytes
    if in_step or plan.accumulation > 1 or plan.zero_stage > 1:  # else backward makes them while activations go
        named.append(("gradients", plan.gradients_bytes))
    if not in_step:
        named.append(("activations", plan.activations_bytes))
    rest = plan.peak_bytes - sum(size for _, size in named)
    return [*named, ("of the step itself" if in_step else "of backward itself", rest)]


def _outcome(one: Planned) -> dict[str, Any]:
    """What follows for this cluster: room, time, length."""
    seconds = planner.step_seconds(one.plan, one.cluster)
    samples = _samples(one)
    cfg, total = one.cfg, sum(seconds.values())
    steps = cfg.steps or (max(1, round(cfg.epochs * (samples // cfg.global_batch))) if cfg.epochs and samples else None)
    return {
        "capacity_bytes": planner.capacity(one.cluster),
        "fits": one.plan.peak_bytes <= planner.capacity(one.cluster),
        "largest_micro_batch": planner.largest_micro_batch(
            cfg, ranks=one.ranks, bytes=planner.capacity(one.cluster), model=one.model
        ),
        "step_seconds": seconds,
        "images_per_second": cfg.global_batch / total,
        "samples": samples,
        "steps": steps,
        "images": steps * cfg.global_batch if steps else None,
        "epochs": steps * cfg.global_batch / samples if steps and samples else cfg.epochs,
        "days": steps * total / 86400 if steps else None,
        "assumed": config.plain(one.cluster),
    }


def _choice(plan: planner.Plan, seconds: float) -> dict[str, Any]:
    return {
        "micro_batch": plan.micro_batch,
        "accumulation": plan.accumulation,
        "peak_bytes": plan.peak_bytes,
        "host_bytes": plan.host_bytes,
        "step_seconds": seconds,
    }


def _samples(one: Planned) -> float | None:
    """Of the training data: as said, or of a manifest that is here."""
    if one.cluster.samples:
        return one.cluster.samples
    train = one.cfg.data.train
    return len(open_manifest(train, None)) if isinstance(train, str) and Path(train).exists() else None


def _facts(one: Planned) -> list[tuple[str, str]]:
    """What is known beside memory, as lines of two columns."""
    plan, outcome, cluster = one.plan, _outcome(one), one.cluster
    seconds = outcome["step_seconds"]
    total = sum(seconds.values())
    parts = ", ".join(f"{name} {value / total:.0%}" for name, value in seconds.items() if value)
    *frames, rows, columns = plan.image_size
    clip = f"{frames[0]} frames of " if frames else ""
    facts = [
        ("model", f"{plan.parameters / 1e6:,.1f} M parameters, {clip}{rows} x {columns} pixels"),
        (
            "batch",
            f"{plan.global_batch} = {plan.micro_batch} x {plan.ranks} ranks x {plan.accumulation} accumulated; "
            f"at most {outcome['largest_micro_batch']} fit",
        ),
        (
            "operations",
            f"{plan.flops_per_step:.3g} a step, {plan.recomputed_flops / plan.flops_per_step:.0%} of them run again",
        ),
        ("time", f"{total:.2f} s a step ({parts}), {outcome['images_per_second']:,.0f} images/s"),
    ]
    if plan.host_bytes:
        facts.append(("host", f"{plan.host_bytes / GIB:.1f} GiB of a rank's host memory"))
    if outcome["steps"]:
        epochs = f", {outcome['epochs']:.3g} epochs of {outcome['samples']:,.0f}" if outcome["samples"] else ""
        facts.append(("length", f"{outcome['steps']:,} steps, {outcome['images']:,} images{epochs}"))
        facts.append(("whole run", f"{outcome['days']:.1f} days"))
    elif one.cfg.epochs:
        facts.append(("length", f"{one.cfg.epochs} epochs; samples=… or data.train=… tells of how many steps"))
    assumed = f"{cluster.efficiency:g} of {planner.gpu(cluster).flops / 1e12:.0f} TFLOP/s in products, "
    assumed += f"{cluster.attention_efficiency:g} in attention, {cluster.gigabytes_per_second:g} GB/s a rank"
    return [*facts, ("assumed", f"{assumed}; not measured")]


def _verdict(one: Planned) -> str:
    room, peak = planner.capacity(one.cluster), one.plan.peak_bytes
    says = "fits" if peak <= room else "does NOT fit"
    moment = "optimiser's step" if one.plan.step_bytes >= one.plan.backward_bytes else "backward"
    return f"peak {peak / GIB:.2f} GiB, in the {moment}: {says} {room / GIB:.1f} GiB of {one.cluster.gpu}"


def _print(one: Planned, found: Sequence[tuple[str, planner.Plan, float]]) -> None:
    console = Console(highlight=False)
    console.print(f"{' '.join(one.settings)}: {one.plan.ranks} ranks", markup=False)
    memory = Table("a rank's memory", "GiB", "", box=None, padding=(0, 2, 0, 0))
    widest = max(size for _, size in rows(one.plan))
    for name, size in rows(one.plan):
        memory.add_row(name, f"{size / GIB:.2f}", "█" * round(36 * size / widest))
    console.print(memory)
    console.print(_verdict(one), markup=False)
    kept = Table("kept for backward", "GiB", "", box=None, padding=(0, 2, 0, 0))
    most = max(one.plan.activations_by_part.values()) or 1.0
    for name, size in one.plan.activations_by_part.items():
        kept.add_row(name, f"{size / GIB:.2f}", "█" * round(36 * size / most))
    console.print(kept)
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, text in _facts(one):
        facts.add_row(name, text)
    console.print(facts)
    if found:
        choices = Table(*CHOICES, box=None, padding=(0, 2, 0, 0))
        for row in _choices(found):
            choices.add_row(*row)
        console.print(choices)
        name, plan, _ = found[0]
        console.print(f"fastest: memory={name} micro_batch={plan.micro_batch}", markup=False)


CHOICES = ("memory", "micro-batch", "accumulated", "peak, GiB", "host, GiB", "s a step")


def _choices(found: Sequence[tuple[str, planner.Plan, float]]) -> list[tuple[str, ...]]:
    return [
        (
            name,
            str(plan.micro_batch),
            str(plan.accumulation),
            f"{plan.peak_bytes / GIB:.1f}",
            f"{plan.host_bytes / GIB:.1f}",
            f"{seconds:.2f}",
        )
        for name, plan, seconds in found
    ]


def _page(one: Planned, found: Sequence[tuple[str, planner.Plan, float]]) -> str:
    """One self-contained page, in the frame of report.html."""
    plan = one.plan
    cards = "".join(
        f'<div class="card"><span>{escape(name)}</span><strong>{escape(value)}</strong></div>'
        for name, value in (
            ("peak of a rank", f"{plan.peak_bytes / GIB:.2f} GiB"),
            ("may take", f"{planner.capacity(one.cluster) / GIB:.1f} GiB"),
            ("parameters", f"{plan.parameters / 1e6:,.1f} M"),
            ("s a step (estimate)", f"{sum(planner.step_seconds(plan, one.cluster).values()):.2f}"),
        )
    )
    curves = "<h2>Memory of a rank (GiB)</h2>" + _bars(rows(plan), planner.capacity(one.cluster))
    curves += "<h2>Kept for backward (GiB)</h2>" + _bars(list(plan.activations_by_part.items()), None)
    details = f'<h2>Figures</h2><div class="tables">{table("", _facts(one))}'
    details += table("Settings that fit", _choices(found), CHOICES) + "</div>"
    return page(
        " ".join(one.settings), _verdict(one), times="", cards=cards, curves=curves, pictures="", details=details
    )


def _bars(parts: Sequence[tuple[str, float]], room: float | None) -> str:
    """A horizontal bar for each part; where there is a room, they are drawn to its scale, one after the other."""
    total = max(sum(size for _, size in parts), room or 0.0) if room else max((size for _, size in parts), default=1.0)
    begin, html = 0.0, ""
    for number, (name, size) in enumerate(parts):
        left, width = (100 * value / (total or 1.0) for value in (begin if room else 0.0, max(size, 0.0)))
        bar = f"margin-left:{left:.2f}%;width:{width:.2f}%;height:12px;background:currentColor;border-radius:3px"
        html += f'<div>{escape(name)} <small style="display:inline">{size / GIB:.2f}</small></div>'
        html += f'<div class="{"abcd"[number % 4]}" style="{bar}"></div>'
        begin += size
    if room:
        html += f"<small>the whole width is {total / GIB:.1f} GiB</small>"
    return f"<figure>{html}</figure>"
