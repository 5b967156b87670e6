"""What a run does about steps that went wrong, decided by all ranks together after each step.

A step whose gradients are not finite changes nothing: the engine leaves weights and optimiser as they were, the batch
is used up, the learning rate goes on with the step. The guard counts such steps and says when it is enough; and, where
that is asked for, when the loss has left the range it was in.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable
from enum import Enum, auto
from typing import Any

from torch import Tensor

from swinv2_scale import distributed, signals

WINDOW = 200  # steps whose losses say what is usual
FEWEST = 50  # before which nothing is unusual


class Verdict(Enum):
    """How the run goes on."""

    CONTINUE = auto()
    STOP = auto()  # a rank was signalled: save and leave
    ROLLBACK = auto()  # back to the weights of the last checkpoint, on with the next batch
    ABORT = auto()


class Guard:
    """Judges every step, alike on all ranks.

    nonfinite    what to do after `patience` steps in a row without finite gradients: "abort", "rollback", or "skip"
                 them for as long as they come
    spike        roll back after `patience` steps in a row whose loss lies more than this many standard deviations
                 (estimated from the median deviation) above the median of the last 200; None: never
    rollbacks    after so many, the next one is an abort
    tell         is told of each step that was skipped, as a line of text

    `state` is what a checkpoint must hold for a resumed run to judge as an uninterrupted one.
    """

    def __init__(
        self, *, nonfinite: str, spike: float | None, patience: int, rollbacks: int, tell: Callable[[int, str], None]
    ) -> None:
        if nonfinite not in ("skip", "rollback", "abort"):
            raise ValueError(f"guard.nonfinite must be skip, rollback or abort, got {nonfinite!r}")
        if patience < 1 or rollbacks < 0 or (spike is not None and spike <= 0):
            raise ValueError(
                f"guard.patience={patience} must be 1 or more, guard.rollbacks={rollbacks} 0 or more, and "
                f"guard.spike={spike} positive or null"
            )
        self.nonfinite, self.spike, self.patience, self.rollbacks, self.tell = (
            nonfinite,
            spike,
            patience,
            rollbacks,
            tell,
        )
        self._skipped_in_a_row = self._spikes_in_a_row = self._rolled_back = 0
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self.cause = ""

    def after(self, done: int, loss: Tensor, applied: bool, rescaled: bool = False) -> Verdict:
        """The verdict after `done` steps. Collective: `loss` is this rank's, the others are the same on all.

        A step that was skipped while all losses were finite, and lowered the loss scale of fp16, does not count.
        """
        own = {"signals": float(signals.received()), "loss": float(loss) if self.spike else 0.0}
        total = distributed.sum_over_ranks(own)
        if total["signals"]:
            return Verdict.STOP
        if not applied:
            losses = distributed.gathered(float(loss))
            shown = ", ".join(f"{value:.4g}" for value in losses)
            if rescaled and all(math.isfinite(value) for value in losses):
                self.tell(done, f"gradients are too large for the loss scale, halved; skipped; loss by rank: {shown}")
                return Verdict.CONTINUE
            self._skipped_in_a_row += 1
            self.tell(done, f"gradients are not finite, skipped; loss by rank: {shown}")
            return self._decide(
                self._skipped_in_a_row, self.nonfinite, f"{self.patience} steps in a row were not finite"
            )
        self._skipped_in_a_row = 0
        if self.spike is None:
            return Verdict.CONTINUE
        mean = total["loss"] / distributed.world_size()
        if not self._is_unusual(mean):
            self._spikes_in_a_row = 0
            self._losses.append(mean)
            return Verdict.CONTINUE
        self._spikes_in_a_row += 1
        usual = statistics.median(self._losses)
        return self._decide(self._spikes_in_a_row, "rollback", f"the loss rose to {mean:.4g}, usual is {usual:.4g}")

    @property
    def state(self) -> dict[str, Any]:
        return {
            "skipped_in_a_row": self._skipped_in_a_row,
            "spikes_in_a_row": self._spikes_in_a_row,
            "rolled_back": self._rolled_back,
            "losses": list(self._losses),
        }

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self._skipped_in_a_row, self._spikes_in_a_row = state["skipped_in_a_row"], state["spikes_in_a_row"]
        self._rolled_back, self._losses = state["rolled_back"], deque(state["losses"], WINDOW)

    def _is_unusual(self, loss: float) -> bool:
        if self.spike is None or len(self._losses) < FEWEST:
            return False
        median = statistics.median(self._losses)
        deviation = 1.4826 * statistics.median(abs(value - median) for value in self._losses)
        return loss > median + self.spike * deviation

    def _decide(self, in_a_row: int, action: str, cause: str) -> Verdict:
        if in_a_row < self.patience or action == "skip":
            return Verdict.CONTINUE
        self.cause = cause
        if action == "abort" or self._rolled_back == self.rollbacks:
            return Verdict.ABORT
        self._rolled_back += 1
        self._skipped_in_a_row = self._spikes_in_a_row = 0
        return Verdict.ROLLBACK
