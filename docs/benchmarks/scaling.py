"""How training scales: measured on two CPU ranks, computed for GPUs. docs/scaling.md shows and explains both.

python docs/benchmarks/scaling.py measure    images/s per rank at 1 and 2 ranks, one thread each; what is communicated
python docs/benchmarks/scaling.py model      the tables of docs/scaling.md, of `step_seconds`; nothing of it is measured
"""

import argparse
import math
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import yaml
from torch import multiprocessing

import swinv2_scale
from swinv2_scale import config, distributed
from swinv2_scale.engine import build_engine, optimizer
from swinv2_scale.models.accounting import forward_flops
from swinv2_scale.optim import parameter_groups
from swinv2_scale.parallel import deepspeed_config

# ------------------------------------------------------------------------------------------------------------- computed


@dataclass(frozen=True)
class Machine:
    """A GPU among the eight of its node, and its links: vendors' figures. Bytes and operations per second."""

    name: str
    bf16_peak: float  # dense
    memory: float
    inside: float  # to the other GPUs of the node, one direction
    between: float  # to other nodes, of this GPU's own adapter, one direction
    node: int = 8


PARALLEL = yaml.safe_load((config.CONF / "parallel/_common.yaml").read_text())
A100 = Machine("A100-80", bf16_peak=312e12, memory=2.0e12, inside=300e9, between=25e9)
H100 = Machine("H100-80", bf16_peak=989e12, memory=3.35e12, inside=450e9, between=50e9)
# Assumed shares of those figures that are reached.
COMPUTE = {A100.name: 0.25, H100.name: 0.20}  # of bf16_peak, by the model's own operations
LINK, MEMORY = 0.8, 0.7
LATENCY = 20e-6  # seconds of a collective besides its bytes, for each doubling of the ranks


@dataclass(frozen=True)
class Job:
    """What one GPU does in a step."""

    name: str
    parameters: int
    flops_per_image: float  # of forward
    images: int  # of a GPU in a step: one micro-batch
    recompute: bool  # forward again in backward
    groups: int  # of parameters: each gathers its weights by itself


def collective_seconds(bytes_: float, gpus: int, machine: Machine, *, passes: int) -> float:
    """A collective in rings, hierarchical: within nodes, then each GPU with those of its place in other nodes.

    bytes_: of the whole tensor. passes: 1 for a reduce-scatter or an all-gather, 2 for an all-reduce.
    """
    inside = min(gpus, machine.node)
    nodes = gpus // inside
    seconds = passes * bytes_ * (inside - 1) / inside / (machine.inside * LINK)
    seconds += passes * bytes_ / inside * (nodes - 1) / nodes / (machine.between * LINK)
    return seconds + LATENCY * math.log2(gpus)


