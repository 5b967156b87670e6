"""The native products of a linear layer and its gradients beside PyTorch's, in turn: medians, and times faster.

python docs/benchmarks/linear.py [--type bf16] [--threads 2] [--rounds 9]

A layer has a few maps and weights that it takes in turn, so that they come from memory as in training. Where the native
product is not used in training (ops/block.py decides), its column says so.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from swinv2_scale.engine import _keep_freed_memory
from swinv2_scale.ops import block, native
from swinv2_scale.parallel import PRECISIONS

SHAPES = [  # tokens, inputs, outputs
    *[(32768, 96, 288), (32768, 96, 96), (32768, 96, 384), (32768, 384, 96), (9216, 128, 512), (8192, 192, 768)],
    *[(2304, 512, 1536), (2304, 512, 512), (2304, 512, 2048), (2304, 2048, 512), (576, 1024, 4096), (1024, 768, 3072)],
]
COPIES = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--type", choices=PRECISIONS, default="bf16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    dtype = PRECISIONS[arguments.type]
    if "cpu" in native.missing or torch.ops.swinv2_scale.products(dtype) == "none":
        raise SystemExit(f"no native products of {dtype} here: see docs/kernel.md for the processors that have them")
    print(f"{dtype}, by {torch.ops.swinv2_scale.products(dtype)}\n")
    torch.set_num_threads(arguments.threads)
    _keep_freed_memory()  # as in training
    names = ("forward", "gradient of x", "gradient of weight and bias")
    print(f"| tokens | inputs | outputs | {' | '.join(names)} |\n|---|---|---|---|---|---|")
    for shape in SHAPES:
        print(f"| {' | '.join(map(str, shape))} | {' | '.join(rows(*shape, dtype, arguments.rounds))} |", flush=True)


def rows(tokens: int, inputs: int, outputs: int, dtype: torch.dtype, rounds: int) -> list[str]:
    """A cell for each product."""
    sizes = ((tokens, inputs), (outputs, inputs), (tokens, outputs))
    sets = [[torch.randn(size).to(dtype) for size in sizes] for _ in range(COPIES)]
    bias, operators = torch.randn(outputs).to(dtype), torch.ops.swinv2_scale
    x, weight, grad = sets[0]
    pairs: list[tuple[bool, Callable[..., object], Callable[..., object]]] = [
        (
            block._takes_product(x, weight),
            lambda x, weight, _: block.usual_product(x, weight, bias),
            lambda x, weight, _: operators.linear_forward(x, weight, bias),
        ),
        (
            block._takes_product(grad, weight),
            lambda _, weight, grad: grad @ weight,
            lambda _, weight, grad: operators.linear_backward(grad, weight),
        ),
        (
            block._takes_gradient(grad, x),
            lambda x, _, grad: (grad.t() @ x, operators.sum_rows(grad)),
            lambda x, _, grad: operators.weight_gradient(grad, x),
        ),
    ]
    return [cell(taken, (usual, ours), sets, rounds) for taken, usual, ours in pairs]


def cell(taken: bool, programs: tuple[Callable[..., object], ...], sets: list[list[Tensor]], rounds: int) -> str:
    seconds: list[list[float]] = [[] for _ in programs]
    for _ in range(2 + rounds):
        for program, times in zip(programs, seconds, strict=True):
            begin = time.perf_counter()
            for tensors in sets:
                program(*tensors)
            times.append((time.perf_counter() - begin) / len(sets))
    usual, ours = (1e3 * statistics.median(times[2:]) for times in seconds)
    return f"{usual:.2f} → {ours:.2f} ms, {usual / ours:.2f}×{'' if taken else ', not used'}"


if __name__ == "__main__":
    main()
