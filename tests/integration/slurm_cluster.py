"""A real Slurm on this machine: controller, four virtual nodes, two partitions, in a temporary directory.

    with slurm_cluster(directory) as cluster:
        job = cluster.submit(script)
        cluster.wait(job)

It needs root and the programs of Debian's slurm-wlm and munge, whose slurmd can run several times on one host. Nothing
outside the directory is written; all daemons end with the block, by their process numbers.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from real_runs import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo")
NODES = ("n1", "n2", "n3", "n4")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")

CONFIGURATION = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A job that is requeued waits until its credential has expired.
AuthInfo=socket={root}/munge.sock,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/%n.log
# With cgroup plugins nodes look idle here and every step fails.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
ReturnToService=2
KillWait=5
SlurmdTimeout=10
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=batch Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """Why no Slurm can be started here; empty if one can."""
    if os.geteuid() != 0:
        return "Slurm's daemons are started as root"
    absent = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    return f"{', '.join(absent)} not found: apt-get install --no-install-recommends slurm-wlm munge" if absent else ""


@dataclass
class Cluster:
    """A running Slurm; `environment` is what makes its commands find it."""

    root: Path
    environment: dict[str, str]

    def run(self, *command: str | Path) -> str:
        """Standard output of a Slurm command. Raises CalledProcessError if it fails."""
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode == 0, f"{command}: {result.stderr}"
        return result.stdout.strip()

    def show(self, job: str) -> dict[str, str]:
        """What the controller knows of a job."""
        return dict(word.partition("=")[::2] for word in self.run("scontrol", "show", "job", job).split())

    def wait(self, job: str, *states: str, seconds: float = 120, restarts: int = 0) -> dict[str, str]:
        """The job, as soon as it is in one of the states (default: it has ended) after so many restarts."""
        deadline = time.monotonic() + seconds
        while True:
            shown = self.show(job)
            if shown["JobState"] in (states or ENDED) and int(shown["Restarts"]) >= restarts:
                return shown
            ended = shown["JobState"] in ENDED or time.monotonic() > deadline
            assert not ended, f"{shown}\n{self.log()}"
            time.sleep(0.2)

    def log(self) -> str:
        """The end of the controller's log."""
        return (self.root / "slurmctld.log").read_text()[-3000:]

    def node_daemon(self, node: str) -> None:
        """Start a node's daemon; it goes to the background by itself."""
        subprocess.run(["slurmd", "-N", node], env=self.environment, check=True, timeout=30)

    def process(self, name: str) -> int:
        """Process number of a daemon: munged, slurmctld or a node's name."""
        return int((self.root / f"{name}.pid").read_text())


@contextlib.contextmanager
def slurm_cluster(root: Path) -> Iterator[Cluster]:
    """A Slurm of four idle nodes with four CPUs each, for the length of a with-block."""
    host = socket.gethostname().partition(".")[0]
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=4 RealMemory=1000"
        for name in NODES
    )
    configuration = root / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(host=host, port=free_port(), root=root, nodes=nodes))
    environment = os.environ | {"SLURM_CONF": str(configuration), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    cluster = Cluster(root, environment)
    for name in ("state", *(f"spool/{node}" for node in NODES)):
        (root / name).mkdir(parents=True)
    key = root / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    files = {"key-file": key, "socket": root / "munge.sock", "pid-file": root / "munged.pid"}
    files |= {"log-file": root / "munged.log", "seed-file": root / "munge.seed"}
    try:
        munged = ["munged", "--force", *(f"--{option}={path}" for option, path in files.items())]
        subprocess.run(munged, env=environment, check=True, timeout=30, capture_output=True)
        subprocess.run(["slurmctld"], env=environment, check=True, timeout=30)
        for node in NODES:
            cluster.node_daemon(node)
        _await_idle(cluster)
        yield cluster
    finally:
        subprocess.run(["scancel", "--user=root"], env=environment, check=False, timeout=30, capture_output=True)
        _await_no_job(environment)
        _stop([cluster.process(name) for name in (*NODES, "slurmctld", "munged") if (root / f"{name}.pid").exists()])


def _await_no_job(environment: dict[str, str]) -> None:
    """Nothing of a job may outlive its cluster: it would keep the port of the first rank."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        command = ["squeue", "-h"]
        answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=30)
        if not answer.stdout.strip():
            return
        time.sleep(0.2)


def _await_idle(cluster: Cluster) -> None:
    deadline = time.monotonic() + 30
    while True:
        answer = subprocess.run(
            ["sinfo", "-h", "-p", "batch", "-t", "idle", "-o", "%D"],
            env=cluster.environment, capture_output=True, text=True, check=False, timeout=30,
        )  # fmt: skip
        if answer.stdout.strip() == str(len(NODES)):
            return
        assert time.monotonic() < deadline, answer.stderr + cluster.log()
        time.sleep(0.1)


def _stop(processes: list[int]) -> None:
    """SIGTERM, and SIGKILL for who is still there after five seconds."""
    for number, seconds in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        alive = [process for process in processes if _lives(process)]
        for process in alive:
            os.kill(process, number)
        deadline = time.monotonic() + seconds
        while any(map(_lives, alive)) and time.monotonic() < deadline:
            time.sleep(0.05)


def _lives(process: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
