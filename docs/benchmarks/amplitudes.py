"""The stability figure of the paper in small: amplitude of each block's output, pre-norm beside residual post-norm.

    python docs/benchmarks/amplitudes.py                # five minutes on two cores: a table, docs/images/amplitudes.svg
    python docs/benchmarks/amplitudes.py --seeds 0 1

Two models of 24 blocks, as deep as S, learn the demonstration's handwritten digits. They differ in where a block
normalises and in nothing else: same seed, same weights at the start but for norm1 and norm2 (0 in residual post-norm,
so that a fresh block is the identity; 1 in pre-norm, which learns nothing from 0), same batches, same optimiser.
"""

import argparse
import io
import math
import multiprocessing
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import swinv2_scale
from swinv2_scale.data import demo
from swinv2_scale.models.probe import BlockProbe
from swinv2_scale.models.swin_v2 import Block
from swinv2_scale.ops.windows import fit_window

FIGURE = Path(__file__).resolve().parents[1] / "images" / "amplitudes.svg"
NORMS = ("pre-norm", "residual post-norm")
DEPTHS = (2, 2, 18, 2)
SIDE, LARGER = 32, 36  # pixels: of the model's images, and of those that training crops them from
BATCH, WARMUP, CLIP = 32, 50, 5.0
RATE, DECAY = 1e-3, 0.05  # of AdamW; the rate falls along a cosine


class PreNorm(Block):
    """The block of Swin Transformer V1: each branch reads a normalised map, and what it adds is not normalised."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, Y, X, C) -> (B, Y, X, C)"""
        window, shift = fit_window(x.shape[1:3], self.window, self.shift)
        x = x + self.attn(self.norm1(x), window, shift, self.reference_window)
        return x + self.mlp(self.norm2(x))


class Result(NamedTuple):
    """Of one training: amplitudes of the blocks before and after it, its last losses' mean, accuracy held out."""

    before: list[float]
    after: list[float]
    loss: float
    accuracy: float


def build(norm: str) -> nn.Module:
    """A model of 5.5 M parameters for ten classes."""
    settings = {"embed_dim": 32, "depths": DEPTHS, "num_heads": (1, 2, 4, 8), "window_size": 4, "image_size": SIDE}
    model = swinv2_scale.create_model("debug", num_classes=10, **settings)
    if norm == "pre-norm":
        for block in (block for stage in model.blocks() for block in stage):
            block.__class__ = PreNorm
            nn.init.ones_(block.norm1.weight)
            nn.init.ones_(block.norm2.weight)
    return model


def digits(split: str, side: int) -> tuple[Tensor, Tensor]:
    """Images (n, 3, side, side) around 0 and labels (n,)."""
    items = demo.digits(split)[1]
    pixels = [np.asarray(Image.open(io.BytesIO(item.members["png"]))) for item in items]
    images = torch.from_numpy(np.stack(pixels)).float()[:, None] / 127.5 - 1
    images = F.interpolate(images, size=(side, side), mode="bicubic")
    return images.expand(-1, 3, -1, -1).contiguous(), torch.tensor([item.label for item in items])


