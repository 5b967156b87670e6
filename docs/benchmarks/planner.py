"""The planner's peak against the measured one: training steps through the engine, on one CPU rank in bfloat16.

    python docs/benchmarks/planner.py                                          # everything: an hour, up to 8 GB
    python docs/benchmarks/planner.py --models t,s --shapes 192/12/16 --policies none,block

Each row is a process of its own: forward, backward and AdamW of the second step, its largest resident memory above
what the process had before there was a model (a step of a debug model has loaded the libraries by then). glibc
would keep freed memory and cut it into pieces, which says nothing of a GPU: so a block of 64 KB or more is
mapped by itself and returned when it is freed (MALLOC_MMAP_THRESHOLD_), and resident memory is that of live tensors.
A shape is image size / window / micro-batch. Attention is the fused operator, but for `sequential`.
"""

import argparse
import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from engine import MALLOC, resident
from training_step import engine_of

from swinv2_scale import config, distributed, planner

SHAPES = "192/12/16,256/8/8,384/24/4,640/40/1,1024/32/1"
GIB = 2**30


def configuration(model: str, image: int, window: int, batch: int, policy: str) -> Any:
    """As of a training run of one rank."""
    shape = [f"model.image_size={image}", f"model.window_size={window}"]
    batches = [f"global_batch={batch}", f"micro_batch={batch}", "parallel.reduce_bucket_size=5000000"]
    settings = [f"model={model}", "task=classification", f"memory={policy}", *shape, *batches]
    return config.compose("pretrain", ["name=benchmark", "epochs=1", "data.train=none", *settings])


def steps(cfg: Any, number: int) -> None:
    """Steps on noise; the peak counts from the second."""
    engine, task = engine_of(cfg, cfg.micro_batch)
    images = torch.randn(cfg.micro_batch, 3, cfg.model.image_size, cfg.model.image_size)
    target = torch.randn(cfg.micro_batch, cfg.model.num_classes).softmax(dim=1)
    for step in range(number):
        if step == 1:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak of building
        engine.step([{"image": images, "target": target}], task.loss, 1e-4)


def measure(cfg: Any) -> None:
    """Prints the peak in bytes."""
    with distributed.process_group(10.0):
        steps(configuration("debug", 64, 4, 1, "none"), 2)
        gc.collect()
        before = resident(peak=False)
        steps(cfg, 2)
        print(resident(peak=True) - before, flush=True)
    distributed.end_process(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="t,s,b")
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--policies", default="none,block,offload,sequential")
    parser.add_argument("--most", type=float, default=8.0, help="GiB planned, above which a row is left out")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    lists = [arguments.models.split(","), arguments.shapes.split(","), arguments.policies.split(",")]
    cases = [(m, *map(int, shape.split("/")), policy) for m in lists[0] for shape in lists[1] for policy in lists[2]]
    if arguments.measure:
        measure(configuration(*cases[0]))  # type: ignore[arg-type]
        return
    environment = {**os.environ, **MALLOC, "TORCHDYNAMO_DISABLE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    print("| model | image / window / batch | memory | planned, GiB | measured, GiB | planned / measured |")
    print("|---|---|---|---|---|---|", flush=True)
    for case in cases:
        model, image, window, batch, policy = case
        planned = planner.plan(configuration(*case), ranks=1, device="cpu").peak_bytes  # type: ignore[arg-type]
        if planned > arguments.most * GIB:
            continue
        command = [sys.executable, __file__, "--measure", "--models", str(model), "--policies", str(policy)]
        command += ["--shapes", f"{image}/{window}/{batch}"]
        answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        found = float(answer.stdout.split()[-1]) if answer.returncode == 0 else float("nan")
        cells = f"{planned / GIB:.3f} | {found / GIB:.3f} | {planned / found:.3f}"
        print(f"| {model} | {image} / {window} / {batch} | {policy} | {cells} |", flush=True)
        if answer.returncode:
            print(answer.stderr[-2000:], file=sys.stderr)


if __name__ == "__main__":
    main()
