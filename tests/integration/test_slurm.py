"""Trainings on a real Slurm: two nodes, requeued, preempted, at the time limit; and hosts that are left out."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from real_runs import ROOT, TINY, Run
from slurm_cluster import Cluster, missing, slurm_cluster

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())
STEPS = 24


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


@pytest.fixture
def submit(cluster: Cluster, tmp_path: Path, shards: Path) -> Callable[..., tuple[str, Path]]:
    """submit(name, *settings) hands a training of two nodes to the cluster: its job number and run directory."""

    def start(name: str, *settings: str) -> tuple[str, Path]:
        job = ["nodes=2", "cluster.accelerators=1", "cluster.gpus_per_node=null", "cluster.time=0-00:10:00"]
        variables = {"GLOO_SOCKET_IFNAME": "lo", "TORCHDYNAMO_DISABLE": "1", "DS_ACCELERATOR": "cpu"}
        variables["MASTER_ADDR"] = "127.0.0.1"  # no name server knows virtual nodes
        job += [f"cluster.environment={[f'{key}={value}' for key, value in variables.items()]}"]
        run = [*TINY, f"name={name}", f"run_dir={tmp_path / name}", f"data.train={shards}/photographs/train"]
        run += [f"steps={STEPS}", "epochs=null", "global_batch=20", "micro_batch=10", "precision=fp32"]
        command = [sys.executable, "launch/submit.py", *job, "pretrain", *run, "checkpoint_every=4", *settings]
        path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
        environment = cluster.environment | {"PYTHONPATH": path}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[0], tmp_path / name

    return start


def whole(directory: Path, launch: Callable[..., Run], shards: Path) -> None:
    """The record has every step, once or with the same loss again, and the losses of a run that nothing disturbed."""
    data = [f"data.train={shards}/photographs/train", f"steps={STEPS}", "epochs=null", "global_batch=20"]
    undisturbed = launch("undisturbed", *data, "micro_batch=10", "precision=fp32", ranks=2)
    found = Run(directory, 0, "")
    assert sorted(found.events("train")) == list(range(1, STEPS + 1))
    assert found.losses() == undisturbed.losses()


def await_step(directory: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while (
        not (directory / "metrics.jsonl").exists()
        or f'"train", "step": {step},' not in (directory / "metrics.jsonl").read_text()
    ):
        assert time.monotonic() < deadline, f"no step {step}"
        time.sleep(0.05)


def test_a_requeued_job_goes_on(cluster: Cluster, submit: Callable, launch: Callable[..., Run], shards: Path) -> None:
    job, directory = submit("requeued", "preflight=true")
    await_step(directory, 6)
    cluster.run("scontrol", "requeue", job)
    shown = cluster.wait(job, restarts=1, seconds=200)
    log = (directory / "slurm" / f"{job}.log").read_text()
    assert shown["JobState"] == "COMPLETED", log
    assert "2 ranks are sound" in log and "continuing" in log
    whole(directory, launch, shards)
