"""What the engine costs: memory per rank, guards, layer decay, checkpoints. On CPU ranks, one thread each.

python docs/benchmarks/engine.py memory        peak memory of a step at 1, 2, 4 ranks, and what the formula says
python docs/benchmarks/engine.py guards        steps with every guard and without any, in turns
python docs/benchmarks/engine.py layer_decay   parameter groups by layer, or few groups and a factor per weight
python docs/benchmarks/engine.py checkpoints   what training waits for while a checkpoint is written
"""

import argparse
import gc
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import multiprocessing

import swinv2_scale
from swinv2_scale import config, distributed
from swinv2_scale.checkpoint import Saver
from swinv2_scale.engine import Engine, build_engine, optimizer
from swinv2_scale.guard import Guard
from swinv2_scale.heartbeat import Heartbeat
from swinv2_scale.optim import parameter_groups
from swinv2_scale.parallel import deepspeed_config
from swinv2_scale.planner import state_bytes

PARALLEL = yaml.safe_load((config.CONF / "parallel/_common.yaml").read_text())
ADAM: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}
BUCKET = 5_000_000  # elements
GIB = 2**30
# glibc keeps and cuts up freed memory, a tenth of the whole here; with these, resident memory is that of live tensors.
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def build(size: str, *, stage: int = 1, layer_decay: float | None = None, make: Any = None, **changes: Any) -> Engine:
    """An engine that trains a classifier of 64-pixel images, whose activations take next to nothing."""
    torch.manual_seed(0)
    model = swinv2_scale.create_model(size, image_size=64, window_size=4, num_classes=10)
    ds_config = deepspeed_config(
        global_batch=distributed.world_size(),
        micro_batch=1,
        world_size=distributed.world_size(),
        precision="bf16",
        gradient_clip=5.0,
        **PARALLEL | {"zero_stage": stage, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET},
    )
    groups = parameter_groups(model, depths(model), weight_decay=0.05, layer_decay=layer_decay)
    if make is None:
        make = optimizer("adamw", implementation="torch", zero_stage=stage, offload=None, **ADAM)
    return build_engine(model, groups, optimizer=make, precision="bf16", ds_config=ds_config, **changes)


def depths(model: Any) -> list[int]:
    """Blocks per stage."""
    return [len(layer.blocks) for layer in model.layers]


def step(engine: Engine) -> Any:
    """One step on noise."""
    batch = {"image": torch.randn(1, 3, 64, 64), "label": torch.randint(0, 10, (1,))}
    return engine.step([batch], lambda model, b: torch.nn.functional.cross_entropy(model(b["image"]), b["label"]), 1e-4)


def seconds(action: Any) -> float:
    """How long an action takes; ranks begin it together."""
    distributed.sum_over_ranks({"ready": 1.0})
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def resident(peak: bool) -> int:
    """Bytes of this process in memory, now or at most since the peak was forgotten."""
    name = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def memory() -> dict[str, float]:
    """GiB: peak of the second and third step above what the process had before there was a model."""
    step(build("debug"))  # libraries that are loaded at the first step
    gc.collect()
    before = resident(peak=False)
    engine = build("b")
    step(engine)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of building
    step(engine)
    step(engine)
    parameters = sum(torch.Size(shape).numel() for _, shape in engine.shapes())
    planned = state_bytes(parameters, zero_stage=1, precision="bf16", ranks=distributed.world_size(), ema=False)
    gathered = planned["weights"] * (distributed.world_size() > 1)  # gloo gathers them beside the old ones
    return {"measured": (resident(peak=True) - before) / GIB, "planned": (sum(planned.values()) + gathered) / GIB}


