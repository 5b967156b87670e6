"""Submit trainings to Slurm: settings -> checked configurations -> batch scripts -> job numbers.

A stage of the command line is one job. Its script starts `srun python launch/….py`, one task per accelerator; the
ranks find each other through Slurm's variables (swinv2_scale/distributed.py). What the command line asks for is checked
here, on the login node, as far as it can be known there.

RUN_DIR/slurm/STAGE.sbatch    the script, as submitted
RUN_DIR/slurm/JOB.log         what it printed, of all starts
RUN_DIR/slurm/JOB.killed      the newest checkpoint each time that tasks of the job were killed
RUN_DIR/slurm/excluded.txt    hosts that the preflight named, one a line; later jobs of this run leave them out too
"""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swinv2_scale import config
from swinv2_scale.limits import INDEX
from swinv2_scale.parallel import batch_arithmetic

SCRIPTS = ("pretrain", "finetune", "evaluate")
OWN = re.compile(r"(cluster|nodes|array|preflight|restarts|kills)(\.[\w.]+)?=")  # the settings of conf/submit.yaml


@dataclass
class Job:
    """A script to be submitted; `run_dirs` are those of all jobs of its array, or the only one."""

    name: str
    script: str
    path: Path
    run_dirs: list[Path]
    partition: str | None
    nodes: int

    def log(self, number: str) -> str:
        """Where the job with this number writes."""
        return str(self.path.parent / f"{number}.log")


def help_text() -> str:
    """What can be set about a job."""
    return "\n".join((config.CONF / name).read_text() for name in ("submit.yaml", "cluster/slurm.yaml"))


def jobs(argv: Sequence[str], launch: Path) -> list[Job]:
    """A job for each stage of the command line, which `--then` separates; `launch` is the directory of the scripts.

    Raises ValueError for what is wrong in any of them.
    """
    stages: list[list[str]] = [[]]
    for argument in argv:
        if argument == "--then":
            stages.append([])
        else:
            stages[-1].append(argument)
    own = [argument for argument in stages[0] if OWN.match(argument)]
    return [job(own * (number > 0) + stage, launch) for number, stage in enumerate(stages)]


def job(stage: Sequence[str], launch: Path) -> Job:
    """The job of one stage: a script's name (default: pretrain), settings of the job and of the training, in any order.

    Raises ValueError for settings that do not exist or do not go together.
    """
    words = [argument for argument in stage if "=" not in argument]
    script = words[0] if words else "pretrain"
    if script not in SCRIPTS or len(words) > 1:
        raise ValueError(f"{' '.join(words)!r} is no stage: give one of {', '.join(SCRIPTS)}, then key=value settings")
    job_cfg = config.compose("submit", [argument for argument in stage if OWN.match(argument)])
    settings = [argument for argument in stage if "=" in argument and not OWN.match(argument)]
    cfg, cluster = config.compose(script, settings), job_cfg.cluster
    cfgs = [config.compose(script, [s.replace(INDEX, index) for s in settings]) for index in _indices(job_cfg.array)]
    run_dirs = [Path(one.run_dir).absolute() for one in cfgs or [cfg]]
    if len(set(run_dirs)) < len(run_dirs):
        raise ValueError(f"array={job_cfg.array}: the jobs would share {run_dirs[0]}: put {INDEX} into name=…")
    if not isinstance(cluster.time, str):  # YAML reads 12:00:00 as 43200, which to Slurm are minutes
        raise ValueError(f"cluster.time={cluster.time} is a number: write it as 0-12:00:00, or in quotes in a file")
    if cfg.global_batch:
        batch_arithmetic(cfg.global_batch, cfg.micro_batch, job_cfg.nodes * cluster.accelerators)
    command = [str(launch / f"{script}.py"), *settings]
    text = render(job_cfg, cfg, command, excluded(run_dirs[0]))
    return Job(cfg.name, text, run_dirs[0] / "slurm" / f"{script}.sbatch", run_dirs, cluster.partition, job_cfg.nodes)


def excluded(run_dir: Path) -> list[str]:
    """Hosts that the preflight of earlier starts named."""
    path = run_dir / "slurm/excluded.txt"
    return path.read_text().split() if path.exists() else []


