"""Real runs: the launch scripts as processes of their own, on one or two CPU ranks, as a user starts them."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).parents[2]
TINY = [
    "model=debug",
    "model.embed_dim=16",
    "model.depths=[1,1,2,1]",
    "model.num_heads=[1,2,2,4]",
    "model.image_size=64",
    "model.window_size=4",
    "optim.lr=1e-3",
    "optim.lr_batch=null",
    "optim.warmup_steps=2",
    "log_every=1",
    "workers=1",
    "telemetry=no_wandb",
]
STEPS = 6


def simmim(shards: Path) -> list[str]:
    return [
        f"data.train={shards}/photographs/train",
        f"steps={STEPS}",
        "epochs=null",
        "global_batch=60",  # 180 photographs: an epoch ends after 3 steps
        "model.image_size=64",
        "checkpoint_every=3",
    ]


def classification(shards: Path) -> list[str]:
    return [
        "task=classification",
        "model.num_classes=10",
        f"data.train={shards}/digits/train",
        f"data.validation={shards}/digits/validation",
        f"steps={STEPS}",
        "epochs=null",
        "global_batch=16",
    ]


@dataclass
class Run:
    """A finished process and the run directory that it was to write."""

    directory: Path
    returncode: int
    output: str

    def record(self) -> list[dict]:
        """The record's lines, without a last one that a crash cut off."""
        complete, _, _ = (self.directory / "metrics.jsonl").read_text().rpartition("\n")
        return [json.loads(line) for line in complete.splitlines()]

    def events(self, event: str) -> dict[int, dict]:
        """The record's lines of one kind, by step; of repeated steps the last."""
        return {line["step"]: line for line in self.record() if line["event"] == event}

    def losses(self) -> list[float]:
        return [line["loss"] for _, line in sorted(self.events("train").items())]

    def weights(self) -> dict[str, Tensor]:
        newest = sorted((self.directory / "checkpoints").glob("step_*"))[-1]
        files = {path.stem: load_file(path) for path in newest.glob("*.safetensors")}
        return {
            f"{name}.{key}": t.clone() for name, file in files.items() for key, t in file.items()
        }  # mapped, not read


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(launcher: str, ranks: int, script: str) -> list[str]:
    """How a user starts a script."""
    path = f"launch/{script}.py"
    if launcher == "python":
        assert ranks == 1
        return [sys.executable, path]
    if launcher == "torchrun":
        return [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc-per-node={ranks}",
            f"--master-port={free_port()}",
            path,
        ]
    assert launcher == "deepspeed"
    executable = str(Path(sys.executable).parent / "deepspeed")
    return [executable, f"--num_accelerators={ranks}", f"--master_port={free_port()}", path]


def await_step(record: Path, begin: int, step: int, process: subprocess.Popen[str]) -> None:
    """Wait for a step in what comes after the record's first `begin` bytes, which are those of earlier attempts."""
    deadline = time.monotonic() + 300
    while not (record.exists() and f'"event": "train", "step": {step},'.encode() in record.read_bytes()[begin:]):
        assert process.poll() is None and time.monotonic() < deadline, f"the run ended before step {step}"
        time.sleep(0.01)


def descendants(process: int) -> list[int]:
    """Process numbers of a process and all below it, as far as they still are; torchrun's ranks lead sessions."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return []
    return [process, *(below for child in children for below in descendants(int(child)))]


def ranks_of(process: int) -> list[int]:
    """Process numbers of the ranks that a launcher started: they have a RANK, and their parents have none."""
    ranks = {}
    for number in descendants(process):
        with contextlib.suppress(OSError):
            found = re.search(r"(?:^|\0)RANK=(\d+)", Path(f"/proc/{number}/environ").read_text())
            parent = int(Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[1])
            if found and parent not in ranks.values():
                ranks[int(found[1])] = number
    return [ranks[rank] for rank in sorted(ranks)] or [process]


def kill_all(ranks: list[int]) -> None:
    """Every rank at once, as when a machine loses power; the launchers end by themselves."""
    for rank in ranks:
        for process in descendants(rank):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def run(
    directory: Path,
    *overrides: str,
    ranks: int = 1,
    launcher: str = "",
    script: str = "pretrain",
    tiny: bool = True,
    at: tuple[int, Callable[[list[int]], None]] | None = None,
    environment: dict[str, str] | None = None,
) -> Run:
    """Runs a script in `directory`, to the end.

    With `at`, a step and an action, the action gets the ranks' process numbers once the record shows the step.
    """
    arguments = [*TINY, f"name={directory.name}", f"run_dir={directory}"] if tiny else []
    variables = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    variables |= {
        "PATH": f"{Path(sys.executable).parent}:{variables['PATH']}",
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCHDYNAMO_DISABLE": "1",  # saves DeepSpeed's import of the compiler at every start
    }
    record = directory / "metrics.jsonl"
    begin = record.stat().st_size if record.exists() else 0
    with subprocess.Popen(
        [*command(launcher or ("python" if ranks == 1 else "torchrun"), ranks, script), *arguments, *overrides],
        cwd=ROOT,
        env=variables | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            if at is not None:
                await_step(record, begin, at[0], process)
                at[1](ranks_of(process.pid))
            output, _ = process.communicate(timeout=300)
        except BaseException:
            for number in descendants(process.pid):
                os.kill(number, signal.SIGKILL)
            raise
    return Run(directory, process.returncode, output)
