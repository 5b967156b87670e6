"""Launchers of several hosts, started for each of two "hosts" of half the cores: the losses are those of one host."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from real_runs import ROOT, TINY, Run, descendants, free_port

BIN = Path(sys.executable).parent


def torchrun(host: int, port: int, _: Path) -> list[str]:
    place = ["--nnodes=2", f"--node-rank={host}", "--master-addr=127.0.0.1", f"--master-port={port}"]
    return [sys.executable, "-m", "torch.distributed.run", *place, "--nproc-per-node=1"]


def rendezvous(host: int, port: int, _: Path) -> list[str]:
    place = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", f"--rdzv-id={port}"]
    return [sys.executable, "-m", "torch.distributed.run", *place, "--nproc-per-node=1"]


def deepspeed(host: int, port: int, directory: Path) -> list[str]:
    hosts = directory / "hosts"
    hosts.write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    place = [f"--hostfile={hosts}", "--no_ssh", f"--node_rank={host}", "--master_addr=127.0.0.1"]
    return [str(BIN / "deepspeed"), *place, f"--master_port={port}"]


@pytest.mark.long
@pytest.mark.parametrize("launcher", [torchrun, rendezvous, deepspeed])
def test_two_hosts_train_as_one(
    launcher: Callable[[int, int, Path], list[str]], launch: Callable[..., Run], shards: Path, tmp_path: Path
) -> None:
    settings = [f"data.train={shards}/photographs/train", "steps=4", "epochs=null", "global_batch=20"]
    settings += ["micro_batch=10", "precision=fp32"]
    directory, port, cores = tmp_path / "two_hosts", free_port(), sorted(os.sched_getaffinity(0))
    half = max(1, len(cores) // 2)
    variables = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
    variables |= {"GLOO_SOCKET_IFNAME": "lo", "TORCHDYNAMO_DISABLE": "1"}
    hosts = []
    try:
        for host in (0, 1):
            own = ",".join(map(str, cores[host * half :][:half] or cores))
            command = [*launcher(host, port, tmp_path), "launch/pretrain.py", *TINY, "name=x", f"run_dir={directory}"]
            hosts.append(
                subprocess.Popen(
                    ["taskset", "--cpu-list", own, *command, *settings],
                    cwd=ROOT,
                    env=variables,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        one = launch("one_host", *settings, ranks=2)
        outputs = [host.communicate(timeout=200)[0] for host in hosts]
    finally:
        for process in [process for host in hosts for process in descendants(host.pid)]:
            os.kill(process, signal.SIGKILL)
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(outputs)
    found = Run(directory, 0, "")
    assert found.losses() == one.losses() and len(one.losses()) == 4
    ours, theirs = (yaml.safe_load((run.directory / "config.yaml").read_text()) for run in (found, one))
    assert {key for key in ours if ours[key] != theirs[key]} == {"name", "run_dir"}
