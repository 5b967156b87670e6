"""Whether the hosts of a run are sound, before it starts: `swinv2-scale doctor --distributed`, started as a run is.

Each rank multiplies matrices of small integers, whose product is exact on every device and in every order of sums,
writes and reads back a file, and reads a sample; all ranks together reduce a tensor whose sum is known. What is wrong,
or much slower than on most ranks, makes its host suspect.
"""

import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from swinv2_scale import config, distributed
from swinv2_scale.data.manifest import open_manifest
from swinv2_scale.data.shards import read_sample
from swinv2_scale.data.sources import Reader

SIDE = 1024  # of the matrices
REDUCED = 16 * 2**20  # bytes of the tensor that is summed over ranks
WRITTEN = 16 * 2**20  # bytes of the file
ROUNDS = 5


@dataclass
class Health:
    """What a rank found of its host. Seconds are medians; `problems` are sentences."""

    rank: int
    host: str
    device: str
    multiply_seconds: float = 0.0
    reduce_seconds: float = 0.0
    disk_seconds: float = 0.0
    data_seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


def preflight(directory: Path | None, data: str | None, *, factor: float, suspects: Path | None, as_json: bool) -> int:
    """Examine all ranks' hosts and print the result on rank 0. Collective; 0, or 1 if a host is suspect, on all ranks.

    directory   where a file is written and read back, such as the run directory; None: nowhere
    data        shards of which a sample is read; None: none
    factor      a rank is slow that takes so many times the median of all ranks
    suspects    a file of host names, one a line, that suspect ones are added to; None: none
    """
    reports = distributed.gathered(examine(directory, data))
    judge(reports, factor)
    hosts = sorted({report.host for report in reports if report.problems})
    if distributed.rank() == 0:
        if as_json:
            print(json.dumps({"ranks": [asdict(report) for report in reports], "suspects": hosts}, indent=1))
        else:
            show(reports, hosts)
        if suspects is not None and hosts:
            known = suspects.read_text().split() if suspects.exists() else []
            suspects.write_text("".join(f"{host}\n" for host in sorted({*known, *hosts})))
    return 1 if hosts else 0


def examine(directory: Path | None, data: str | None) -> Health:
    """This rank's report. Collective: a check that fails is told in it, and raises nothing."""
    health = Health(distributed.rank(), distributed.host(), str(distributed.device()))
    health.multiply_seconds = _tried(health, "multiplying matrices", _multiply)
    health.reduce_seconds = _reduce(health)
    if directory is not None:
        health.disk_seconds = _tried(health, f"writing in {directory}", lambda: _write(directory))
    if data is not None:
        health.data_seconds = _tried(health, f"reading {data}", lambda: _read(data))
    return health


def judge(reports: Sequence[Health], factor: float) -> None:
    """Add to the problems of ranks that take `factor` times the median of all."""
    for name in ("multiply_seconds", "disk_seconds", "data_seconds"):
        usual = statistics.median(getattr(report, name) for report in reports)
        for report in reports:
            seconds = getattr(report, name)
            # Less than a tenth of a second more is the scheduler's, not the host's.
            if seconds > factor * usual and seconds > usual + 0.1:
                what = name.removesuffix("_seconds").replace("multiply", "multiplying matrices")
                report.problems.append(f"{what} takes {seconds:.2f} s, {usual:.2f} s on most ranks")


def show(reports: Sequence[Health], hosts: Sequence[str]) -> None:
    """A line for each rank, then the suspects."""
    rate = 2 * SIDE**3 / 1e9
    for report in reports:
        reduced = f"all-reduce {REDUCED / 2**20 / max(report.reduce_seconds, 1e-9):.0f} MiB/s"
        speed = f"{rate / max(report.multiply_seconds, 1e-9):.0f} GFLOP/s"
        print(f"rank {report.rank} on {report.host}, {report.device}: {speed}, {reduced}", flush=True)
        for problem in report.problems:
            print(f"    {problem}", flush=True)
    print(f"suspect hosts: {' '.join(hosts)}" if hosts else f"{len(reports)} ranks are sound", flush=True)


def _tried(health: Health, what: str, check: Callable[[], float]) -> float:
    """Seconds of a check; one that fails, in whatever way, is a problem."""
    try:
        return check()
    except Exception as error:
        health.problems.append(f"{what} failed: {error}")
        return 0.0


def _multiply() -> float:
    """Integers to 7, so that sums of 1,024 products stay below 2^24 and are exact in float32, TF32 and bfloat16."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-7, 8, (SIDE, SIDE), generator=generator).float() for _ in range(2))
    expected = (left.double() @ right.double().sum(dim=1)).to(torch.int64)
    left, right = left.to(distributed.device()), right.to(distributed.device())
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        found = (left @ right).double().sum(dim=1).to(torch.int64).cpu()  # waits for the device
        times.append(time.perf_counter() - begin)
        if not torch.equal(found, expected):
            raise ArithmeticError(f"{int((found != expected).sum())} of {SIDE} row sums are wrong")
    return statistics.median(times)


def _reduce(health: Health) -> float:
    """Every rank takes part whatever else failed. A wrong sum is told by all: it says nothing of which host."""
    world, times = distributed.world_size(), []
    expected = world * (world + 1) / 2
    for _ in range(ROUNDS):
        tensor = torch.full((REDUCED // 4,), distributed.rank() + 1.0, device=distributed.device())
        distributed.barrier()
        begin = time.perf_counter()
        wrong = int((distributed.sum_tensor(tensor) != expected).sum())
        times.append(time.perf_counter() - begin)
        if wrong:
            health.problems.append(f"{wrong} of {len(tensor)} sums over all ranks are wrong")
            break
    return statistics.median(times)


def _write(directory: Path) -> float:
    content = os.urandom(1 << 20) * (WRITTEN >> 20)
    path = directory / f".preflight_{distributed.rank()}"
    begin = time.perf_counter()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if hashlib.sha256(path.read_bytes()).digest() != hashlib.sha256(content).digest():
            raise OSError(f"{path} does not hold what was written")
    finally:
        path.unlink(missing_ok=True)
    return time.perf_counter() - begin


def _read(data: str) -> float:
    begin = time.perf_counter()
    manifest = open_manifest(data, Reader(**config.reading(config.data_defaults())))
    read_sample(manifest, distributed.rank() * len(manifest) // distributed.world_size())
    return time.perf_counter() - begin
