"""Records of a run: metrics.jsonl is the record; console, wandb and TensorBoard are views of it. Only this module
imports wandb and tensorboard.

Every rank holds a Telemetry, and calls it alike; rank 0's writes. An event is one JSON line with "event", "step" and
"time" (unix seconds); `swinv2_scale.report` reads them.
"""

import json
import logging
import math
import os
import secrets
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from queue import Full, Queue
from threading import Thread
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
SINK_SECONDS = 60  # that the end of a run waits for wandb and TensorBoard together
SINK_LINES = 1000  # that may wait for them
PICTURES = 16  # of one collection, that they are given
# By how much memory may depart from its plan unsaid. On a CPU, libraries that the first step loads are not planned.
PLAN_SHARE, PLAN_GIGABYTES = 0.2, 0.5


class Picture(NamedTuple):
    """An image to look at: uint8 (3, Y, X), a caption, whether the model was right (None: no such notion), and a number
    that is the larger, the more wrong it was: the worst are shown, worst first."""

    image: Tensor
    caption: str
    good: bool | None = None
    wrong: float = 0.0


class Telemetry:
    """Writes what happens in a run to run_dir/metrics.jsonl and the console; perhaps to wandb and TensorBoard.

    wandb is offline, online or disabled; its project is `project`. tensorboard: whether run_dir/tensorboard is written.
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
        tensorboard: bool,
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
        self._forwards: list[tuple[Any, Any]] = []  # begin and end
        self._reads: Counter[str] = Counter()
        self._step = 0
        self.attempt = 0
        self._begin = self._last = time.monotonic()
        self._file = None
        self._flops_per_image = self._flops_of_matmul = 0.0
        self._sinks: list[Sink] = []
        self._progress: Progress | None = None
        self.planned_gigabytes: float | None = None  # of a rank's memory at its peak; None: not planned, or compared
        if self.writes:
            self.attempt = _close_last_line(run_dir / RECORD)
            self._file = (run_dir / RECORD).open("a")
            if wandb != "disabled":
                self._sinks.append(Sink("wandb", lambda: _Wandb(run_dir, name, wandb, project, config), self.say))
            if tensorboard:
                self._sinks.append(Sink("TensorBoard", lambda: _TensorBoard(run_dir), self.say))
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
        finite = {key: _finite(value) for key, value in values.items()}
        self._file.write(json.dumps({"event": event, "step": step, "time": time.time(), **finite}) + "\n")
        self._file.flush()
        numbers = {f"{event}/{key}": value for key, value in finite.items() if isinstance(value, (int, float))}
        for sink in self._sinks if numbers else ():
            sink(lambda view: view.numbers(numbers, step))

    def start(self, step: int, flops_per_image: float = 0.0, flops_of_matmul: float = 0.0, **facts: Any) -> None:
        """The run, or its continuation, begins at `step`.

        flops_per_image: of a training step; flops_of_matmul: per second, of matrix products on all ranks together; 0:
        not known.
        """
        self._flops_per_image, self._flops_of_matmul = flops_per_image, flops_of_matmul
        rates = {"flops_per_image": flops_per_image, "flops_of_matmul": flops_of_matmul}
        self.event("start", step, attempt=self.attempt, **rates, **facts)
        self._last = time.monotonic()

    def timed(self, stream: Iterable[Batch]) -> Iterator[Batch]:
        """The stream's batches; the time spent waiting for them, and the samples replaced in them, are recorded."""
        batches = iter(stream)
        while True:
            before = time.monotonic()
            with torch.profiler.record_function("part: data"):
                batch = next(batches, None)
            self._waited += time.monotonic() - before
            if batch is None:
                return
            self._replaced += batch["corrupt"]
            for counted in batch["reads"]:
                self._reads.update(counted)
            yield batch

    def forward(self, loss: Callable[[Any, Batch], Tensor]) -> Callable[[Any, Batch], Tensor]:
        """A task's loss; how long its forward passes take on this rank is recorded, without a synchronisation.

        A step ends at the same moment on all ranks, since its backward pass waits for the slowest. In its forward
        passes no rank waits for another (but under ZeRO 3, which gathers weights), so that they tell which one is slow.
        """

        def marked(model: Any, batch: Batch) -> Tensor:
            begin = _mark()
            value = loss(model, batch)
            self._forwards.append((begin, _mark()))
            return value

        return marked

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
        forward = distributed.gathered(sum(_seconds(*marks) for marks in self._forwards) / steps)
        images = self.images_per_step * steps / elapsed
        record: dict[str, Any] = {
            "epoch": step / self.steps_per_epoch,
            "loss": mean["loss"],
            "skipped": steps - len(self._losses),
            **values,
            "images_per_second": images,
            "model_teraflops": images * self._flops_per_image / 1e12,
            "utilisation": images * self._flops_per_image / self._flops_of_matmul if self._flops_of_matmul else None,
            "step_seconds": elapsed / steps,
            "forward_seconds_min": min(forward),
            "forward_seconds_max": max(forward),
            "slowest_rank": forward.index(max(forward)),
            "data_wait": mean["waited"] / elapsed,
            **distributed.max_over_ranks({"memory_gigabytes": peak_memory(), "data_wait_max": self._waited / elapsed}),
            **distributed.sum_over_ranks({name: self._reads[name] for name in COUNTERS}),
        }
        self.event("train", step, **record)
        self._show(step, record)
        self._compare_memory(step, record["memory_gigabytes"])
        self.replaced(step, self._replaced)
        self._steps, self._losses, self._forwards = 0, [], []
        self._waited, self._replaced, self._reads = 0.0, [], Counter()
        self._last = time.monotonic()

    def _compare_memory(self, step: int, found: float) -> None:
        """Say once when memory departs from its plan by more than PLAN_SHARE of it and PLAN_GIGABYTES."""
        planned = self.planned_gigabytes
        if planned is not None and abs(found - planned) > PLAN_SHARE * planned + PLAN_GIGABYTES:
            self.planned_gigabytes = None
            self.event("memory", step, planned_gigabytes=planned, memory_gigabytes=found)
            self.say(f"step {step}: memory is {found:.2f} GB, planned were {planned:.2f} GB; see docs/planner.md")

    def profiled(self, step: int, parts: Sequence[tuple[str, float, float, float | None]]) -> None:
        """Record and print what a profile found: part, seconds a step, share, share of the rate of matrix products."""
        self.event("profile", step, parts={name: share for name, _, share, _ in parts})
        for name, seconds, share, of_matmul in parts:
            rate = "" if of_matmul is None else f"  {of_matmul:.0%} of the rate of matrix products"
            self.say(f"profile  {name:14} {seconds * 1000:9.1f} ms a step  {share:6.1%}{rate}")

    def blocks(self, step: int, kinds: dict[str, list[float]]) -> None:
        """Record numbers of each block, by kind; see BlockProbe."""
        if kinds:
            self.event("blocks", step, **kinds, amplitude_max=max(kinds["amplitude"]))

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
        files = [(self.run_dir / str(item["file"]), str(item["caption"])) for item in items]
        for sink in self._sinks:
            sink(lambda view: view.pictures(name, files, step))

    def end(self, reason: str) -> None:
        """Close the record. reason: "finished", or what stopped the run."""
        self.event("end", self._step, reason=reason, seconds=time.monotonic() - self._begin)
        if self._progress is not None:
            self._progress.stop()
        if self._file is not None:
            self._file.close()
            self._file = None
        deadline = time.monotonic() + SINK_SECONDS
        for sink in self._sinks:
            sink.close(reason, deadline)
        self._sinks = []

    def _show(self, step: int, record: dict[str, Any]) -> None:
        speed = f"{record['images_per_second']:.1f} images/s  data wait {record['data_wait']:.0%}"
        text = f"loss {record['loss']:.4f}  {speed}"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, description=text)
        else:
            left = (self.total_steps - step) * record["step_seconds"]
            self.say(f"step {step}/{self.total_steps}  {text}  {left / 60:.1f} min left")


