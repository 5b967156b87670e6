"""The loop and the evaluation, for all stages and tasks."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from swinv2_scale import distributed
from swinv2_scale.data.images import EncodedImage
from swinv2_scale.data.stream import Batch, Open
from swinv2_scale.engine import Engine
from swinv2_scale.guard import Guard, Verdict
from swinv2_scale.heartbeat import Heartbeat
from swinv2_scale.models.probe import BlockProbe
from swinv2_scale.models.swin_v2 import SwinTransformerV2
from swinv2_scale.optim import Schedule
from swinv2_scale.profile import Profiler
from swinv2_scale.signals import Stopped
from swinv2_scale.telemetry import Picture, Telemetry


class Prediction(NamedTuple):
    """What a model says of a picture: drawn on it, uint8 (3, Y, X); in a line; as numbers, which JSON can write; and of
    its pixels as a map, uint8 (Y, X): 0 for none, v for class v - 1."""

    picture: Tensor
    line: str
    numbers: dict[str, Any]
    map: Tensor | None = None


class Task(Protocol):
    """What a task brings to a run. Tasks live in swinv2_scale/tasks and are chosen by conf/task."""

    train_transform: Callable[[dict[str, Any]], dict[str, Any]]
    evaluation_transform: Callable[[dict[str, Any]], dict[str, Any]]
    train_collate: Callable[[list[dict[str, Any]]], Batch]
    evaluation_collate: Callable[[list[dict[str, Any]]], Batch]
    open_sample: Open  # of a sample's members: all but its key
    metrics: tuple[str, ...]
    tallies: dict[str, tuple[int, ...]]  # shapes of sums that are no means over samples, see `scores` and `derived`
    num_classes: int  # 0: samples have no class
    shown: int  # pictures in a report
    settings: dict[str, Any]  # what a held-out result depends on besides weights and data

    def build(self, model: Any) -> nn.Module:
        """The model to train, from the configuration of its backbone."""

    def backbone(self, model: nn.Module) -> SwinTransformerV2:
        """The part of a built model that weights of another run fill."""

    def check_classes(self, *classes: Sequence[str], highest_label: int | None = None) -> None:
        """Raise ValueError if training and held-out data (names of classes, empty if unknown) do not fit the task."""

    def loss(self, model: Callable, batch: Batch) -> Tensor:
        """Mean loss of a micro-batch: scalar."""

    def scores(self, model: Callable, batch: Batch) -> dict[str, Tensor]:
        """Each of `metrics` for each sample of a held-out batch, (B,); each of `tallies`, summed over the batch."""

    def derived(self, tallies: dict[str, Tensor]) -> dict[str, float]:
        """Held-out results that follow from `tallies`, float64 and summed over all samples."""

    def per_class(self, outcome: "Evaluation") -> dict[str, list[float]]:
        """Columns of a table with a row for each class, nan where there is no value; {} where there is no table."""

    def pictures(self, model: nn.Module, batch: Batch, classes: Sequence[str]) -> tuple[str, list[Picture]]:
        """What the model makes of each of a held-out batch, to look at, and a name for the collection."""

    def predict(self, model: nn.Module, image: EncodedImage, classes: Sequence[str]) -> Prediction:
        """What the model says of a picture, prepared as held-out ones are. Raises ValueError if it says nothing."""


def train(
    engine: Engine,
    task: Task,
    stream: Iterable[Batch],
    schedule: Schedule,
    telemetry: Telemetry,
    *,
    start: int,
    stop: int,
    log_every: int,
    evaluate_every: int,
    checkpoint_every: int,
    guard: Guard,
    heartbeat: Heartbeat,
    probe: BlockProbe,
    profiler: Profiler | None,
    look: Callable[[int], None],
    save: Callable[[int, bool], None],
    saved: Callable[[], None],
    roll_back: Callable[[int], None],
) -> None:
    """Run the steps start … stop - 1; `look` evaluates and `save` checkpoints after a number of finished steps.

    `save` returns while the checkpoint is still written, unless the run ends here, and `saved` notes when one is.
    `roll_back` gives the engine the weights of the last checkpoint. Intervals are in steps; 0 means only at the end.

    Raises FloatingPointError when `guard` judges that it is enough, and Stopped, after saving, when it was signalled.
    """
    batches, loss = telemetry.timed(stream), telemetry.forward(task.loss)
    for step in range(start, stop):
        heartbeat.beat("training", step)
        # ------------------------------------------------------------------------------------------ the step
        probe.watching = due(step + 1, log_every, stop)
        if profiler is not None:
            profiler.before_step()
        result = engine.step(seeded(islice(batches, engine.accumulation)), loss, schedule(step))
        telemetry.step(result.loss, result.applied)
        done = step + 1
        verdict = guard.after(done, *result)
        # ------------------------------------------------------------------------------------------ now and then
        saved()
        saves = due(done, checkpoint_every, stop) or verdict is Verdict.STOP
        looks = due(done, evaluate_every, stop) and verdict is not Verdict.STOP
        if due(done, log_every, stop) or saves or looks or verdict is not Verdict.CONTINUE:
            telemetry.train(done, learning_rate=schedule(step), **engine.state())
            telemetry.blocks(done, probe.take())
        if verdict is Verdict.ABORT:
            raise FloatingPointError(
                f"{guard.cause} before step {done}; the last checkpoint is from before. Lower optim.lr or "
                "optim.gradient_clip, lengthen the warm-up, or choose guard.nonfinite=rollback"
            )
        if verdict is Verdict.ROLLBACK:
            roll_back(done)
        if saves:
            heartbeat.beat("saving", done)
            save(done, verdict is Verdict.STOP or done == stop)
        if verdict is Verdict.STOP and done < stop:
            raise Stopped(f"signalled at step {done}, saved; the same command goes on from here")
        if looks:
            look(done)
        if saves or looks:
            telemetry.resume_clock()


def due(done: int, every: int, stop: int) -> bool:
    """Whether something that happens every so many steps happens after `done` steps; it always does at the end."""
    return done == stop or (every > 0 and done % every == 0)


def seeded(micro_batches: Iterable[Batch]) -> Iterator[Batch]:
    """The micro-batches, each with torch's random state (drop path) set from its first sample.

    So there is no random state to save, and a micro-batch has the same randomness on whatever rank it falls.
    """
    for batch in micro_batches:
        torch.manual_seed(int(batch["draw"][0]))
        yield batch


@dataclass
class Evaluation:
    """Means over `samples` held-out samples; `per_class`, float64 (classes, 1 + metrics): samples, sum of each metric.

    tallies: the task's, float64, over all samples; what follows from them is among the means.
    images_per_second: of all ranks together, after their first batches; None where there were no others.
    """

    means: dict[str, float]
    samples: int
    per_class: Tensor
    images_per_second: float | None
    tallies: dict[str, Tensor] = field(default_factory=dict)


def evaluate(model: nn.Module, task: Task, stream: Iterable[Batch], samples: int) -> Evaluation:
    """Means over every sample of the stream, each counted once whatever the number of ranks. Collective.

    Raises RuntimeError if all ranks' streams together did not have `samples` samples.
    """
    model.eval()
    table = torch.zeros(
        max(task.num_classes, 1), 1 + len(task.metrics), dtype=torch.float64, device=distributed.device()
    )
    tallies = {
        name: torch.zeros(shape, dtype=torch.float64, device=table.device) for name, shape in task.tallies.items()
    }
    warm, begin = 0.0, time.perf_counter()
    with torch.inference_mode():
        for number, batch in enumerate(map(distributed.to_device, stream)):
            scores = {"samples": torch.ones_like(batch["label"]), **task.scores(model, batch)}
            rows = torch.stack([scores[name].double() for name in ("samples", *task.metrics)], dim=1)
            table.index_add_(0, batch["label"] if task.num_classes else torch.zeros_like(batch["label"]), rows)
            for name in tallies:
                tallies[name] += scores[name]
            if number == 0:  # the clock starts when it is through: .sum() waits for the device
                warm, begin = float(table[:, 0].sum()), time.perf_counter()
    late, seconds = float(table[:, 0].sum()) - warm, time.perf_counter() - begin
    late = distributed.sum_over_ranks({"late": late})["late"]
    seconds = distributed.max_over_ranks({"seconds": seconds})["seconds"]
    table = distributed.sum_tensor(table).cpu()
    tallies = {name: distributed.sum_tensor(tally).cpu() for name, tally in tallies.items()}
    count, *sums = table.sum(dim=0).tolist()
    if count != samples:
        raise RuntimeError(f"{count:.0f} samples were evaluated of {samples}: the result would not be that of the data")
    means = {name: total / count for name, total in zip(task.metrics, sums, strict=True)}
    means |= task.derived(tallies)
    return Evaluation(means, samples, table, late / seconds if late else None, tallies)
