"""Records of a run: metrics.jsonl is the record; console and wandb are views of it. Only this module imports wandb.

Every rank holds a Telemetry, and calls it alike; rank 0's writes. An event is one JSON line with "event", "step" and
"time" (unix seconds); `swinv2_scale.report` reads them.
"""

import json
import logging
import math
import os
import secrets
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torchvision.io import write_png

from swinv2_scale import distributed
from swinv2_scale.data.sources import COUNTERS
from swinv2_scale.data.stream import Batch

RECORD = "metrics.jsonl"
WANDB_SECONDS = 60  # that the end of a run waits for wandb


class Picture(NamedTuple):
    """An image to look at: uint8 (3, Y, X), a caption, and whether the model was right (None: no such notion)."""

    image: Tensor
    caption: str
    good: bool | None = None


class Telemetry:
    """Writes what happens in a run to run_dir/metrics.jsonl, the console, and wandb (mode offline, online or disabled).

    total_steps, steps_per_epoch and images_per_step turn steps into time left, epochs, and images per second.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        name: str,
        total_steps: int,
        steps_per_epoch: int,
        images_per_step: int,
        wandb: str,
        project: str,
        config: dict[str, Any],
    ) -> None:
        if wandb not in ("offline", "online", "disabled"):
            raise ValueError(f"telemetry.wandb must be offline, online or disabled, got {wandb!r}")
        self.run_dir, self.total_steps = run_dir, total_steps
        self.steps_per_epoch, self.images_per_step = steps_per_epoch, images_per_step
        self.writes = distributed.rank() == 0
        self.console = Console(quiet=not self.writes)
        self._steps = 0
        self._losses: list[Tensor] = []
        self._replaced: list[str] = []
        self._waited = 0.0
        self._reads: Counter[str] = Counter()
        self._step = 0
        self.attempt = 0
        self._begin = self._last = time.monotonic()
        self._file = None
        self._wandb = None
        self._progress: Progress | None = None
        if self.writes:
            self.attempt = _close_last_line(run_dir / RECORD)
            self._file = (run_dir / RECORD).open("a")
            self._wandb = _open_wandb(run_dir, name, wandb, project, config, self.say)
            if sys.stdout.isatty():
                columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
                self._progress = Progress(*columns, console=self.console)
                self._progress.start()
                self._task = self._progress.add_task("starting", total=total_steps)

    def say(self, text: str) -> None:
        """Print a line on rank 0's console."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def event(self, event: str, step: int, **values: Any) -> None:
        """Append one line to the record. Numbers that JSON does not know become null."""
        if self._file is None:
            return
        self._step = step
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._file.write(json.dumps({"event": event, "step": step, "time": time.time(), **finite}) + "\n")
        self._file.flush()
        self._to_wandb(
            {f"{event}/{key}": value for key, value in finite.items() if isinstance(value, (int, float))}, step
        )

    def start(self, step: int, **facts: Any) -> None:
        """The run, or its continuation, begins at `step`."""
        self.event("start", step, attempt=self.attempt, **facts)
        self._last = time.monotonic()

    def timed(self, stream: Iterable[Batch]) -> Iterator[Batch]:
        """The stream's batches; the time spent waiting for them, and the samples replaced in them, are recorded."""
        batches = iter(stream)
        while True:
            before = time.monotonic()
            batch = next(batches, None)
            self._waited += time.monotonic() - before
            if batch is None:
                return
            self._replaced += batch["corrupt"]
            for counted in batch["reads"]:
                self._reads.update(counted)
            yield batch

    def step(self, loss: Tensor, applied: bool) -> None:
        """Keep this rank's loss of a step, on its device, until the next `train`: no synchronisation here."""
        self._steps += 1
        if applied:
            self._losses.append(loss)

    def train(self, step: int, **values: float | None) -> None:
        """Record the steps since the last call, of which `step` are finished in all. Collective.

        The loss is that of the steps that were applied, "skipped" the number of the others.
        """
        elapsed, steps = time.monotonic() - self._last, self._steps
        own = {"loss": float(torch.stack(self._losses).mean()) if self._losses else math.nan, "waited": self._waited}
        mean = {k: total / distributed.world_size() for k, total in distributed.sum_over_ranks(own).items()}
        record = {
            "epoch": step / self.steps_per_epoch,
            "loss": mean["loss"],
            "skipped": steps - len(self._losses),
            **values,
            "images_per_second": self.images_per_step * steps / elapsed,
            "step_seconds": elapsed / steps,
            "data_wait": mean["waited"] / elapsed,
            **distributed.max_over_ranks({"memory_gigabytes": _peak_memory()}),
            **distributed.sum_over_ranks({name: self._reads[name] for name in COUNTERS}),
        }
        self.event("train", step, **record)
        self._show(step, record)
        self.replaced(step, self._replaced)
        self._steps, self._losses, self._waited, self._replaced, self._reads = 0, [], 0.0, [], Counter()
        self._last = time.monotonic()

    def replaced(self, step: int, samples: Sequence[str]) -> None:
        """Record the samples that this rank could not use and replaced. Collective."""
        for sample in (name for names in distributed.gathered(list(samples)) for name in names):
            self.event("corrupt", step, sample=sample)
            self.say(f"replaced a sample that cannot be used: {sample}")

    def skipped(self, step: int, text: str) -> None:
        """Record a step that changed nothing."""
        self.event("skipped", step, text=text)
        self.say(f"step {step}: {text}")

    def resume_clock(self) -> None:
        """What happened since the last record (evaluation, checkpoint) was not training time."""
        self._last = time.monotonic()

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Record metrics on held-out data after `step` steps."""
        self.event("evaluation", step, **metrics)
        values = ", ".join(f"{key} {value:.4g}" for key, value in metrics.items() if key != "samples")
        self.say(f"step {step}: held-out {values} ({metrics['samples']:.0f} samples)")

    def pictures(self, step: int, name: str, pictures: Sequence[Picture]) -> None:
        """Write pictures to run_dir/pictures and record them."""
        if not self.writes:
            return
        folder = self.run_dir / "pictures"
        folder.mkdir(exist_ok=True)
        items = []
        for number, picture in enumerate(pictures):
            file = folder / f"{name}_{step:08d}_{number:02d}.png"
            write_png(picture.image.cpu(), str(file))
            items.append({"file": f"pictures/{file.name}", "caption": picture.caption, "good": picture.good})
        self.event("pictures", step, name=name, items=items)
        if self._wandb is not None:
            import wandb

            images = [wandb.Image(str(self.run_dir / str(i["file"])), caption=str(i["caption"])) for i in items]
            self._to_wandb({f"pictures/{name}": images}, step)

    def end(self, reason: str) -> None:
        """Close the record. reason: "finished", or what stopped the run."""
        self.event("end", self._step, reason=reason, seconds=time.monotonic() - self._begin)
        if self._progress is not None:
            self._progress.stop()
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._wandb is not None:  # it may hang or raise, and must not cost the run its end
            finish = threading.Thread(target=self._finish_wandb, args=(self._wandb, reason), daemon=True)
            finish.start()
            finish.join(WANDB_SECONDS)
            if finish.is_alive():
                self.say(f"wandb did not finish within {WANDB_SECONDS} s; the record is {self.run_dir / RECORD}")

    def _finish_wandb(self, run: Any, reason: str) -> None:
        try:
            run.finish(exit_code=0 if reason == "finished" else 1)
        except Exception as error:
            self.say(f"wandb did not finish ({error}); the record is {self.run_dir / RECORD}")

    def _show(self, step: int, record: dict[str, Any]) -> None:
        speed = f"{record['images_per_second']:.1f} images/s  data wait {record['data_wait']:.0%}"
        text = f"loss {record['loss']:.4f}  {speed}"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, description=text)
        else:
            left = (self.total_steps - step) * record["step_seconds"]
            self.say(f"step {step}/{self.total_steps}  {text}  {left / 60:.1f} min left")

    def _to_wandb(self, values: dict[str, Any], step: int) -> None:
        if self._wandb is None or not values:
            return
        try:
            self._wandb.log({**values, "step": step})
        except Exception as error:  # a sink that fails is dropped; the record goes on
            self.say(f"wandb stopped taking records ({error}); the run goes on, the record is {self.run_dir / RECORD}")
            self._wandb = None


def _open_wandb(run_dir: Path, name: str, mode: str, project: str, config: dict, say: Any) -> Any:
    """A wandb run with the same id at every attempt, or None when it is switched off or does not start."""
    if mode == "disabled":
        return None
    try:
        import wandb

        logging.getLogger("wandb").setLevel(logging.ERROR)
        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        run = wandb.init(
            project=project,
            name=name,
            id=id_file.read_text(),
            resume="allow" if mode == "online" else None,
            mode=cast(Any, mode),
            dir=str(run_dir),
            config=config,
            settings=wandb.Settings(silent=True, console="off"),
        )
        run.define_metric("*", step_metric="step")
    except Exception as error:  # absent, misconfigured or unreachable: never a reason not to train
        say(f"wandb is not available ({error}); the record is {run_dir / RECORD}")
        return None
    return run


def _close_last_line(record: Path) -> int:
    """Number of attempts in a record so far; a last line that was cut off by a crash is removed."""
    if not record.exists():
        return 0
    content = record.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    os.truncate(record, len(complete))
    return complete.count(b'{"event": "start"')


def _peak_memory() -> float:
    """Largest memory of this rank so far, in 10^9 bytes: of the accelerator, or of the process."""
    if distributed.device().type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