def render(job_cfg: Any, cfg: Any, command: Sequence[str], exclude: Sequence[str]) -> str:
    """The batch script that runs `command`, a script with its arguments, under the settings of conf/submit.yaml."""
    cluster, array = job_cfg.cluster, job_cfg.array is not None
    run_dir = str(Path(cfg.run_dir).absolute())
    srun = [
        f"--wait={cluster.wait_seconds}",
        "--kill-on-bad-exit=0",  # the first rank that has saved ends before the one that writes the records
        *([f"--cpus-per-task={cluster.cpus_per_task}"] if cluster.cpus_per_task else []),
        *cluster.srun,
    ]
    variables = [variable.partition("=") for variable in cluster.environment]
    python = f"{cluster.prefix + ' ' if cluster.prefix else ''}{shlex.quote(cluster.python or sys.executable)}"
    return "\n".join(
        [
            "#!/bin/bash",
            *_head(job_cfg, cfg.name, run_dir, exclude),
            "",
            *([f"module load {shlex.join(cluster.modules)}"] if cluster.modules else []),
            *(f"export {name}={shlex.quote(value)}" for name, _, value in variables),
            *cluster.setup,
            "",
            f"run_dir={_word(run_dir, array)}",
            "tasks() {",
            f'    srun {shlex.join(srun)} {python} "$@"',
            "}",
            AGAIN.format(
                restarts=job_cfg.restarts,
                kills=job_cfg.kills,
                requeue="|".join(map(str, cluster.requeue_codes)) or "none",
                killed="|".join(map(str, cluster.killed_codes)) or "none",
            ),
            *([PREFLIGHT] if job_cfg.preflight else []),
            " ".join(["tasks", *(_word(part, array) for part in command)]),
            "finish $?\n",
        ]
    )


# What follows a start that did not end with 0. Some ranks can be killed because others crashed, so a killed task alone
# does not tell whether another start is worth it: checkpoints do.
AGAIN = """
again() {{  # the same job once more, in the same run directory
    if [ "${{SLURM_RESTART_COUNT:-0}}" -ge {restarts} ]; then
        echo "started {restarts} times again, which is all that restarts={restarts} allows: $1"
        return 1
    fi
    echo "starting again: $1"
}}
worthwhile() {{  # not when tasks of this job were killed too often at the same newest checkpoint
    local newest deaths="$run_dir/slurm/$SLURM_JOB_ID.killed"
    newest=$(ls -d "$run_dir"/checkpoints/step_* 2>/dev/null | tail -n 1)
    echo "${{newest:-none}}" >>"$deaths"
    if [ "$(grep -cxF "${{newest:-none}}" "$deaths")" -ge {kills} ]; then
        echo "tasks were killed {kills} times without a checkpoint in between, which is all that kills={kills} allows"
        return 1
    fi
}}
finish() {{
    case $1 in
        {requeue}) again "exit code $1" && scontrol requeue "$SLURM_JOB_ID" ;;
        {killed}) worthwhile && again "exit code $1, a task was killed" && scontrol requeue "$SLURM_JOB_ID" ;;
    esac
    exit "$1"
}}
"""
# The job is held while its hosts are changed: it keeps its number, on which later stages depend. Requeueing sends
# SIGTERM to this script, and kills it some seconds later.
PREFLIGHT = """\
rm -f "$run_dir/slurm/suspects.txt"
tasks -m swinv2_scale.cli doctor --distributed --run-dir "$run_dir" --suspects "$run_dir/slurm/suspects.txt"
code=$?
if [ -s "$run_dir/slurm/suspects.txt" ]; then
    cat "$run_dir/slurm/suspects.txt" >>"$run_dir/slurm/excluded.txt"
    hosts=$(sort -u "$run_dir/slurm/excluded.txt" | paste -sd, -)
    again "without $hosts, see above" || exit $code
    trap '' TERM
    scontrol requeuehold "$SLURM_JOB_ID" &&
        scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$hosts" &&
        scontrol release "$SLURM_JOB_ID" ||
        { echo "no start without $hosts"; scancel "$SLURM_JOB_ID"; }
    exit $code
fi
[ $code = 0 ] || finish $code
"""


