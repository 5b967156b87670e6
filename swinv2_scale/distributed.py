"""Ranks, device and collectives. The only module that imports torch.distributed.

`deepspeed`, `torchrun`, `srun python` and plain `python` all end here: the rank comes from RANK, else from
SLURM_PROCID, else there is one process; the address of the first rank from MASTER_ADDR, else the first host.
"""

import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

# Rank, world and local rank, as the launchers spell them, in order of preference. Slurm's number of tasks is
# that of the step: without srun, in a batch script or in the shell of an allocation, there is one process.
ENVIRONMENTS = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))


def rank() -> int:
    """Number of this process in the run, from 0."""
    return _from_environment(0, default=0)


def world_size() -> int:
    """Number of processes of the run."""
    return _from_environment(1, default=1)


def local_rank() -> int:
    """Number of this process on its host, which is the number of its accelerator."""
    return _from_environment(2, default=0)


def ranks_here() -> int:
    """Processes of the run on this host, as torchrun or DeepSpeed says; all of them where nobody does."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size())


def host() -> str:
    """The name of this machine, as Slurm knows it if it runs under Slurm."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def device() -> torch.device:
    """This process's accelerator, or the CPU where there is none, or where DS_ACCELERATOR=cpu."""
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        # Slurm can show each task a single device, whatever its local rank.
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    return torch.device("cpu")


@contextmanager
def process_group(timeout_minutes: float) -> Iterator[None]:
    """Join the other ranks for the length of a with-block.

    timeout_minutes bounds how long a collective waits for a rank that died. Raises ValueError when several ranks are
    announced without the address of the first.
    """
    if world_size() == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    elif "SLURM_STEP_NODELIST" in os.environ and "SLURM_JOB_ID" in os.environ:
        os.environ.setdefault("MASTER_ADDR", first_host(os.environ["SLURM_STEP_NODELIST"]))
        os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ["SLURM_JOB_ID"]) % 10000))
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        raise ValueError("several ranks, but MASTER_ADDR and MASTER_PORT are not set: start with deepspeed or torchrun")
    # DeepSpeed reads these three itself and would look for MPI without them.
    os.environ.update(RANK=str(rank()), WORLD_SIZE=str(world_size()), LOCAL_RANK=str(local_rank()))
    if device().type == "cuda":
        torch.cuda.set_device(device())
        os.environ["LOCAL_RANK"] = str(device().index)
    else:  # ranks of one host share its cores
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here()))
    backend = "nccl" if device().type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=rank(), world_size=world_size(), timeout=timedelta(minutes=timeout_minutes))
    yield
    dist.barrier()
    dist.destroy_process_group()


def first_host(hosts: str) -> str:
    """The first name of a list as Slurm writes it: "gpu[003-007,9]-ib,login" -> "gpu003-ib"."""
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", hosts).partition(",")[0]


def end_process(code: int) -> NoReturn:
    """Leave without the interpreter's tear-down, where gloo's threads abort about one complete run in ten."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def to_device(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch whose tensors lie on this rank's device; the copy does not wait."""
    target = device()
    return {k: v.to(target, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def world() -> Any:
    """The group of all ranks."""
    return dist.group.WORLD


def barrier() -> None:
    """Wait for all ranks."""
    dist.barrier()


def sum_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """Sums over all ranks, in float64. All ranks must pass the same keys."""
    return _reduced(values, dist.ReduceOp.SUM)


def sum_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor on this rank's device over all ranks, in its place."""
    dist.all_reduce(tensor)
    return tensor


def mean_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor on this rank's device over all ranks, in its place. No collective where there is one, and
    none on the meta device."""
    return tensor if world_size() == 1 or tensor.is_meta else sum_tensor(tensor).div_(world_size())


def max_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """Maxima over all ranks, in float64. All ranks must pass the same keys."""
    return _reduced(values, dist.ReduceOp.MAX)


def from_rank_0(value: Any) -> Any:
    """Rank 0's value (any picklable object), on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gathered(value: Any) -> list[Any]:
    """Every rank's value (any picklable object), in rank order, on every rank."""
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def _reduced(values: dict[str, float], operation: Any) -> dict[str, float]:
    on_device = torch.tensor([float(value) for value in values.values()], dtype=torch.float64, device=device())
    dist.all_reduce(on_device, operation)
    return dict(zip(values, on_device.tolist(), strict=True))


def _from_environment(position: int, default: int) -> int:
    for names in ENVIRONMENTS:
        if all(name in os.environ for name in names):
            return int(os.environ[names[position]])
    return default


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
