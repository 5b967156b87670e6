"""How much of a detector's batches is padding, and what grouping images of a global batch would save.

    python docs/benchmarks/detection_padding.py coco/annotations/instances_train2017.json --image-size 1536

Looks at sizes alone: those of the annotation file, random factors as v2.ScaleJitter applies them, a cut to the square,
and padding to a multiple of 32. Within each global batch images stay in their order, or are sorted by what their files
have (rows / columns), or by what becomes of them, which needs the random factor before a sample is read.
"""

import argparse
import math
from pathlib import Path

import numpy as np

from swinv2_scale.data.boxes import DIVISOR
from swinv2_scale.data.coco import read_annotations


def final_sizes(sizes: np.ndarray, factors: np.ndarray, image_size: int) -> np.ndarray:
    """Rows and columns (N, 2) of images of `sizes` (N, 2) after scale jitter and crop."""
    ratio = image_size / sizes.max(axis=1) * factors
    return np.clip((sizes * ratio[:, None]).astype(np.int64), 1, image_size)


def pixels(sizes: np.ndarray, micro_batch: int) -> tuple[int, int]:
    """Of images (N, 2) in their order: their own pixels, and those of their batches."""
    batches = sizes.reshape(-1, micro_batch, 2)
    padded = np.ceil(batches.max(axis=1) / DIVISOR) * DIVISOR
    return int(sizes.prod(axis=1).sum()), int(padded.prod(axis=1).sum() * micro_batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("annotations", type=Path, help="a COCO annotation file")
    parser.add_argument("--image-size", type=int, default=1536)
    parser.add_argument("--scale", type=float, nargs=2, default=(0.1, 2.0))
    parser.add_argument("--global-batch", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=50, help="that are drawn, as the factors are random")
    arguments = parser.parse_args()
    random = np.random.default_rng(0)
    sizes = np.array([(one["height"], one["width"]) for one in read_annotations(arguments.annotations).records])
    steps = len(sizes) // arguments.global_batch
    drawn = np.concatenate(
        [sizes[random.permutation(len(sizes))[: steps * arguments.global_batch]] for _ in range(arguments.epochs)]
    )
    final = final_sizes(drawn, random.uniform(*arguments.scale, len(drawn)), arguments.image_size)
    step = np.arange(len(drawn)) // arguments.global_batch
    orders = {
        "as they come": np.arange(len(drawn)),
        "by aspect": np.lexsort((drawn[:, 0] / drawn[:, 1], step)),
        "by final size": np.lexsort((final[:, 1], final[:, 0], step)),
    }
    print(f"{steps * arguments.epochs} global batches of {arguments.global_batch}, factors {arguments.scale}")
    for micro_batch in (2, 4, 8):
        if arguments.global_batch % micro_batch:
            continue
        found = {name: pixels(final[order], micro_batch) for name, order in orders.items()}
        base = found["as they come"][1]
        told = [f"{name} {1 - own / all_:.1%} ({all_ / base - 1:+.1%} pixels)" for name, (own, all_) in found.items()]
        print(f"micro-batch {micro_batch}: padding {', '.join(told)}")
    assert math.isclose(found["as they come"][0], found["by aspect"][0])


if __name__ == "__main__":
    main()
