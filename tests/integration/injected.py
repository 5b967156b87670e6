"""Tasks that misbehave.

Injected, InjectedDetection    losses fail at the steps of INJECT, "3:nan 5:inf 7:hang 8:slow", on the rank INJECT_RANK
Slow                           each step of the first start of a Slurm job takes SLOW seconds more
"""

import os
import time
from collections.abc import Callable

import torch
from torch import Tensor

from swinv2_scale import distributed
from swinv2_scale.data.stream import Batch
from swinv2_scale.tasks.detection import Detection
from swinv2_scale.tasks.simmim import MaskedImageModelling


class Faults:
    """Before a task in the order of its bases. Counts training losses, one pass to a step; the first has number 0."""

    step = int(os.environ.get("INJECT_FIRST", "0"))

    def loss(self, model: Callable, batch: Batch) -> Tensor:
        loss = super().loss(model, batch)  # type: ignore[misc]
        if torch.is_grad_enabled():
            faults = dict(fault.split(":") for fault in os.environ["INJECT"].split())
            if distributed.rank() == int(os.environ["INJECT_RANK"]) and str(self.step) in faults:
                fault = faults[str(self.step)]
                time.sleep({"hang": 600.0, "slow": 1.0}.get(fault, 0.0))
                loss = loss if fault == "slow" else loss * float(fault)
            self.step += 1
        return loss


class Injected(Faults, MaskedImageModelling):
    """Of pretraining."""


class InjectedDetection(Faults, Detection):
    """Of a detector."""


class Slow(MaskedImageModelling):
    """Its losses are those of the task that it delays."""

    def loss(self, model: Callable, batch: Batch) -> Tensor:
        if torch.is_grad_enabled() and "SLURM_RESTART_COUNT" not in os.environ:
            time.sleep(float(os.environ["SLOW"]))
        return super().loss(model, batch)