def train(norm: str, seed: int, steps: int) -> Result:
    """Train one model, on one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = build(norm)
    probe = BlockProbe(model)
    images, labels = digits("train", LARGER)
    held_out = digits("validation", SIDE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    before, _ = look(model, probe, *held_out)
    generator = torch.Generator().manual_seed(seed)  # batches and crops, the same for both models
    losses = []
    for step in range(steps):
        rate = RATE * min((step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        top, left = torch.randint(LARGER - SIDE + 1, (2,), generator=generator).tolist()
        crops = images[chosen, :, top : top + SIDE, left : left + SIDE]
        loss = F.cross_entropy(model(crops), labels[chosen])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    after, accuracy = look(model, probe, *held_out)
    return Result(before, after, statistics.mean(losses[-50:]), accuracy)


@torch.no_grad()
def look(model: nn.Module, probe: BlockProbe, images: Tensor, labels: Tensor) -> tuple[list[float], float]:
    """Amplitudes of the blocks on held-out images, root mean square, and the accuracy there."""
    probe.watching = True
    accuracy = (model(images).argmax(dim=1) == labels).float().mean().item()
    probe.watching = False
    return probe.take()["amplitude"], accuracy


def table(results: dict[tuple[str, int], Result], steps: int) -> str:
    """Markdown: a row for each training."""
    lines = [
        f"| after {steps} steps | seed | block 1 | block 5, first of stage 3 | block 22, its last | block 24 "
        "| growth in stage 3 | loss | held-out top-1 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    first, last = sum(DEPTHS[:2]), sum(DEPTHS[:3]) - 1
    for (norm, seed), result in results.items():
        a = result.after
        shown = [f"{a[block]:.2f}" for block in (0, first, last, -1)]
        cells = [norm, str(seed), *shown, f"{a[last] / a[first]:.1f}×", f"{result.loss:.3f}", f"{result.accuracy:.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(results: dict[tuple[str, int], Result], steps: int) -> str:
    """SVG: amplitude over block number, a line for each training, and where the first seed's models started."""
    left, top, width, height = 70, 80, 610, 300
    values = [value for result in results.values() for value in (*result.before, *result.after)]
    grid = [digit * 10.0**power for power in range(-6, 7) for digit in (1, 2, 5)]
    low, high = max(v for v in grid if v <= min(values)), min(v for v in grid if v >= max(values))
    colours = dict(zip(NORMS, ("#c2410c", "#1d4ed8"), strict=True))

    def x(block: float) -> float:
        return left + width * (block - 0.5) / sum(DEPTHS)

    def y(amplitude: float) -> float:
        return top + height * math.log(high / amplitude) / math.log(high / low)

    def line(amplitudes: Sequence[float], colour: str, style: str) -> str:
        points = " ".join(f"{x(block):.1f},{y(value):.1f}" for block, value in enumerate(amplitudes, start=1))
        return f'<polyline points="{points}" fill="none" stroke="{colour}" {style}/>'

    def text(at_x: float, at_y: float, words: str, style: str = "") -> str:
        return f'<text x="{at_x:.1f}" y="{at_y:.1f}" {style}>{words}</text>'

    title = f"Amplitude of each block's output after {steps:,} steps"
    centred = 'text-anchor="middle"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 {top + height + 56}" font-family="sans-serif" '
        'font-size="13" fill="#374151">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        text(left, 26, title, 'font-size="16" font-weight="bold" fill="#111827"'),
        text(left, 46, "root mean square, logarithmic; dashed: before training", 'fill="#6b7280"'),
    ]
    for value in grid:
        if low <= value <= high:
            parts.append(f'<path d="M{left} {y(value):.1f}h{width}" stroke="#e5e7eb"/>')
            parts.append(text(left - 8, y(value) + 4, f"{value:g}", 'text-anchor="end"'))
    for stage, depth in enumerate(DEPTHS):
        begin, middle = x(sum(DEPTHS[:stage]) + 0.5), x(sum(DEPTHS[:stage]) + (depth + 1) / 2)
        if stage:
            parts.append(f'<path d="M{begin:.1f} {top}v{height}" stroke="#9ca3af" stroke-dasharray="2 3"/>')
        parts.append(text(middle, top - 8, f"stage {stage + 1}" if depth > 2 else f"{stage + 1}", centred))
    parts += [text(x(block), top + height + 18, f"{block}", centred) for block in range(1, sum(DEPTHS) + 1)]
    parts.append(text(left + width / 2, top + height + 42, "block", centred))
    for (norm, seed), result in results.items():
        if seed == min(number for _, number in results):
            parts.append(line(result.before, colours[norm], 'stroke-width="1.5" stroke-dasharray="5 4" opacity="0.6"'))
        parts.append(line(result.after, colours[norm], 'stroke-width="2.5" stroke-linejoin="round" opacity="0.85"'))
    for norm, colour in colours.items():
        ends = [result.after[-1] for (name, _), result in results.items() if name == norm]
        parts.append(text(x(sum(DEPTHS)) + 22, y(statistics.geometric_mean(ends)) + 4, norm, f'fill="{colour}"'))
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    """Train, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    arguments = parser.parse_args()
    runs = [(norm, seed) for seed in arguments.seeds for norm in NORMS]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as processes:
        waiting = [processes.submit(train, norm, seed, arguments.steps) for norm, seed in runs]
        results = {run: future.result() for run, future in zip(runs, waiting, strict=True)}
    print(table(results, arguments.steps))
    arguments.figure.write_text(figure(results, arguments.steps))
    print(f"\nwritten: {arguments.figure}")


if __name__ == "__main__":
    main()