def submit(jobs: Sequence[Job]) -> list[str]:
    """Hand the scripts to Slurm, each to start when the one before has finished; their job numbers.

    Raises ValueError where there is no Slurm, where it does not have what is asked for, and where nothing can be
    written; then no job remains.
    """
    if shutil.which("sbatch") is None:
        raise ValueError("no sbatch on this machine: submit from a login node of a Slurm cluster, or use --dry-run")
    partitions = _partitions()
    for one in jobs:
        _check(one, partitions)
    for one in jobs:
        _write(one)
    numbers: list[str] = []
    for one in jobs:
        after = [f"--dependency=afterok:{numbers[-1]}", "--kill-on-invalid-dep=yes"] if numbers else []
        try:
            numbers.append(_slurm("sbatch", "--parsable", *after, str(one.path)).partition(";")[0])
        except ValueError:
            if numbers:
                _slurm("scancel", *numbers)
            raise
    return numbers


def _head(job_cfg: Any, name: str, run_dir: str, exclude: Sequence[str]) -> list[str]:
    """The #SBATCH lines."""
    cluster = job_cfg.cluster
    hosts = ",".join(sorted({*cluster.exclude, *exclude}))
    options = {
        "job-name": name,
        "nodes": job_cfg.nodes,
        "ntasks-per-node": cluster.accelerators,
        "gpus-per-node": cluster.gpus_per_node,
        "cpus-per-task": cluster.cpus_per_task,
        "time": cluster.time,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "exclude": hosts or None,
        "array": job_cfg.array,
        "chdir": Path.cwd(),
        "output": f"{run_dir}/slurm/{'%A_%a' if job_cfg.array is not None else '%j'}.log",
        "open-mode": "append",
        "signal": f"USR2@{cluster.signal_seconds}",
    }
    given = [f"--{key}={shlex.quote(str(value))}" for key, value in options.items() if value is not None]
    return [f"#SBATCH {option}" for option in [*given, "--requeue", *cluster.options]]


def _word(text: str, array: bool) -> str:
    """A word of the script, with the array's number where INDEX stands."""
    parts = text.split(INDEX) if array else [text]
    return '"$SLURM_ARRAY_TASK_ID"'.join(shlex.quote(part) if part or len(parts) == 1 else "" for part in parts)


def _indices(array: Any) -> list[str]:
    """The numbers of an array in Slurm's notation, without its limit: 0-6:2,9%2 -> 0 2 4 6 9; none for None."""
    if array is None:
        return []
    notation = str(array)
    if not re.fullmatch(r"\d+(-\d+(:[1-9]\d*)?)?(,\d+(-\d+(:[1-9]\d*)?)?)*(%[1-9]\d*)?", notation):
        raise ValueError(f"array={notation}: write it as Slurm does, such as 0-4 or 1,3,8 or 0-99%10")
    numbers: list[str] = []
    for part in notation.partition("%")[0].split(","):
        first, last, step = (int(n) if n else 0 for n in re.fullmatch(r"(\d+)-?(\d*):?(\d*)", part).groups())  # type: ignore[union-attr]
        numbers += map(str, range(first, max(first, last) + 1, step or 1))
    return numbers


def _partitions() -> dict[str, int]:
    """Nodes of each partition; the default one is also under the empty name."""
    nodes: dict[str, int] = {}
    for line in _slurm("sinfo", "--noheader", "--summarize", "--format=%P %D").splitlines():
        name, count = line.split()
        for key in (name.rstrip("*"), *([""] if name.endswith("*") else [])):
            nodes[key] = nodes.get(key, 0) + int(count)
    return nodes


def _check(job: Job, partitions: dict[str, int]) -> None:
    """Raise ValueError for a partition that does not exist or has too few nodes."""
    name = job.partition or ""
    known = ", ".join(f"{partition} ({nodes} nodes)" for partition, nodes in partitions.items() if partition)
    if name not in partitions:
        problem = f"cluster.partition={name} does not exist" if name else "cluster.partition is needed"
        raise ValueError(f"{problem}: choose one of {known}")
    if job.nodes > partitions[name]:
        which = f"the partition {name}" if name else "the default partition"
        raise ValueError(f"nodes={job.nodes} are more than the {partitions[name]} of {which}: {known}")


def _write(job: Job) -> None:
    """The script, and the directories of the logs, which Slurm does not make."""
    try:
        for run_dir in job.run_dirs:
            (run_dir / "slurm").mkdir(parents=True, exist_ok=True)
        job.path.write_text(job.script)
    except OSError as error:
        raise ValueError(f"run_dir={job.run_dirs[0]} cannot be written: {error}") from error


def _slurm(*command: str) -> str:
    """What one of Slurm's commands prints. Raises ValueError with its words if it fails."""
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise ValueError(f"{command[0]} refuses: {' '.join(answer.stderr.split())}")
    return answer.stdout.strip()
