"""Peak memory of one block of Swin V2 T at 1536 pixels and window 48, by form of attention and memory policy.

    python docs/benchmarks/attention_memory.py                     # bfloat16 and float32
    python docs/benchmarks/attention_memory.py --types bf16        # one of them

The second block of stage 1 (shifted windows): 384 x 384 tokens, 96 channels, 3 heads, 64 windows of 2,304 tokens, one
image. A row is forward and backward in a process of its own; memory is its peak above the block's weights and input, so
it counts what is kept, what is computed with, and the gradients. Types are those of training: in bfloat16 the scale,
the position bias and the norms are float32. A process that passes `--limit` GiB is stopped and shown with that limit.
"""

import argparse
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from training_step import memory, stop_above

import swinv2_scale
from swinv2_scale.models.memory import apply
from swinv2_scale.parallel import PRECISIONS, cast

IMAGE, WINDOW = 1536, 48
COMMON = {"activations": "keep", "stages": None, "every": 1, "attention_stages": None, "mlp_tokens": 0}
PARTS = {"mlp_tokens": 4096}  # as conf/memory/chunked_mlp.yaml
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # of the C library: what is freed goes back at once and is not counted
FORMS = {  # the first is what the others are divided by
    "reference": {"attention": "reference"},
    "sequential": {"attention": "sequential"},
    "sequential, MLP in parts": {"attention": "sequential", **PARTS},
    "fused": {"attention": "kernel"},
    "fused, MLP in parts": {"attention": "kernel", **PARTS},
}


def measure(form: str, kind: str, map_rows: int, threads: int) -> None:
    """Print the seconds of a forward and backward pass and the GiB that it needs at its peak."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = swinv2_scale.create_model("t", image_size=IMAGE, window_size=WINDOW, num_classes=0).train()
    cast(model, kind)
    apply(model, **{**COMMON, **FORMS[form]})
    block = model.blocks()[0][1]
    x = torch.randn(1, map_rows, model.absolute_grid[1], model.widths[0]).to(PRECISIONS[kind]).requires_grad_()
    gradient = torch.ones_like(x[:1, :1, :1]).expand_as(x)
    before = memory(os.getpid(), "VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    begin = time.perf_counter()
    block(x).backward(gradient)
    seconds = time.perf_counter() - begin
    assert x.grad is not None and bool(torch.isfinite(x.grad).all())
    print(seconds, (memory(os.getpid(), "VmHWM") - before) / 2**30)


def main() -> None:
    """Measure each form in a process of its own, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default="bf16,fp32")
    parser.add_argument("--rows", type=int, default=IMAGE // 4, help="of the map, if 384 are too many for the machine")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--limit", type=float, default=20.0, help="GiB that a process may take")
    parser.add_argument("--forms", default=";".join(FORMS), help="semicolon-separated")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*arguments.measure, arguments.rows, arguments.threads)
        return
    print(f"PyTorch {torch.__version__}, {arguments.threads} threads, map of {arguments.rows} x {IMAGE // 4} tokens\n")
    print("| type | attention and policy | memory | less than the reference by | seconds |\n|---|---|---|---|---|")
    for kind in arguments.types.split(","):
        most, at_least = 0.0, ""
        for form in arguments.forms.split(";"):
            command = [sys.executable, __file__, "--rows", str(arguments.rows), "--threads", str(arguments.threads)]
            command += ["--measure", form, kind]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | EXACT)
            watch = threading.Thread(target=stop_above, args=(process, arguments.limit))
            watch.start()
            words = process.communicate()[0].split()
            watch.join()
            if words:
                seconds, peak = map(float, words)
                most = most or peak
                cells = f"{peak:.2f} GiB | {at_least}{most / peak:.1f}× | {seconds:.1f}"
            else:
                cells = f"more than {arguments.limit:g} GiB: stopped | - | -"
                if not most:
                    most, at_least = arguments.limit - 1, "more than "  # 1: what the process had before, and more
            print(f"| {kind} | {form} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
