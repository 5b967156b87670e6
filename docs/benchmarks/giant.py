"""SwinV2-G, 3.0 billion parameters, forward and backward on this machine: time, peak of resident memory, gradients.

    python docs/benchmarks/giant.py                       # 192 pixels at window 12, 1536 pixels at window 32
    python docs/benchmarks/giant.py --sizes 192/12 --model l --memory none
    python docs/benchmarks/giant.py --sizes 320/20 --model video_b     # 8 frames, windows of 8 over time

bfloat16 weights, one image or clip, each size in a process of its own. Every gradient is kept to the end and looked at.
"""

import argparse
import math
import subprocess
import sys
import time
from pathlib import Path

import torch

from swinv2_scale import config, planner
from swinv2_scale.models import memory
from swinv2_scale.models.initial import initial_values
from swinv2_scale.parallel import cast


def resident(name: str) -> float:
    """GiB of this process: VmRSS, now, or VmHWM, at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**20 for line in lines if line.startswith(name))


def measure(size: str, policy: str, image: int, window: int) -> None:
    """Print a row of the table."""
    windows = f"[8,{window},{window}]" if size.startswith("video") else window
    settings = [f"model={size}", f"memory={policy}", f"model.image_size={image}", f"model.window_size={windows}"]
    settings += ["task=classification", "name=x", "global_batch=1", "micro_batch=1", "data.train=x"]
    # With the optimiser's states on disk, memory has what is here: weights and gradients in bf16, and activations.
    cfg = config.compose("pretrain", [*settings, "parallel=zero3_disk"])
    planned = planner.plan(cfg, ranks=1, device="cpu").backward_bytes / 2**30
    before = resident("VmRSS")
    with torch.device("meta"):
        model = config.instantiate(cfg.model)
    initial = initial_values(model, depths=cfg.model.depths, scheme=cfg.model.weight_init, seed=0)
    cast(model, "bf16")
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Blocks of a fresh model are the identity, and most of their gradients zero: here they are not.
            parameter.copy_(initial(name) + 0.02 * ("norm" in name))
    memory.apply(model, **cfg.memory)
    images = torch.randn(1, 3, *model.input_size, generator=torch.Generator().manual_seed(0))
    begin = time.monotonic()
    loss = torch.nn.functional.cross_entropy(model(images).float(), torch.tensor([1]))
    forward = time.monotonic() - begin
    loss.backward()
    backward = time.monotonic() - begin - forward
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    wrong = [name for name, value in gradients.items() if value is None or not bool(value.isfinite().all())]
    zero = [name for name, value in gradients.items() if value is not None and not bool(value.any())]
    parameters = sum(math.prod(parameter.shape) for parameter in model.parameters())
    print(
        f"| {size.upper()}, {parameters / 1e6:,.1f} M | {image} / {windows} | {policy} "
        f"| {forward:.0f} s | {backward:.0f} s | {resident('VmHWM'):.1f} GiB ({before:.1f} before the model) "
        f"| {planned:.1f} GiB "
        f"| {loss.item():.4f} | {len(gradients) - len(wrong)} of {len(gradients)} finite, {len(zero)} zero |",
        flush=True,
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="g")
    parser.add_argument("--memory", default="block")
    parser.add_argument("--sizes", default="192/12,1536/32", help="image size / window, comma-separated")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = [tuple(map(int, size.split("/"))) for size in arguments.sizes.split(",")]
    if arguments.one:
        measure(arguments.model, arguments.memory, *sizes[0])
        return
    print("| model | image / window | memory | forward | backward | peak | planned above that | loss | gradients |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for image, window in sizes:
        command = [sys.executable, __file__, "--one", "--model", arguments.model, "--memory", arguments.memory]
        subprocess.run([*command, "--sizes", f"{image}/{window}"], check=True)


if __name__ == "__main__":
    main()