def step_seconds(
    job: Job, gpus: int, machine: Machine, *, overlap: bool, reached: float | None = None, bucket: int = 50_000_000
) -> dict[str, float]:
    """Seconds of a step under ZeRO 1 by part; "communication" is what the others do not hide.

    Gradients are reduced to their owners in float32, and bfloat16 weights all-gathered after the optimiser's step. With
    `overlap`, buckets are reduced while backward goes on, except the last one. Parameters that stay float32 (1 %) are
    counted as the others. reached: the share of bf16_peak; bucket: elements, parallel.reduce_bucket_size.
    """
    forward = job.images * job.flops_per_image / (machine.bf16_peak * (reached or COMPUTE[machine.name]))
    backward = (3 if job.recompute else 2) * forward
    # float32 gradients: added to (read, written) from bfloat16; AdamW on this rank's part: gradient, weights and two
    # moments read, the three written in float32 and the weights in bfloat16.
    optimiser = job.parameters * (10 + 30 / gpus) / (machine.memory * MEMORY)
    buckets = -(-job.parameters // bucket)
    reduce = buckets * collective_seconds(4 * job.parameters / buckets, gpus, machine, passes=1)
    gather = job.groups * collective_seconds(2 * job.parameters / job.groups, gpus, machine, passes=1)
    early = 1 - 1 / buckets  # the share of buckets that are full before backward ends
    hidden = min(reduce * early, backward * early) if overlap else 0.0
    communication = reduce - hidden + gather
    return {
        "compute": forward + backward,
        "optimiser": optimiser,
        "communication": communication,
        "step": forward + backward + optimiser + communication,
    }


@cache
def jobs() -> list[Job]:
    """SwinV2-B, L and G on 192-pixel images at window 12, classifiers of ImageNet-22K."""
    found = []
    for size, images, recompute in (("b", 128, False), ("l", 64, False), ("g", 16, True)):
        with torch.device("meta"):
            model = swinv2_scale.create_model(size, image_size=192, window_size=12, num_classes=21841)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        groups = parameter_groups(model, depths(model), weight_decay=0.1, layer_decay=None)
        types = 2 * len(groups)  # bfloat16 and float32
        found.append(
            Job(size.upper(), parameters, sum(forward_flops(model, 192, 192).values()), images, recompute, types)
        )
    return found


def by_gpus() -> str:
    """Step, communication, images/s and their share of what as many single GPUs would do, as a table."""
    lines = [
        "| GPU | size | images a GPU | GPUs | step, ms | communication | images/s | of linear | overlapped | images/s |"
    ]
    lines.append("|---" * 10 + "|")
    for machine in (A100, H100):
        for job in jobs():
            alone = job.images / step_seconds(job, 1, machine, overlap=False)["step"]
            for gpus in (8, 32, 128, 512, 1024):
                plain, hidden = (step_seconds(job, gpus, machine, overlap=overlap) for overlap in (False, True))
                rate, faster = (gpus * job.images / found["step"] for found in (plain, hidden))
                cells = [machine.name, job.name, job.images, gpus, f"{1000 * plain['step']:.0f}", _share(plain)]
                cells += [f"{rate:,.0f}", f"{rate / gpus / alone:.0%}", _share(hidden), f"{faster:,.0f}"]
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def by_reached() -> str:
    """Communication of 128 GPUs, for other shares of the peak that the model reaches, as a table."""
    shares = (0.1, 0.2, 0.3, 0.4)
    lines = ["| GPU | size | " + " | ".join(f"{share:.0%} of peak" for share in shares) + " |", "|---" * 6 + "|"]
    for machine in (A100, H100):
        for job in jobs():
            found = [step_seconds(job, 128, machine, overlap=False, reached=share) for share in shares]
            lines.append(f"| {machine.name} | {job.name} | {' | '.join(map(_share, found))} |")
    return "\n".join(lines)


def by_images() -> str:
    """Communication of 128 GPUs, when a fixed global batch leaves each of them fewer images, as a table."""
    parts = (1, 2, 4, 8)
    heads = ["the images above" if part == 1 else f"1/{part} of them" for part in parts]
    lines = [f"| GPU | size | {' | '.join(heads)} |", "|---" * 6 + "|"]
    for machine in (A100, H100):
        for job in jobs():
            fewer = [replace(job, images=job.images // part) for part in parts]
            found = [step_seconds(one, 128, machine, overlap=False) for one in fewer]
            lines.append(f"| {machine.name} | {job.name} | {' | '.join(map(_share, found))} |")
    return "\n".join(lines)


def _share(found: dict[str, float]) -> str:
    return f"{found['communication'] / found['step']:.0%}"


# ------------------------------------------------------------------------------------------------------------- measured

SIZE, SIDE, MICRO_BATCH, CLASSES = "t", 128, 8, 1000
WARM, STEPS, ROUNDS = 2, 6, 5


def depths(model: Any) -> list[int]:
    """Blocks per stage."""
    return [len(layer.blocks) for layer in model.layers]


class Counted:
    """A function of torch.distributed, with its bytes and its seconds."""

    def __init__(self, name: str) -> None:
        self._function, self.seconds, self.bytes = getattr(torch.distributed, name), 0.0, 0
        setattr(torch.distributed, name, self)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        tensor = arguments[0] if arguments else named.get("tensor", named.get("output_tensor"))
        begin = time.perf_counter()
        result = self._function(*arguments, **named)
        self.seconds += time.perf_counter() - begin
        self.bytes += tensor.numel() * tensor.element_size()
        return result


def measure() -> dict[str, float]:
    """Of steps of the engine as conf/ sets it (ZeRO 1, bfloat16): seconds, those in collectives, bytes a parameter."""
    calls = {name: Counted(name) for name in ("reduce", "all_reduce", "all_gather_into_tensor")}
    torch.manual_seed(0)
    model = swinv2_scale.create_model(SIZE, image_size=SIDE, window_size=8, num_classes=CLASSES)
    ranks = distributed.world_size()
    ds_config = deepspeed_config(
        global_batch=MICRO_BATCH * ranks,
        micro_batch=MICRO_BATCH,
        world_size=ranks,
        precision="bf16",
        gradient_clip=5.0,
        **PARALLEL | {"zero_stage": 1},
    )
    groups = parameter_groups(model, depths(model), weight_decay=0.05, layer_decay=None)
    make = optimizer("adamw", implementation="torch", zero_stage=1, offload=None, betas=(0.9, 0.999), eps=1e-8)
    engine = build_engine(model, groups, optimizer=make, precision="bf16", ds_config=ds_config)
    batch = {"image": torch.randn(MICRO_BATCH, 3, SIDE, SIDE), "label": torch.randint(0, CLASSES, (MICRO_BATCH,))}
    times = []
    for number in range(WARM + STEPS):
        if number == WARM:
            for call in calls.values():
                call.seconds, call.bytes = 0.0, 0
        distributed.barrier()
        begin = time.perf_counter()
        engine.step([batch], lambda model, b: torch.nn.functional.cross_entropy(model(b["image"]), b["label"]), 1e-4)
        times.append(time.perf_counter() - begin)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    own = {name: call.seconds / STEPS for name, call in calls.items()}
    slowest = distributed.max_over_ranks(own)
    # Waiting for the other rank is not communication: of the ranks, the one that waits least.
    least = {name: -value for name, value in distributed.max_over_ranks({k: -v for k, v in own.items()}).items()}
    result = {"step": statistics.median(times[WARM:]), "collectives": sum(least.values())}
    result["collectives and waiting"] = sum(slowest.values())
    return result | {f"{name}, bytes/parameter": call.bytes / STEPS / parameters for name, call in calls.items()}


def work(rank: int, world: int, port: int, file: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "TORCHDYNAMO_DISABLE": "1"}
    with distributed.process_group(10.0):
        torch.set_num_threads(1)
        result = measure()
        if rank == 0:
            torch.save(result, file)
    distributed.end_process(0)


def compare() -> None:
    """One and two ranks in turns, since a machine's speed drifts; medians over the rounds."""
    found: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(ROUNDS):
            for world, results in found.items():
                port = 29500 + (os.getpid() + 10 * number + world) % 1000
                multiprocessing.spawn(work, (world, port, f"{folder}/result.pt"), nprocs=world)
                results.append(torch.load(f"{folder}/result.pt"))
    for world, results in found.items():
        result = {key: statistics.median(one[key] for one in results) for key in results[0]}
        shown = ", ".join(f"{name} {value:.3g}" for name, value in result.items())
        print(f"{world} rank(s): {MICRO_BATCH / result['step']:.2f} images/s a rank; {shown}")
        print("    seconds of a step by round: " + ", ".join(f"{one['step']:.3f}" for one in results))
    ratios = [one["step"] / two["step"] for one, two in zip(found[1], found[2], strict=True)]
    shares = [two["collectives"] / two["step"] for two in found[2]]
    print(f"images/s a rank, 2 ranks to 1: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"collectives of a step of 2 ranks: {statistics.median(shares):.1%} ({min(shares):.1%} to {max(shares):.1%})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "model"))
    if parser.parse_args().what == "measure":
        compare()
    else:
        print(f"{by_gpus()}\n\n{by_reached()}\n\n{by_images()}")


if __name__ == "__main__":
    main()
