"""The attention operator against what PyTorch offers: time and peak memory of all in one run, as ratios.

    python kernels/bench.py                 # the four shapes of Swin V2 in bfloat16, one in float32
    python kernels/bench.py --sweep         # every window from 2 to 64
    python kernels/bench.py --only plain,sdpa,kernel --rounds 9 --threads 1

plain    the reference: pad, roll, partition, matmul, softmax, matmul, merge
sdpa     scaled_dot_product_attention, with bias and mask of all windows and heads as its attn_mask
compile  torch.compile of plain, a graph for each shape
flex     torch.compile of FlexAttention, with bias and mask as its score function; PyTorch trains it on GPUs only
kernel   ours, as implementation="auto" chooses it on the device

Every round takes all of them in turn, so that a slow moment of the machine meets each; the median round counts. Memory
is what forward and backward in a process of its own add to the inputs at their peak, in sizes of qkv.
"""

import argparse
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from swinv2_scale.ops import native
from swinv2_scale.ops.comparison import MASK, Attention, Shape, draw, measure, on_windows, plain, sdpa

# Type, batch, side of the map, window, heads. The windows are those of Swin V2 at 256, 256, 384 and 1536 pixels.
SHAPES = (
    ("bfloat16", 8, 64, 8, 3),
    ("bfloat16", 8, 64, 16, 3),
    ("bfloat16", 16, 48, 24, 6),
    ("bfloat16", 2, 96, 48, 4),
    ("float32", 16, 48, 24, 6),
)
SWEEP = tuple((kind, 1, w * max(2, 64 // w), w, 3) for kind in ("bfloat16", "float32") for w in range(2, 65))


def _flex(q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor, index: Tensor, region: Tensor) -> Tensor:
    bias, count = bias_table.flatten(1), len(region)

    def score(logit: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        apart = region[b % count, query] != region[b % count, key]
        return logit + bias[h, index[query, key]] + torch.where(apart, MASK, 0.0)

    flat = (x.flatten(0, 1).contiguous() for x in (q, k, v))
    return flex_attention(*flat, score_mod=score, scale=1.0).unflatten(0, q.shape[:2])  # type: ignore[union-attr]


def implementations(shape: Shape, device: str, names: Sequence[str]) -> dict[str, Attention]:
    """Those of `names`, by name."""
    makers: dict[str, Callable[[], Attention]] = {
        "plain": lambda: plain(shape),
        "sdpa": lambda: sdpa(shape, device),
        "compile": lambda: torch.compile(plain(shape), dynamic=False),
        "flex": lambda: torch.compile(on_windows(shape, device, _flex), dynamic=False),
        "kernel": lambda: plain(shape, device),
    }
    return {name: makers[name]() for name in names}


def added_memory(shape: Shape, device: str, name: str) -> float:
    """Peak of forward and backward beyond the inputs in sizes of qkv, measured by a process of its own."""
    command = [sys.executable, __file__, "--device", device, "--memory", name, *map(str, shape)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(child.stdout) if child.returncode == 0 else float("nan")


def print_added_memory(shape: Shape, device: str, name: str) -> None:
    """What the process of `added_memory` does; after a small problem, which loads what stays loaded."""
    small: Shape = (shape[0], 1, 2 * shape[3], shape[3], 1)
    for problem in (small, shape) if name not in ("compile", "flex") else (shape, shape):
        tensors = draw(problem, device)
        (attention,) = implementations(problem, device, [name]).values()
        before = _memory(device, start=True)
        attention(*tensors).sum().backward()
    print((_memory(device) - before) / tensors[0].nbytes)


def _memory(device: str, *, start: bool = False) -> int:
    """Bytes in use, from where the peak is counted; without `start` the peak since then."""
    if device == "cuda":
        if start:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if start:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS" if start else "VmHWM")) * 1024


def row(cells: Sequence[object]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def report(shapes: Sequence[Shape], device: str, names: Sequence[str], rounds: int, *, memory: bool) -> None:
    """Print a table, a row for each shape: milliseconds, ratios to the fastest of the others, memory."""
    heads = ["windows, heads, tokens", "type", *(f"{name} ms" for name in names), "forward", "forward + backward"]
    print(row(heads + [f"{name} memory" for name in names if memory]))
    print(row(["---"] * (len(heads) + memory * len(names))))
    for shape in shapes:
        kind, batch, side, window, count = shape
        torch._dynamo.reset()  # otherwise torch.compile counts every shape as one more recompilation, up to its limit
        untrained = () if device == "cuda" else ("flex",)
        times = measure(shape, device, implementations(shape, device, names), rounds, untrained)
        cells = [f"{batch * (side // window) ** 2}, {count}, {window * window}", kind]
        cells += [f"{times[name][0]:.1f} / {times[name][1]:.1f}" for name in names]
        for place in (0, 1):
            others = [t[place] for name, t in times.items() if name != "kernel" and t[place] == t[place]]
            cells.append(f"{min(others) / times['kernel'][place]:.1f}×")
        cells += [f"{added_memory(shape, device, name):.1f}" for name in names if memory]
        print(row(cells), flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="plain,sdpa,compile,flex,kernel", help="implementations, kernel among them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sweep", action="store_true", help="every window from 2 to 64, one image, no memory")
    parser.add_argument("--windows", help="of the sweep, comma-separated")
    parser.add_argument("--memory", nargs=6, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.memory:
        name, kind, *sizes = arguments.memory
        batch, side, window, heads = map(int, sizes)
        print_added_memory((kind, batch, side, window, heads), arguments.device, name)
        return
    if arguments.device in native.missing:
        raise SystemExit(f"there is nothing to compare: {native.missing[arguments.device]}")
    torch.set_num_threads(arguments.threads)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # for the processes that measure memory
    chosen = set(map(int, arguments.windows.split(","))) if arguments.windows else set(range(2, 65))
    shapes = [shape for shape in SWEEP if shape[3] in chosen] if arguments.sweep else SHAPES
    print(f"PyTorch {torch.__version__}, {arguments.device}, {arguments.threads} threads, {arguments.rounds} rounds\n")
    report(shapes, arguments.device, arguments.only.split(","), arguments.rounds, memory=not arguments.sweep)


if __name__ == "__main__":
    main()
