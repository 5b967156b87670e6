"""The planner's peak against the measured one: training steps through the engine, on one CPU rank in bfloat16.

    python docs/benchmarks/planner.py                                          # everything: an hour, up to 8 GB
    python docs/benchmarks/planner.py --models t,s --shapes 192/12/16 --policies none,block
    python docs/benchmarks/planner.py --task segmentation --models t --shapes 320/8/2,640/20/2 --policies none,block
    python docs/benchmarks/planner.py --task detection --models t,b --shapes 512/16/1 --policies none,block

Each row is a process of its own: forward, backward and AdamW of the second step, its largest resident memory above
what the process had before there was a model (a step of a debug model has loaded the libraries by then). glibc
would keep freed memory and cut it into pieces, which says nothing of a GPU: so a block of 64 KB or more is
mapped by itself and returned when it is freed (MALLOC_MMAP_THRESHOLD_), and resident memory is that of live tensors.
A shape is image size / window / micro-batch. Attention is the fused operator, but for `sequential`. Detection is HTC++
with its semantic branch, on 32 objects an image; of the 128 boxes that a stage learns from 32 are objects, as planned.
"""

import argparse
import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from detector_step import CLASSES, batch_of
from engine import MALLOC, resident
from training_step import engine_of

from swinv2_scale import config, distributed, planner

SHAPES = "192/12/16,256/8/8,384/24/4,640/40/1,1024/32/1"
GIB = 2**30
OBJECTS = 32
SETTINGS = {
    "classification": ["model.num_classes=1000"],
    "segmentation": ["model.num_classes=150"],
    "detection": [
        "model.num_classes=80",
        f"task.detector.semantic_classes={CLASSES}",
        f"task.detector.samples={4 * OBJECTS}",
        "task.detector.positive_share=0.25",
        "task.train_collate.probability=0.0",
    ],
}


def configuration(task: str, model: str, image: int, window: int, batch: int, policy: str) -> Any:
    """As of a training run of one rank."""
    shape = [f"model.image_size={image}", f"model.window_size={window}"]
    batches = [f"global_batch={batch}", f"micro_batch={batch}", "parallel.reduce_bucket_size=5000000"]
    settings = [f"model={model}", f"task={task}", f"memory={policy}", *shape, *batches, *SETTINGS[task]]
    return config.compose("finetune", ["name=benchmark", "epochs=1", "data.train=none", *settings])


def batch_on(cfg: Any, image: int) -> dict[str, Any]:
    """Noise of so many pixels a side, and a target for it."""
    count, classes = cfg.micro_batch, cfg.model.num_classes
    if "detector" in cfg.task:
        parts = [batch_of(image, objects=OBJECTS) for _ in range(count)]
        joined = {key: [one for part in parts for one in part[key]] for key in ("size", "target")}
        return {"image": torch.cat([part["image"] for part in parts]), **joined}
    images = torch.randn(count, 3, image, image)
    if "auxiliary_weight" in cfg.task:
        return {"image": images, "map": torch.randint(classes, (count, image, image)).to(torch.uint8)}
    return {"image": images, "target": torch.randn(count, classes).softmax(dim=1)}


def steps(cfg: Any, number: int) -> None:
    """Steps on noise; the peak counts from the second. The first makes the optimiser's states, on smaller images."""
    engine, task = engine_of(cfg, cfg.micro_batch)
    size = cfg.model.image_size
    for step in range(number):
        batch = batch_on(cfg, size // 4 if step == 0 else size)
        if step == 1:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak of building
        engine.step([batch], task.loss, 1e-4)


def measure(cfg: Any) -> None:
    """Prints the peak in bytes."""
    with distributed.process_group(10.0):
        steps(configuration("classification", "debug", 64, 4, 1, "none"), 2)
        gc.collect()
        before = resident(peak=False)
        steps(cfg, 2)
        print(resident(peak=True) - before, flush=True)
    distributed.end_process(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=SETTINGS, default="classification")
    parser.add_argument("--models", default="t,s,b")
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--policies", default="none,block,offload,sequential")
    parser.add_argument("--most", type=float, default=8.0, help="GiB planned, above which a row is left out")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    lists = [arguments.models.split(","), arguments.shapes.split(","), arguments.policies.split(",")]
    cases = [
        (arguments.task, m, *map(int, shape.split("/")), policy)
        for m in lists[0]
        for shape in lists[1]
        for policy in lists[2]
    ]
    if arguments.measure:
        measure(configuration(*cases[0]))  # type: ignore[arg-type]
        return
    environment = {**os.environ, **MALLOC, "TORCHDYNAMO_DISABLE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    print("| model | image / window / batch | memory | planned, GiB | measured, GiB | planned / measured |")
    print("|---|---|---|---|---|---|", flush=True)
    for case in cases:
        task, model, image, window, batch, policy = case
        planned = planner.plan(configuration(*case), ranks=1, device="cpu").peak_bytes  # type: ignore[arg-type]
        if planned > arguments.most * GIB:
            continue
        command = [sys.executable, __file__, "--measure", "--task", str(task), "--models", str(model)]
        command += ["--policies", str(policy)]
        command += ["--shapes", f"{image}/{window}/{batch}"]
        answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        found = float(answer.stdout.split()[-1]) if answer.returncode == 0 else float("nan")
        cells = f"{planned / GIB:.3f} | {found / GIB:.3f} | {planned / found:.3f}"
        print(f"| {model} | {image} / {window} / {batch} | {policy} | {cells} |", flush=True)
        if answer.returncode:
            print(answer.stderr[-2000:], file=sys.stderr)


if __name__ == "__main__":
    main()