def guards() -> dict[str, float]:
    """Medians of a step's seconds."""
    engine = build("t")
    guard = Guard(nonfinite="abort", spike=10.0, patience=3, rollbacks=3, tell=print)
    with tempfile.TemporaryDirectory() as folder:
        heartbeat = Heartbeat(Path(folder), distributed.rank(), stall_minutes=5.0, timeout_minutes=10.0)
        saver = Saver(Path(folder), keep=1)
        times: dict[str, list[float]] = {"without": [], "with": []}

        def guarded(number: int) -> None:
            heartbeat.beat("training", number)
            guard.after(number + 1, *step(engine))
            saver.finished()

        for number in range(120):
            engine._deepspeed.optimizer.check_grad_overflow = False
            times["without"].append(seconds(lambda: step(engine)))
            engine._deepspeed.optimizer.check_grad_overflow = True
            times["with"].append(seconds(lambda number=number: guarded(number)))
        heartbeat.end("finished")
    return {name: statistics.median(values[20:]) for name, values in times.items()}


class Factors(torch.optim.AdamW):
    """AdamW whose step is scaled weight by weight, by the state `factor`."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for weights in group["params"]:
                if weights.grad is None:
                    continue
                old = weights.clone()
                whole, group["params"] = group["params"], [weights]
                super().step()
                group["params"] = whole
                torch.lerp(old, weights, self.state[weights]["factor"], out=weights)


def layer_decay() -> dict[str, float]:
    """Medians of a step's seconds, and the number of optimiser groups."""
    from functools import partial

    import swinv2_scale.engine as module

    by_group = build("b", layer_decay=0.9)
    module.STATES["Factors"] = ("exp_avg", "exp_avg_sq", "factor")
    by_factor = build("b", make=partial(Factors, lr=0.0, **ADAM, fused=True))
    scales = {
        n: g["lr_scale"]
        for g in parameter_groups(by_group.model, depths(by_group.model), weight_decay=0.05, layer_decay=0.9)
        for n in g["names"]
    }
    for parameter, name in by_factor._trainable():
        by_factor._set(parameter, torch.full(parameter.shape, scales[name]), "factor")
    times: dict[str, list[float]] = {"groups": [], "factors": []}
    for _ in range(12):
        times["groups"].append(seconds(lambda: step(by_group)))
        times["factors"].append(seconds(lambda: step(by_factor)))
    result = {name: statistics.median(values[2:]) for name, values in times.items()}
    return result | {"number of groups": len(by_group._base.param_groups), "fewer": len(by_factor._base.param_groups)}


def checkpoints() -> dict[str, float]:
    """Seconds: of a step; of a step while a checkpoint is written; that training waits for it; that it takes."""
    engine = build("b")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.yaml").write_text("name: benchmark\n")
        saver = Saver(Path(folder), keep=1)
        plain = [seconds(lambda: step(engine)) for _ in range(6)][1:]
        saver.save(engine, step=1, state={}, metadata={})
        busy = []
        while not (distributed.from_rank_0(done := saver.finished())):
            busy.append(seconds(lambda: step(engine)))
        saved = distributed.from_rank_0(done)[0]
    return {
        "step": statistics.median(plain),
        "step while writing": statistics.median(busy) if busy else 0.0,
        "stall": saved.stall_seconds,
        "writing": saved.write_seconds,
    }


def work(rank: int, world: int, port: int, what: str, file: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "TORCHDYNAMO_DISABLE": "1"}
    torch.set_num_threads(1)
    with distributed.process_group(10.0):
        result = globals()[what]()
        if rank == 0:
            torch.save(result, file)
    distributed.end_process(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", "guards", "layer_decay", "checkpoints"))
    parser.add_argument("--ranks", type=int, nargs="+")
    arguments = parser.parse_args()
    if arguments.what == "memory":
        os.environ |= MALLOC  # of the ranks
    with tempfile.TemporaryDirectory() as folder:
        for world in arguments.ranks or {"memory": (1, 2, 4)}.get(arguments.what, (1, 2)):
            file = f"{folder}/result.pt"
            port = 29500 + os.getpid() % 1000 + world
            multiprocessing.spawn(work, (world, port, arguments.what, file), nprocs=world)
            result = torch.load(file)
            first, second = list(result.values())[:2]
            shown = ", ".join(f"{name} {value:.4g}" for name, value in result.items())
            print(f"{arguments.what}, {world} ranks: {shown}; ratio {second / first:.3f}", flush=True)


if __name__ == "__main__":
    main()
