"""One training step of HTC++ at the paper's size on this machine: losses, time, peak of resident memory.

    python docs/benchmarks/detector_step.py                          # B at 1536 pixels, window 32, one image
    python docs/benchmarks/detector_step.py --model l --image 1024 --memory none

Forward, backward and AdamW's step of conf/experiment/coco_l.yaml, semantic branch included, in bfloat16 with float32
master weights, on one rank under ZeRO 1. The image is noise with 20 objects, which have boxes and masks; proposals and
samples are as many as in training. A second step would need no more memory: states are allocated before the first.
"""

import argparse
import math
import time
from typing import Any

import torch
from giant import resident
from training_step import engine_of

from swinv2_scale import config, distributed

OBJECTS, CLASSES = 20, 183  # classes of pixels, as in COCO-Stuff


def batch_of(image: int, *, objects: int = OBJECTS) -> dict[str, Any]:
    """One image (1, 3, image, image), and what is on it."""
    random = torch.Generator().manual_seed(0)
    corner = torch.rand(objects, 2, generator=random) * image * 0.6
    boxes = torch.cat([corner, corner + image * (0.05 + 0.3 * torch.rand(objects, 2, generator=random))], dim=1)
    masks = torch.zeros(objects, image, image, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.long().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    target = {
        "boxes": boxes,
        "labels": torch.arange(objects),
        "crowd": torch.zeros(0, 4),
        "masks": masks,
        "has_mask": torch.ones(objects, dtype=torch.bool),
        "semantic": torch.randint(CLASSES, (image, image), generator=random),
    }
    return {
        "image": torch.randn(1, 3, image, image, generator=random),
        "size": [(image, image)],
        "target": [target],
    }


def main() -> None:
    """Measure and print a row of the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="b")
    parser.add_argument("--memory", default="block")
    parser.add_argument("--image", type=int, default=1536)
    parser.add_argument("--window", type=int, default=32)
    arguments, overrides = parser.parse_known_args()
    size = [f"model.image_size={arguments.image}", f"model.window_size={arguments.window}", "data.train=x"]
    size += [f"model={arguments.model}", f"memory={arguments.memory}", f"task.detector.semantic_classes={CLASSES}"]
    cfg = config.compose("finetune", ["experiment=coco_l", *size, *overrides])
    before = resident("VmRSS")
    with distributed.process_group(60.0):
        engine, task = engine_of(cfg, 1)
        begin = time.monotonic()
        step = engine.step([batch_of(arguments.image)], task.loss, 1e-4)
        seconds = time.monotonic() - begin
    parameters = sum(math.prod(shape) for _, shape in engine.shapes())
    print("| model | image / window | memory | step | peak | loss | gradients |\n|---|---|---|---|---|---|---|")
    print(
        f"| HTC++ on {arguments.model.upper()}, {parameters / 1e6:,.1f} M | {arguments.image} / {arguments.window} "
        f"| {arguments.memory} | {seconds:.0f} s | {resident('VmHWM'):.1f} GiB ({before:.1f} before the model) "
        f"| {float(step.loss):.3f} | {'finite' if step.applied else 'not finite'}, norm {engine.gradient_norm():.3g} |"
    )


if __name__ == "__main__":
    main()
