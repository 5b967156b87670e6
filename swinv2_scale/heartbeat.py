"""A sign of life of every rank, and an end with stacks for a run that stands still.

run_dir/heartbeat/rank_3.txt holds what the rank was last seen doing. When it does nothing new for `stall_minutes`, the
stacks of all its threads follow in that file and the process ends: idle machines cost more than a restart. The ranks
that wait for it in a collective stall too, and do the same.
"""

import faulthandler
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_LINE = 100  # characters of the first line, which is written over and over


class Heartbeat:
    """Of one rank. The watch is a thread of C, which runs also when Python hangs.

    Raises ValueError unless the watch is shorter than `timeout_minutes`, after which collectives fail: then the
    launcher would end the rank that stands still before its stack is known.
    """

    def __init__(self, run_dir: Path, rank: int, *, stall_minutes: float, timeout_minutes: float) -> None:
        if not 0 < stall_minutes < timeout_minutes:
            raise ValueError(
                f"stall_minutes={stall_minutes} must be positive and less than timeout_minutes={timeout_minutes}"
            )
        self.path = run_dir / "heartbeat" / f"rank_{rank}.txt"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("wb", buffering=0)
        self._file.seek(_LINE)  # where the stacks go
        self._seconds = 60 * stall_minutes

    def beat(self, phase: str, step: int) -> None:
        """The rank is alive, in this phase ("training", "saving", …) after so many finished steps."""
        faulthandler.dump_traceback_later(self._seconds, exit=True, file=self._file)
        self._write(f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} UTC, step {step}, {phase}")

    def over(self, items: Iterable[T], phase: str, step: int) -> Iterator[T]:
        """The items, with a beat at each."""
        for item in items:
            self.beat(phase, step)
            yield item

    def end(self, reason: str) -> None:
        """No watch from here on."""
        faulthandler.cancel_dump_traceback_later()
        self._write(reason)

    def _write(self, text: str) -> None:
        line = " ".join(text.split())[: _LINE - 1]
        os.pwrite(self._file.fileno(), f"{line:{_LINE - 1}}\n".encode("ascii", "replace"), 0)
