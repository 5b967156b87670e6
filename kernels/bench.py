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
import functools
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from swinv2_scale.ops import cosine_window_attention, native, windows

# Type, batch, side of the map, window, heads. The windows are those of Swin V2 at 256, 256, 384 and 1536 pixels.
SHAPES = (
    ("bfloat16", 8, 64, 8, 3),
    ("bfloat16", 8, 64, 16, 3),
    ("bfloat16", 16, 48, 24, 6),
    ("bfloat16", 2, 96, 48, 4),
    ("float32", 16, 48, 24, 6),
)
SWEEP = tuple((kind, 1, w * max(2, 64 // w), w, 3) for kind in ("bfloat16", "float32") for w in range(2, 65))
WIDTH = 32  # of a head, in every Swin V2
MASK = -100.0

Shape = tuple[str, int, int, int, int]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(shape: Shape, implementation: str = "reference") -> Attention:
    """An implementation of the operator by name, on windows that are shifted by half."""
    window = shape[3]
    return functools.partial(
        cosine_window_attention,
        window=(window, window),
        shift=(window // 2, window // 2),
        mask_value=MASK,
        implementation=implementation,
    )


def partitioned(shape: Shape, device: str, attend: Callable[..., Tensor]) -> Attention:
    """Partition, `attend(q, k, v, bias_table, index, region)`, merge; q has length exp(logit_scale), k has length 1.

    q, k, v are (B, M, H, N, D), index (N, N) is the place of each pair in the table, region (M, N) as in windows.py.
    """
    _, _, side, w, _ = shape
    geometry = (side, side), (w, w), (w // 2, w // 2)
    index = windows.relative_index((w, w), torch.device(device))
    region = windows.regions(*geometry, torch.device(device))

    def attention(qkv: Tensor, logit_scale: Tensor, bias_table: Tensor) -> Tensor:
        x = windows.partition(qkv.flatten(-3), *geometry[1:]).unflatten(-1, qkv.shape[-3:])
        q, k, v = x.permute(3, 0, 1, 4, 2, 5).unbind(0)
        q = F.normalize(q.float(), dim=-1) * logit_scale.clamp(max=4.6).exp()[:, None, None]
        k = F.normalize(k.float(), dim=-1)
        out = attend(q.to(v.dtype), k.to(v.dtype), v, bias_table, index, region)
        return windows.merge(out.transpose(-2, -3).flatten(-2), *geometry)

    return attention


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor, index: Tensor, region: Tensor) -> Tensor:
    apart = (region[:, :, None] != region[:, None, :])[:, None]
    mask = bias_table.flatten(1)[:, index] + torch.where(apart, MASK, 0.0)  # (M, H, N, N)
    return F.scaled_dot_product_attention(q, k, v, mask.to(v.dtype).expand(len(q), -1, -1, -1, -1), scale=1.0)


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
        "sdpa": lambda: partitioned(shape, device, _sdpa),
        "compile": lambda: torch.compile(plain(shape), dynamic=False),
        "flex": lambda: torch.compile(partitioned(shape, device, _flex), dynamic=False),
        "kernel": lambda: plain(shape, device),
    }
    return {name: makers[name]() for name in names}


def draw(shape: Shape, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """qkv, logit_scale and bias_table of a shape, to be differentiated."""
    kind, batch, side, window, heads = shape
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, side, side, 3, heads, WIDTH, generator=generator).to(device, getattr(torch, kind))
    table = 16 * torch.rand(heads, 2 * window - 1, 2 * window - 1, generator=generator)
    return (
        qkv.requires_grad_(),
        torch.full((heads,), 2.3, device=device).requires_grad_(),
        table.to(device).requires_grad_(),
    )


def milliseconds(work: Callable[[], None], device: str, at_least: float = 0.02) -> float:
    """Of one call, the mean over as many as fill `at_least` seconds."""
    calls, begin = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < at_least or not calls:
        work()
        calls += 1
        if device == "cuda":
            torch.cuda.synchronize()
    return elapsed / calls * 1e3


def measure(shape: Shape, device: str, names: Sequence[str], rounds: int) -> dict[str, tuple[float, float]]:
    """Milliseconds of forward and of forward with backward by name; NaN for what an implementation cannot do."""
    torch._dynamo.reset()  # otherwise torch.compile counts every shape as one more recompilation, up to its limit
    tensors = draw(shape, device)
    grad = torch.randn_like(tensors[0][..., 0, :, :].flatten(-2))

    def forward(attention: Attention) -> None:
        with torch.no_grad():
            attention(*tensors)

    def both(attention: Attention) -> None:
        torch.autograd.grad(attention(*tensors), tensors, grad)

    works: dict[tuple[str, int], Callable[[], None]] = {}
    times: dict[tuple[str, int], list[float]] = {}
    for name, attention in implementations(shape, device, names).items():
        trains = name != "flex" or device == "cuda"
        for place, work in enumerate((forward, both)[: 1 + trains]):
            works[name, place] = functools.partial(work, attention)
            try:
                works[name, place]()
                times[name, place] = []
            except Exception as error:  # a compiler may fail in its own ways
                print(f"{name} {('forward', 'training')[place]}: {str(error).splitlines()[0][:200]}", file=sys.stderr)
                del works[name, place]
    for _ in range(rounds):
        for place, work in works.items():
            times[place].append(milliseconds(work, device))
    median = {place: statistics.median(values) for place, values in times.items()}
    return {name: (median.get((name, 0), float("nan")), median.get((name, 1), float("nan"))) for name in names}


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
        times = measure(shape, device, names, rounds)
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
