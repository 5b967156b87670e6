"""How much of a detector's batches is padding: with factors that are independent, and as training draws them.

    python docs/benchmarks/detection_padding.py coco/annotations/instances_train2017.json --image-size 1536

Looks at sizes alone: those of the annotation file, factors as v2.ScaleJitter applies them, a cut to the square, and
padding to a multiple of 32. "independent": each sample draws its own factor. "rising": Order.chances, which is what
training uses. "by aspect": independent, and each global batch is sorted by rows / columns.
"""

import argparse
from pathlib import Path

import numpy as np

from swinv2_scale.data.boxes import DIVISOR
from swinv2_scale.data.coco import read_annotations
from swinv2_scale.data.order import Order


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
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args()
    random = np.random.default_rng(0)
    sizes = np.array([(one["height"], one["width"]) for one in read_annotations(arguments.annotations).records])
    order = Order([[len(sizes)]], seed=0, global_batch=arguments.global_batch, open_shards=1)
    steps = range(arguments.steps)
    drawn = sizes[np.concatenate([order.global_batch_of(step)[1] for step in steps])]
    low, high = arguments.scale
    rising = low + np.concatenate([order.chances(step) for step in steps]) * (high - low)
    independent = random.uniform(low, high, len(drawn))
    sorted_by_aspect = np.lexsort((drawn[:, 0] / drawn[:, 1], np.arange(len(drawn)) // arguments.global_batch))
    by_name = {
        "independent": final_sizes(drawn, independent, arguments.image_size),
        "rising": final_sizes(drawn, rising, arguments.image_size),
        "by aspect": final_sizes(drawn, independent, arguments.image_size)[sorted_by_aspect],
    }
    print(f"{arguments.steps} global batches of {arguments.global_batch}, factors {low} to {high}")
    for micro_batch in (2, 4, 8):
        shares = {
            name: 1 - own / whole
            for name, (own, whole) in ((name, pixels(final, micro_batch)) for name, final in by_name.items())
        }
        told = [
            f"{name} {share:.1%} ({(1 - shares['independent']) / (1 - share) - 1:+.1%} pixels)"
            for name, share in shares.items()
        ]
        print(f"micro-batch {micro_batch}: padding {', '.join(told)}")


if __name__ == "__main__":
    main()
