"""Trainings on a real Slurm: interrupted in every way, without hosts that a preflight names, arrays, stages, mistakes.

All jobs are played at once, at most three together, since most of their time is waiting; the tests look at what came
of them.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from real_runs import ROOT, TINY, Run, run
from slurm_cluster import Cluster, missing, slurm_cluster

from swinv2_scale import submit

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())
STEPS = 12
# MASTER_ADDR: no name server knows virtual nodes.
VARIABLES = ["MASTER_ADDR=127.0.0.1", "GLOO_SOCKET_IFNAME=lo", "TORCHDYNAMO_DISABLE=1", "DS_ACCELERATOR=cpu"]
JOB = ["nodes=2", "cluster.accelerators=1", "cluster.gpus_per_node=null", "cluster.time=0-00:10:00"]
JOB += ["cluster.wait_seconds=20"]
# The host that was the second one at the first start cannot write a long file, then and later.
FAULTY_HOST = """\
if [ "$SLURM_NODEID" = 1 ] && [ ! -e {file} ]; then echo "$SLURMD_NODENAME" >{file}; fi
if [ "$(cat {file})" = "$SLURMD_NODENAME" ]; then trap '' XFSZ; ulimit -f 100; fi
exec "$@"
"""


@dataclass
class Played:
    """A job that came to its end."""

    directory: Path
    number: str
    shown: dict[str, str]

    def log(self) -> str:
        return (self.directory / "slurm" / f"{self.number}.log").read_text()


def training(shards: Path) -> list[str]:
    """12 steps of 20 photographs, 9 to an epoch."""
    data = [f"data.train={shards}/photographs/train", f"steps={STEPS}", "epochs=null"]
    return [*data, "global_batch=20", "micro_batch=10", "precision=fp32", "checkpoint_every=2"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster that this process's own commands find too."""
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as started, pytest.MonkeyPatch.context() as patch:
        path = [str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        for name, value in {**started.environment, "PYTHONPATH": ":".join(path)}.items():
            patch.setenv(name, value)
        patch.chdir(ROOT)
        yield started


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def undisturbed(home: Path, shards: Path) -> Run:
    """The same training on two ranks of torchrun."""
    return run(home / "undisturbed", *training(shards), ranks=2)


def await_step(directory: Path, step: int) -> None:
    record = directory / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not record.exists() or f'"train", "step": {step},' not in record.read_text():
        assert time.monotonic() < deadline, f"no step {step} in {directory}"
        time.sleep(0.05)


def preempt(cluster: Cluster, job: str) -> None:
    """A job of a partition with a higher priority takes all of one of the hosts, for some seconds."""
    host = cluster.show(job)["NodeList"].replace("[", "").partition("-")[0].partition(",")[0]
    wanted = [f"--nodelist={host}", "--cpus-per-task=4", "--partition=urgent", "--output=/dev/null"]
    cluster.run("sbatch", *wanted, "--wrap=sleep 3")


def kill_task(job: str) -> None:
    """The second rank: the process that Slurm's own process on its host started."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            variables = (process / "environ").read_bytes().split(b"\0")
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
            ours = {f"SLURM_JOB_ID={job}".encode(), b"SLURM_PROCID=1"} <= set(variables)
            if ours and Path(f"/proc/{parent}/comm").read_text().strip() == "slurmstepd":
                os.kill(int(process.name), signal.SIGKILL)
                return
    raise AssertionError(f"job {job} has no second task")


# What happens to a job after step 5, and settings of its own. A step takes longer at the first start.
INTERRUPTIONS: dict[str, tuple[Callable[[Cluster, str], object], list[str], float]] = {
    # Slurm looks at limits every half minute: the signal comes 60 to 90 seconds before the limit.
    "time_limit": (lambda cluster, job: None, ["cluster.time=0-00:02:00", "cluster.signal_seconds=60"], 6.0),
    "requeued": (lambda cluster, job: cluster.run("scontrol", "requeue", job), ["preflight=true"], 0.5),
    "preempted": (preempt, ["cluster.cpus_per_task=4", "cluster.partition=batch"], 0.5),
    "killed_step": (lambda cluster, job: cluster.run("scancel", "--signal=KILL", f"{job}.0"), [], 0.5),
    "killed_task": (lambda cluster, job: kill_task(job), [], 0.5),
}


@pytest.fixture(scope="module")
def played(cluster: Cluster, home: Path, shards: Path, undisturbed: Run) -> Iterator[dict[str, Future[Played]]]:
    def job(name: str, variables: list[str], *settings: str) -> submit.Job:
        environment = f"cluster.environment={[*VARIABLES, *variables]}"
        places = [f"name={name}", f"run_dir={home / name}"]
        (prepared,) = submit.jobs([*JOB, environment, *TINY, *training(shards), *places, *settings], ROOT / "launch")
        return prepared

    def play(one: submit.Job, strike: Callable[[Cluster, str], object] | None) -> Played:
        (number,), directory = submit.submit([one]), one.run_dirs[0]
        if strike is not None:
            await_step(directory, 5)
            strike(cluster, number)
        return Played(directory, number, cluster.wait(number, restarts=1, seconds=240))

    with ThreadPoolExecutor(max_workers=3) as pool:
        futures = {}
        for name, (strike, settings, slow) in INTERRUPTIONS.items():
            # Partitions but batch are not preempted.
            own = ["task._target_=injected.Slow", "preflight=false", "telemetry.wandb=offline"]
            prepared = job(name, [f"SLOW={slow}"], "cluster.partition=urgent", *own, *settings)
            futures[name] = pool.submit(play, prepared, strike)
        (home / "faulty_host.sh").write_text(FAULTY_HOST.format(file=home / "faulty_host"))
        futures["excluded"] = pool.submit(play, job("excluded", [], f"cluster.prefix='sh {home}/faulty_host.sh'"), None)
        yield futures


def assert_whole(found: Run, undisturbed: Run) -> None:
    """The record has every step, and the losses of a run that nothing disturbed."""
    assert sorted(found.events("train")) == list(range(1, STEPS + 1))
    assert found.losses() == undisturbed.losses()


@pytest.mark.parametrize("interruption", INTERRUPTIONS)
def test_an_interrupted_job_goes_on(interruption: str, played: dict[str, Future], undisturbed: Run) -> None:
    ended: Played = played[interruption].result()
    log = ended.log()
    assert ended.shown["JobState"] == "COMPLETED", log
    print(log)
