"""Signals that ask a run to save what it has and leave: of a scheduler that wants its machines, or of a time limit.

A handler only notes the signal. The loop asks at the end of each step, all ranks together, so that one signal to one
rank is one checkpoint of one step, whatever the rank was doing.
"""

import os
import signal
from threading import Thread
from types import FrameType

STOPPING = (signal.SIGUSR2, signal.SIGTERM)  # not SIGUSR1, which NCCL uses
EXIT_CODE = 75  # EX_TEMPFAIL: the same command again goes on from here

_received: list[int] = []


class Stopped(Exception):  # noqa: N818  # no error: the run did what it was asked to
    """The run saved and ends, because a signal asked for it."""


def listen() -> None:
    """Note the signals from here on, instead of dying of them."""
    for number in STOPPING:
        signal.signal(number, _note)


def outlast() -> None:
    """Let this process, which works for a rank, live on until its parent ends it.

    Slurm signals every process of a job: without its loading processes, the rank could not finish its step and save.
    """
    if hasattr(signal, "sigwaitinfo"):  # which macOS has not, nor Slurm
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        Thread(target=_await_parent, daemon=True).start()


def received() -> bool:
    """Whether one has come to this rank."""
    return bool(_received)


def _note(number: int, _: FrameType | None) -> None:
    _received.append(number)


def _await_parent() -> None:
    while signal.sigwaitinfo(STOPPING).si_pid != os.getppid():
        pass
    os._exit(0)
