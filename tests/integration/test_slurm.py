"""Trainings on a real Slurm: interrupted in every way, without hosts that a preflight names, arrays, stages, mistakes.

All jobs are played at once, at most three together, since most of their time is waiting; the tests look at what came
of them.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from real_runs import ROOT, TINY, Run, run
from slurm_cluster import Cluster, missing, slurm_cluster

from swinv2_scale import submit

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())
STEPS = 12
BOUND = 300  # seconds that a job may take
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
    """Wait for a step in the record; for 0, not at all."""
    record = directory / "metrics.jsonl"
    deadline = time.monotonic() + BOUND
    while step and (not record.exists() or f'"train", "step": {step},' not in record.read_text()):
        assert time.monotonic() < deadline, f"no step {step} in {directory}"
        time.sleep(0.05)


def reach_time_limit(cluster: Cluster, job: str) -> None:
    """The signal comes after 30 to 60 seconds: Slurm looks at limits twice a minute. The next start has more time."""
    cluster.wait(job, "PENDING", restarts=1, seconds=BOUND)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")


def preempt(cluster: Cluster, job: str) -> None:
    """A job of a partition with a higher priority takes all of one of the hosts, for some seconds."""
    host = cluster.show(job)["NodeList"].replace("[", "").partition("-")[0].partition(",")[0]
    wanted = [f"--nodelist={host}", "--cpus-per-task=4", "--partition=urgent", "--output=/dev/null"]
    cluster.run("sbatch", *wanted, "--wrap=sleep 3")


def kill_task(_: Cluster, job: str) -> None:
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


class Interruption(NamedTuple):
    """What is done to a job, once the record shows step `at`, and what its log then says. Steps last `slow` longer."""

    strike: Callable[[Cluster, str], object]
    said: str
    at: int = 5
    slow: float = 0.5
    settings: tuple[str, ...] = ()


INTERRUPTIONS = {
    "time_limit": Interruption(
        *(reach_time_limit, "starting again: exit code", 0, 6.0),
        ("cluster.time=0-00:02:00", "cluster.signal_seconds=60"),
    ),
    "requeued": Interruption(lambda cluster, job: cluster.run("scontrol", "requeue", job), "DUE TO JOB REQUEUE"),
    # All other jobs are of the partition urgent, which is not preempted.
    "preempted": Interruption(
        preempt, "starting again: exit code 75", settings=("cluster.cpus_per_task=4", "cluster.partition=batch")
    ),
    "killed_step": Interruption(
        lambda cluster, job: cluster.run("scancel", "--signal=KILL", f"{job}.0"), "exit code 137, a task was killed"
    ),
    "killed_task": Interruption(kill_task, "exit code 137, a task was killed"),
}


@pytest.fixture(scope="module")
def played(
    cluster: Cluster, home: Path, shards: Path, request: pytest.FixtureRequest
) -> Iterator[dict[str, Future[Played]]]:
    """What comes of each job that a test of this session asks for, by name."""

    def job(name: str, variables: list[str], *settings: str) -> submit.Job:
        environment = f"cluster.environment={[*VARIABLES, *variables]}"
        places = [f"name={name}", f"run_dir={home / name}"]
        (prepared,) = submit.jobs([*JOB, environment, *TINY, *training(shards), *places, *settings], ROOT / "launch")
        return prepared

    def play(one: submit.Job, interruption: Interruption | None) -> Played:
        (number,), directory = submit.submit([one]), one.run_dirs[0]
        if interruption is not None:
            await_step(directory, interruption.at)
            interruption.strike(cluster, number)
        return Played(directory, number, cluster.wait(number, restarts=1, seconds=BOUND))

    wanted = {item.callspec.params.get("interruption") for item in request.session.items if hasattr(item, "callspec")}
    with ThreadPoolExecutor(max_workers=3) as pool:
        futures = {}
        for name, interruption in INTERRUPTIONS.items():
            if name in wanted:
                own = ["task._target_=injected.Slow", "preflight=false", "telemetry.wandb=offline"]
                settings = ["cluster.partition=urgent", *own, *interruption.settings]
                futures[name] = pool.submit(play, job(name, [f"SLOW={interruption.slow}"], *settings), interruption)
        (home / "faulty_host.sh").write_text(FAULTY_HOST.format(file=home / "faulty_host"))
        futures["excluded"] = pool.submit(play, job("excluded", [], f"cluster.prefix='sh {home}/faulty_host.sh'"), None)
        yield futures


def assert_whole(found: Run, undisturbed: Run) -> None:
    """The record has every step, once or with the same loss again, and the losses of a run that nothing disturbed."""
    assert sorted(found.events("train")) == list(range(1, STEPS + 1))
    assert found.losses() == undisturbed.losses()
    lines = [line for line in found.record() if line["event"] == "train"]
    assert all(line["loss"] == undisturbed.events("train")[line["step"]]["loss"] for line in lines)


@pytest.mark.parametrize(
    "interruption",
    [pytest.param(name, marks=[pytest.mark.long] * (name not in ("requeued", "preempted"))) for name in INTERRUPTIONS],
)
def test_an_interrupted_job_goes_on(interruption: str, played: dict[str, Future], undisturbed: Run) -> None:
    ended: Played = played[interruption].result()
    log, found = ended.log(), Run(ended.directory, 0, "")
    assert ended.shown["JobState"] == "COMPLETED", log
    assert "continuing" in log and INTERRUPTIONS[interruption].said in log, log
    assert_whole(found, undisturbed)
    attempts = [line["attempt"] for line in found.record() if line["event"] == "start"]
    assert attempts == list(range(len(attempts))) and len(attempts) > 1
    # One run for wandb too, which writes a directory at each attempt.
    names = {path.name.rpartition("-")[2] for path in ended.directory.glob("wandb/offline-run-*")}
    assert names == {(ended.directory / "wandb_id").read_text()}


def test_a_job_starts_without_the_host_that_its_preflight_names(
    played: dict[str, Future], undisturbed: Run, home: Path
) -> None:
    ended: Played = played["excluded"].result()
    log, host = ended.log(), (home / "faulty_host").read_text().strip()
    assert ended.shown["JobState"] == "COMPLETED", log
    assert f"suspect hosts: {host}\n" in log and "File too large" in log
    assert f"starting again: without {host}" in log and "2 ranks are sound" in log
    assert (ended.directory / "slurm/excluded.txt").read_text() == f"{host}\n"
    assert ended.shown["ExcNodeList"] == host and ended.shown["Restarts"] == "1"
    # What srun starts is what torchrun starts.
    found = Run(ended.directory, 0, "")
    assert_whole(found, undisturbed)
    ours, theirs = (yaml.safe_load((run.directory / "config.yaml").read_text()) for run in (found, undisturbed))
    assert {key for key in ours if ours[key] != theirs[key]} == {"name", "run_dir"}


@pytest.mark.long
def test_stages_of_an_array_follow_each_other(cluster: Cluster, home: Path, shards: Path) -> None:
    """Two pretrainings, then a fine-tuning of each; where the first stage fails, the second never starts."""

    def submitted(name: str, *pretraining: str) -> list[str]:
        job = [*JOB, "nodes=1", "array=0-1", "preflight=false", f"cluster.environment={VARIABLES}"]
        both = [*TINY, "seed=%a", "epochs=null", "steps=2", "micro_batch=20", "global_batch=20"]
        first = [f"name={name}_%a", f"run_dir={home}/{name}_%a", f"data.train={shards}/photographs/train", *pretraining]
        second = [f"name={name}_tuned_%a", f"run_dir={home}/{name}_tuned_%a", f"checkpoint={home}/{name}_%a"]
        second += [f"data.{part}={shards}/digits/{part}" for part in ("train", "validation")]
        stages = [*job, "pretrain", *both, *first, "--then", "finetune", *both, *second, "model.num_classes=10"]
        command = [sys.executable, "launch/submit.py", *stages]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return [line.split()[0] for line in done.stdout.splitlines()]

    failing = submitted("failing", f"data.train={home}/nowhere")
    chain = submitted("chain")
    for number in ("0", "1"):
        assert cluster.wait(f"{chain[1]}_{number}", seconds=BOUND)["JobState"] == "COMPLETED"
        assert cluster.wait(f"{failing[0]}_{number}")["JobState"] == "FAILED"
        first, second = (Run(home / f"{name}_{number}", 0, "").record() for name in ("chain", "chain_tuned"))
        assert first[-1]["reason"] == second[-1]["reason"] == "finished"
        assert first[-1]["time"] < second[0]["time"]
        assert yaml.safe_load((home / f"chain_tuned_{number}/config.yaml").read_text())["seed"] == int(number)
    assert "nowhere" in (home / f"failing_0/slurm/{failing[0]}_0.log").read_text()
    assert cluster.wait(failing[1])["JobState"] == "CANCELLED"
    assert not list(home.glob("failing_tuned_*/slurm/*.log"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["cluster.partition=gpu"], r"cluster.partition=gpu does not exist: choose one of batch \(4 nodes\), urgent"),
        (["nodes=10", "micro_batch=2"], "nodes=10 are more than the 4 of the default partition: batch"),
        (["cluster.time=???"], "needs a value for cluster.time: add cluster.time=…"),
        (["run_dir=/proc/nowhere"], "run_dir=/proc/nowhere cannot be written"),
        (["cluster.constraint=a100"], "sbatch refuses: .* Invalid feature specification"),
        ([], "no sbatch on this machine"),
    ],
)
def test_a_mistake_is_told_and_nothing_submitted(
    settings: list[str], message: str, cluster: Cluster, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = [f"run_dir={tmp_path}/run", "name=mistaken"]
    if not settings:
        monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=message):
        submit.submit(submit.jobs([*JOB, *TINY, *training(shards), *run_dir, *settings], ROOT / "launch"))
    assert cluster.run("squeue", "--noheader", "--name=mistaken") == ""
