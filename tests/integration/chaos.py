"""A training that is killed, signalled, frozen, damaged and starved of disk at random moments, and what comes of it.

    python tests/integration/chaos.py --rounds 50 --seed 0 [--world 2] [--task detection|video]

Each round is a run of its own through DeepSpeed's launcher. It suffers one to three blows, each followed by the same
command again, and must end as the undisturbed run did: every loss and every weight to the last bit, every step in the
record, each attempt beginning at the newest checkpoint that is intact, nothing hanging. Exit code 0 only if every round
held. A full disk is a small tmpfs, and is dealt only where this process may mount one.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import test_detecting
import test_video_run
import torch
from real_runs import Run, kill_all, run

from swinv2_scale.data.pack import pack
from swinv2_scale.signals import EXIT_CODE

STEPS, EVERY = 40, 4
TASKS = ("simmim", "detection", "video")
BOUND = 150  # seconds that an attempt may take; a frozen rank is noticed after 6, and its launcher waits 30 more
SIZE = 200_000_000  # bytes of the disk that is filled


def _kill_one(ranks: list[int], dice: random.Random) -> None:
    os.kill(dice.choice(ranks), signal.SIGKILL)


def _kill_worker(ranks: list[int], dice: random.Random) -> None:
    rank = dice.choice(ranks)
    workers = Path(f"/proc/{rank}/task/{rank}/children").read_text().split()
    os.kill(int(dice.choice(workers)), signal.SIGKILL)


def _signal(number: signal.Signals) -> Callable[[list[int], random.Random], None]:
    return lambda ranks, dice: os.kill(dice.choice(ranks), number)


BLOWS: dict[str, Callable[[list[int], random.Random], None]] = {
    "kill all": lambda ranks, dice: kill_all(ranks),
    "kill a rank": _kill_one,
    "kill a worker": _kill_worker,
    "SIGUSR2": _signal(signal.SIGUSR2),
    "SIGTERM": _signal(signal.SIGTERM),
    "freeze": _signal(signal.SIGSTOP),
}


def _flip(checkpoint: Path, dice: random.Random) -> None:
    path = dice.choice([*checkpoint.glob("*.safetensors"), checkpoint / "state.json"])
    content = bytearray(path.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    path.write_bytes(content)


def _truncate(checkpoint: Path, dice: random.Random) -> None:
    path = dice.choice([path for path in sorted(checkpoint.iterdir()) if path.stat().st_size])
    os.truncate(path, dice.randrange(path.stat().st_size))


DAMAGES: dict[str, Callable[[Path, random.Random], object]] = {
    "a bit flipped": _flip,
    "a file cut short": _truncate,
    "no COMPLETE": lambda checkpoint, dice: (checkpoint / "COMPLETE").unlink(),
    "a file gone": lambda checkpoint, dice: dice.choice(sorted(checkpoint.glob("*.*"))).unlink(),
}


@dataclass
class Round:
    """What a run suffered, and what did not hold."""

    blows: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Chaos:
    """The runs of one session."""

    root: Path
    world: int
    dice: random.Random
    disk: Path | None  # a small file system
    script: str
    settings: list[str]  # of the task: its data and batches
    damaged: dict[str, int] = field(default_factory=dict)

    def attempt(self, directory: Path, blow: Callable[[list[int]], None] | None = None, at: int = 0) -> Run:
        """The command, once."""
        return run(
            directory,
            *self.settings,
            *(f"steps={STEPS}", "epochs=null", "precision=fp32"),
            *(
                f"checkpoint_every={EVERY}",
                "keep_checkpoints=3",
                "model.drop_path_rate=0.3",
                "optim.ema_decay=0.99",
                "stall_minutes=0.1",
            ),
            script=self.script,
            ranks=self.world,
            launcher="deepspeed",
            at=None if blow is None else (at, blow),
        )

    def play(self, number: int, expected: Run) -> Round:
        """One round."""
        outcome, begin, dice = Round(), time.monotonic(), self.dice
        self.damaged.clear()
        full = self.disk is not None and dice.random() < 0.2
        directory = (self.disk if full and self.disk else self.root) / f"round_{number}"
        intact = 0
        for _ in range(dice.randint(1, 3)):
            first = intact + 1
            if first >= STEPS - 1:
                break
            name, at, late = dice.choice(list(BLOWS)), dice.randrange(first, STEPS - 1), dice.uniform(0, 0.3)
            outcome.blows.append(f"{name} at {at}" + " on a full disk" * full)

            def strike(ranks: list[int], name: str = name, late: float = late, full: bool = full) -> None:
                if full and self.disk:
                    _fill(self.disk)
                time.sleep(late)
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended by itself
                    BLOWS[name](ranks, dice)

            started = time.monotonic()
            found = self.attempt(directory, strike, at)
            if time.monotonic() - started > BOUND:
                outcome.problems.append(f"{name} at {at}: the attempt took {time.monotonic() - started:.0f} s")
            if full and self.disk:
                (self.disk / "ballast").unlink()
            finished = (directory / "metrics.jsonl").read_text().count('"reason": "finished"') > 0
            right = (EXIT_CODE,) if name.startswith("SIG") and not full else (EXIT_CODE, 1, 137, 247, 255)
            if found.returncode not in (*right, *((0,) if finished else ())):
                outcome.problems.append(f"{name} at {at}: exit code {found.returncode}\n{found.output[-2000:]}")
            outcome.problems += _started_at(found, intact)
            intact = self._damage(directory, outcome)
        final = self.attempt(directory)
        outcome.problems += _started_at(final, intact) + _differences(final, expected)
        shutil.rmtree(directory)
        outcome.seconds = time.monotonic() - begin
        return outcome

    def _damage(self, directory: Path, outcome: Round) -> int:
        """Perhaps damages the newest checkpoint; the step of the newest intact one, 0 without any."""
        checkpoints = sorted((directory / "checkpoints").glob("step_*"))
        checkpoints = [path for path in checkpoints if self.damaged.get(path.name) != path.stat().st_ino]
        if checkpoints and self.dice.random() < 0.4:
            name = self.dice.choice(list(DAMAGES))
            outcome.blows.append(f"{name} in {checkpoints[-1].name}")
            self.damaged[checkpoints[-1].name] = checkpoints[-1].stat().st_ino  # one written later is another directory
            DAMAGES[name](checkpoints.pop(), self.dice)
        return int(checkpoints[-1].name.removeprefix("step_")) if checkpoints else 0


def _of_task(task: str, root: Path, world: int) -> tuple[str, list[str]]:
    """The script that trains a task, and its settings; its data are packed under root."""
    if task == "simmim":
        pack("photographs/train", root / "photographs", format="demo", shard_size=30, seed=0)
        return "pretrain", [f"data.train={root}/photographs", "global_batch=20", f"micro_batch={20 // world}"]
    if task == "detection":
        data = [f"data.train={test_detecting.packed(root, 'train', 40)}", *test_detecting.SETTINGS]
    else:
        shards = test_video_run.packed(root, "training", 40)
        data = [f"data.train={shards}", "data.validation=null", *test_video_run.SETTINGS]
    return "finetune", [*data, f"global_batch={2 * world}", "micro_batch=2"]


def _fill(disk: Path) -> None:
    with (disk / "ballast").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            pass


def _started_at(found: Run, intact: int) -> list[str]:
    step = [line["step"] for line in found.record() if line["event"] == "start"][-1]
    return [] if step == intact else [f"an attempt began at step {step}, the newest intact checkpoint is of {intact}"]


def _differences(found: Run, expected: Run) -> list[str]:
    """What is not as in the undisturbed run."""
    if found.returncode != 0:
        return [f"the last attempt ended with {found.returncode}\n{found.output[-2000:]}"]
    losses = {step: line["loss"] for step, line in found.events("train").items()}
    wanted = {step: line["loss"] for step, line in expected.events("train").items()}
    problems = [
        f"loss of step {step}: {losses.get(step)}, not {wanted[step]}"
        for step in wanted
        if losses.get(step) != wanted[step]
    ]
    weights, theirs = found.weights(), expected.weights()
    return problems + [f"{name} differs" for name in theirs if not torch.equal(weights[name], theirs[name])][:1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--world", type=int, default=2, help="ranks; must divide 20")
    parser.add_argument("--task", choices=TASKS, default=TASKS[0])
    arguments = parser.parse_args()
    failed, blows = 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        disk = root / "disk"
        disk.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", disk], capture_output=True, check=False
        )
        try:
            dice = random.Random(arguments.seed)
            of_task = _of_task(arguments.task, root, arguments.world)
            chaos = Chaos(root, arguments.world, dice, disk if mounted.returncode == 0 else None, *of_task)
            expected = chaos.attempt(root / "undisturbed")
            if expected.returncode:
                print(expected.output)
                return 1
            for number in range(1, arguments.rounds + 1):
                outcome = chaos.play(number, expected)
                failed, blows = failed + bool(outcome.problems), blows + len(outcome.blows)
                verdict = "FAILED" if outcome.problems else "held"
                print(f"{number:3}  {verdict}  {outcome.seconds:5.0f} s  {'; '.join(outcome.blows)}", flush=True)
                for problem in outcome.problems:
                    print(f"     {problem}", flush=True)
        finally:
            if mounted.returncode == 0:
                subprocess.run(["umount", disk], check=True)
    print(
        f"{arguments.task}: {arguments.rounds - failed} of {arguments.rounds} rounds held, {blows} blows, "
        f"{arguments.world} ranks, "
        f"{STEPS} steps each, seed {arguments.seed}{'' if mounted.returncode == 0 else '; no disk could be filled'}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