class Sink:
    """A view of the record that is fed in a thread of its own: its outage, hang or lack costs training nothing.

    `open` makes the view, which has numbers(values, step), pictures(name, files, step) and finish(reason).
    """

    def __init__(self, name: str, open: Callable[[], Any], say: Callable[[str], None]) -> None:
        self._name, self._open, self._say = name, open, say
        self._queue: Queue[Callable[[Any], None] | None] = Queue(SINK_LINES)
        self._thread = Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def __call__(self, action: Callable[[Any], None]) -> None:
        """Have an action done with the view, some time; if too many wait, it is lost."""
        try:
            self._queue.put_nowait(action)
        except Full:
            self._fail(f"takes no records, {SINK_LINES} wait")

    def close(self, reason: str, deadline: float) -> None:
        """Finish the view, until `deadline` of time.monotonic()."""
        self(lambda view: view.finish(reason))
        self._queue.put(None) if not self._queue.full() else None
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._fail(f"did not finish within {SINK_SECONDS} s")

    def _work(self) -> None:
        view: Any = None
        try:
            view = self._open()
        except Exception as error:  # absent, misconfigured or unreachable: never a reason not to train
            self._fail(f"is not available ({error})")
        while (action := self._queue.get()) is not None:
            if view is not None:
                try:
                    action(view)
                except Exception as error:  # a view that fails is dropped
                    self._fail(f"stopped taking records ({error})")
                    view = None

    def _fail(self, what: str) -> None:
        """Said once."""
        if not getattr(self, "_said", False):
            self._said = True
            self._say(f"{self._name} {what}; the run goes on, and {RECORD} is the record")


