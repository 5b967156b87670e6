"""The native gradient of a linear layer's weight and bias beside PyTorch's product and sum, in turn: medians.

python docs/benchmarks/weight_gradient.py [--threads 2] [--rounds 9]
"""

import argparse
import statistics
import time

import torch

from swinv2_scale.engine import _keep_freed_memory
from swinv2_scale.ops import native

SHAPES = [  # tokens, inputs, outputs
    *[(32768, 96, 288), (32768, 96, 96), (32768, 96, 384), (32768, 384, 96)],
    *[(9216, 128, 512), (8192, 192, 768), (2048, 384, 1536), (2304, 512, 2048), (576, 512, 2048), (512, 768, 3072)],
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    if "cpu" in native.missing or not torch.ops.swinv2_scale.has_weight_gradient():
        raise SystemExit("this processor is without AMX, or the kernels are not built")
    torch.set_num_threads(arguments.threads)
    _keep_freed_memory()  # as in training
    operators = torch.ops.swinv2_scale
    print("| tokens | inputs | outputs | PyTorch, ms | native, ms | times faster |\n|---|---|---|---|---|---|")
    for tokens, inputs, outputs in SHAPES:
        x, grad = torch.randn(tokens, inputs).bfloat16(), torch.randn(tokens, outputs).bfloat16()
        programs = (
            lambda g=grad, x=x: (g.t() @ x, operators.sum_rows(g)),
            lambda g=grad, x=x: operators.weight_gradient(g, x),
        )
        seconds: list[list[float]] = [[], []]
        for _ in range(2 + arguments.rounds):
            for program, taken in zip(programs, seconds, strict=True):
                begin = time.perf_counter()
                program()
                taken.append(time.perf_counter() - begin)
        usual, ours = (1e3 * statistics.median(taken[2:]) for taken in seconds)
        print(f"| {tokens} | {inputs} | {outputs} | {usual:.2f} | {ours:.2f} | {usual / ours:.2f} |", flush=True)


if __name__ == "__main__":
    main()
