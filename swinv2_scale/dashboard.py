"""The wandb workspaces of a run, as code: `swinv2-scale log dashboard`. Only this module imports wandb_workspaces."""

import os
from pathlib import Path
from typing import Any

# Workspace -> section -> title of a panel -> keys of the record, as they are logged: event/key.
COMMON: dict[str, dict[str, tuple[str, ...]]] = {
    "Optimisation": {
        "Learning rate": ("train/learning_rate",),
        "Gradient norm": ("train/gradient_norm",),
        "Weight decay": ("train/weight_decay",),
        "Skipped steps": ("train/skipped",),
        "Loss scale": ("train/loss_scale",),
    },
    "Stability": {"Largest amplitude of a block": ("blocks/amplitude_max",)},
    "Speed": {
        "Images per second": ("train/images_per_second",),
        "Model TFLOP/s": ("train/model_teraflops",),
        "Utilisation": ("train/utilisation",),
        "Seconds of a step": ("train/step_seconds",),
        "Forward passes of a step, slowest and fastest rank": (
            "train/forward_seconds_max",
            "train/forward_seconds_min",
        ),
        "Slowest rank": ("train/slowest_rank",),
        "Waiting for data, mean and largest of the ranks": ("train/data_wait", "train/data_wait_max"),
        "Memory, GB": ("train/memory_gigabytes",),
    },
    "Data": {"Reads repeated": ("train/read_retries",), "Bytes read": ("train/read_bytes",)},
    "Checkpoints": {"Seconds": ("checkpoint/stall_seconds", "checkpoint/write_seconds")},
}
WORKSPACES: dict[str, dict[str, dict[str, tuple[str, ...]]]] = {
    "pretraining": {"Loss": {"Loss": ("train/loss", "evaluation/loss")}, **COMMON},
    "fine-tuning": {
        "Loss": {
            "Loss": ("train/loss", "evaluation/loss"),
            "Held-out accuracy": ("evaluation/top1", "evaluation/top5"),
        },
        **COMMON,
    },
}
PICTURES = {"pretraining": "pictures/reconstructions", "fine-tuning": "pictures/predictions"}


def workspace(kind: str, *, entity: str, project: str) -> Any:
    """A workspace of wandb_workspaces, not yet saved. kind: a key of WORKSPACES."""
    import wandb_workspaces.reports.v2 as panels
    from wandb_workspaces import workspaces

    sections = []
    for title, plots in WORKSPACES[kind].items():
        lines: list[Any] = [panels.LinePlot(title=name, x="step", y=list(keys)) for name, keys in plots.items()]
        if title == "Loss":
            lines.append(panels.MediaBrowser(title="Pictures", media_keys=[PICTURES[kind]]))
        sections.append(workspaces.Section(name=title, panels=lines, is_open=title in ("Loss", "Stability", "Speed")))
    settings = workspaces.WorkspaceSettings(x_axis="step", smoothing_type="none")
    name = f"Swin Transformer V2, {kind}"
    return workspaces.Workspace(entity=entity, project=project, name=name, sections=sections, settings=settings)


def publish(*, entity: str, project: str, folder: Path) -> list[str]:
    """Create the workspaces where wandb's server is reachable; else write their specifications to `folder`.

    Returns a line for each: its URL, or its file and why. Raises ValueError where wandb-workspaces is not installed.
    """
    try:
        made = {kind: workspace(kind, entity=entity, project=project) for kind in WORKSPACES}
    except ImportError as error:
        raise ValueError(f"dashboards need wandb-workspaces ({error}): pip install wandb-workspaces") from None
    lines = []
    for kind, one in made.items():
        reason = "there is no WANDB_API_KEY" if "WANDB_API_KEY" not in os.environ else ""
        if not reason:
            try:
                one.save()
            except Exception as error:  # of any kind: wandb's, of the network, of permissions
                reason = f"{type(error).__name__}: {error}"
        if reason:
            path = folder / f"{kind}.json"
            path.write_text(one._to_model().model_dump_json(by_alias=True, indent=1) + "\n", encoding="utf-8")
        lines.append(f"{kind}: {path}, since {reason}" if reason else f"{kind}: {one.url}")
    return lines