class _Wandb:
    """A wandb run with the same id at every attempt."""

    def __init__(self, run_dir: Path, name: str, mode: str, project: str, config: dict[str, Any]) -> None:
        import wandb

        logging.getLogger("wandb").setLevel(logging.ERROR)
        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        self._run = wandb.init(
            project=project,
            name=name,
            id=id_file.read_text(),
            resume="allow" if mode == "online" else None,
            mode=cast(Any, mode),
            dir=str(run_dir),
            config=config,
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric("*", step_metric="step")

    def numbers(self, values: dict[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def pictures(self, name: str, files: list[tuple[Path, str]], step: int) -> None:
        import wandb

        images = [wandb.Image(str(path), caption=caption) for path, caption in files[:PICTURES]]
        self._run.log({f"pictures/{name}": images, "step": step})

    def finish(self, reason: str) -> None:
        self._run.finish(exit_code=0 if reason == "finished" else 1)


class _TensorBoard:
    """Event files in run_dir/tensorboard."""

    def __init__(self, run_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"))

    def numbers(self, values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def pictures(self, name: str, files: list[tuple[Path, str]], step: int) -> None:
        from torchvision.io import decode_image

        for number, (path, _) in enumerate(files[:PICTURES]):
            self._writer.add_image(f"pictures/{name}/{number}", decode_image(str(path)), step)

    def finish(self, reason: str) -> None:
        self._writer.close()


def upload(run_dir: Path, *, mode: str, project: str) -> int:
    """Replay the record of a finished run into one wandb run, online or offline, and return the number of lines.

    What an attempt did beyond the checkpoint at which the next one began is left out. Raises ValueError without a
    record.
    """
    import yaml

    lines, name = read_record(run_dir), run_dir.resolve().name
    config = yaml.safe_load((run_dir / "config.yaml").read_text()) if (run_dir / "config.yaml").exists() else {}
    run = _Wandb(run_dir, str(config.get("name", name)), mode, project, config)
    for line in lines:
        event, step = line["event"], line["step"]
        if event == "pictures":
            run.pictures(line["name"], [(run_dir / i["file"], str(i["caption"])) for i in line["items"]], step)
        values = {f"{event}/{k}": v for k, v in line.items() if type(v) in (int, float) and k not in ("step", "time")}
        if values:
            run.numbers(values, step)
    run.finish("finished")
    return len(lines)


def read_record(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's record, each step once: what a later attempt did again is left out where it came first.

    Raises ValueError if there is none.
    """
    path = run_dir / RECORD
    if not path.is_file():
        raise ValueError(f"{run_dir} is not a run directory: {path} does not exist")
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not text.endswith("\n"):  # cut off by a crash
            break
        line = json.loads(text)
        if line["event"] == "start":
            lines = [one for one in lines if one["step"] <= line["step"] or one["event"] == "start"]
        lines.append(line)
    return lines


def _finite(value: Any) -> Any:
    """The value, with null for numbers that JSON does not know, also in lists."""
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _close_last_line(record: Path) -> int:
    """Number of attempts in a record so far; a last line that was cut off by a crash is removed."""
    if not record.exists():
        return 0
    content = record.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    os.truncate(record, len(complete))
    return complete.count(b'{"event": "start"')


def _mark() -> Any:
    """Now, in the work of this rank: seconds, or an event in its accelerator's queue, for which nobody waits."""
    if distributed.device().type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(begin: Any, end: Any) -> float:
    """Between two marks. Waits for the accelerator to get there."""
    if isinstance(end, float):
        return float(end - begin)
    end.synchronize()
    return float(begin.elapsed_time(end) / 1000)


def peak_memory() -> float:
    """Largest memory of this rank so far, in 10^9 bytes: of the accelerator, or of the process."""
    if distributed.device().type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
