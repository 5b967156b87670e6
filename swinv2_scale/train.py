"""The loop and the evaluation, for all stages and tasks."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from swinv2_scale import distributed
from swinv2_scale.data.stream import Batch
from swinv2_scale.engine import Engine
from swinv2_scale.models.swin_v2 import SwinTransformerV2
from swinv2_scale.optim import Schedule
from swinv2_scale.telemetry import Picture, Telemetry


class Task(Protocol):
    """What a task brings to a run. Tasks live in swinv2_scale/tasks and are chosen by conf/task."""

    train_transform: Callable[[dict[str, Any]], dict[str, Any]]
    evaluation_transform: Callable[[dict[str, Any]], dict[str, Any]]
    train_collate: Callable[[list[dict[str, Any]]], Batch]
    evaluation_collate: Callable[[list[dict[str, Any]]], Batch]
    metrics: tuple[str, ...]

    def build(self, model: Any) -> nn.Module:
        """The model to train, from the configuration of its backbone."""

    def backbone(self, model: nn.Module) -> SwinTransformerV2:
        """The part of a built model that weights of another run fill."""

    def check_classes(self, *classes: Sequence[str]) -> None:
        """Raise ValueError if training and held-out data (names of classes, empty if unknown) do not fit the task."""

    def loss(self, model: Callable, batch: Batch) -> Tensor:
        """Mean loss of a micro-batch: scalar."""

    def sums(self, model: Callable, batch: Batch) -> dict[str, Tensor]:
        """Each of `metrics`, summed over the samples of a held-out batch."""

    def pictures(self, model: nn.Module, batch: Batch, classes: Sequence[str]) -> tuple[str, list[Picture]]:
        """What the model makes of a held-out batch, to look at, and a name for the collection."""


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
    look: Callable[[int], None],
    save: Callable[[int], None],
) -> None:
    """Run the steps start … stop - 1; `look` evaluates and `save` checkpoints after a number of finished steps.

    Intervals are in steps; 0 means only at the end. Raises FloatingPointError when loss or gradients are not finite.
    """
    batches = telemetry.timed(stream)
    for step in range(start, stop):
        # ------------------------------------------------------------------------------------------ the step
        telemetry.loss(engine.step(seeded(islice(batches, engine.accumulation)), task.loss, schedule(step)))
        # ------------------------------------------------------------------------------------------ now and then
        done = step + 1
        saves, looks = due(done, checkpoint_every, stop), due(done, evaluate_every, stop)
        if due(done, log_every, stop) or saves or looks:
            telemetry.train(done, learning_rate=schedule(step), gradient_norm=engine.gradient_norm())
        if saves:
            save(done)
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


def evaluate(model: nn.Module, task: Task, stream: Iterable[Batch]) -> dict[str, float]:
    """Means over every sample of the stream, each counted once whatever the number of ranks. Collective."""
    model.eval()
    totals = dict.fromkeys((*task.metrics, "samples"), torch.zeros((), device=distributed.device()))
    with torch.inference_mode():
        for batch in stream:
            for name, value in task.sums(model, distributed.to_device(batch)).items():
                totals[name] = totals[name] + value
            totals["samples"] = totals["samples"] + len(batch["key"])
    sums = distributed.sum_over_ranks({name: float(value) for name, value in totals.items()})
    return {name: sums[name] / sums["samples"] for name in task.metrics} | {"samples": int(sums["samples"])}
