"""What a model computes, from its shapes; and how fast a device multiplies matrices, to compare with."""

import math
import statistics
import time
from collections.abc import Sequence

import torch

from swinv2_scale.models.swin_v2 import Block, SwinTransformerV2, stage_grid
from swinv2_scale.ops.windows import fit_window, padded_grid


def forward_flops(model: SwinTransformerV2, *size: int, training: bool = False) -> dict[str, float]:
    """Floating-point operations of one image's forward pass, by part: a multiplication and an addition are two.

    size: rows and columns in pixels; of a model of clips frames, rows and columns.
    training: without the branches that drop path leaves out, on average.
    Matrix products only, as is usual; windows that reach beyond the map count whole. The network of the position bias
    runs once for a batch and is left out. A training step takes three times as many: backward is two passes.
    """
    embedded = [-(-side // patch) for side, patch in zip(size, model.patch, strict=True)]
    parts = dict.fromkeys(("embedding", "projections", "attention", "mlp", "merging", "head"), 0.0)
    parts["embedding"] = 2.0 * math.prod(embedded) * model.patch_embed.proj.weight.numel()
    for number, (stage, blocks, width) in enumerate(zip(model.layers, model.blocks(), model.widths, strict=True)):
        for block in blocks:
            for part, flops in block_flops(block, stage_grid(embedded, number)).items():
                parts[part] += flops * (1.0 - block.drop_path.rate if training else 1.0)
        if stage.downsample is not None:
            parts["merging"] += 2.0 * math.prod(stage_grid(embedded, number + 1)) * 4 * width * 2 * width
    if isinstance(model.head, torch.nn.Linear):
        parts["head"] = 2.0 * model.head.in_features * model.head.out_features
    return parts


def block_flops(block: Block, grid: Sequence[int]) -> dict[str, float]:
    """As forward_flops, of one block on a map of `grid` tokens."""
    width, tokens = block.attn.qkv.in_features, math.prod(grid)
    window, _ = fit_window(grid, block.window, block.shift)
    return {
        "projections": 2.0 * tokens * width * 4 * width,
        "attention": 2.0 * 2 * math.prod(padded_grid(grid, window)) * math.prod(window) * width,
        "mlp": 2.0 * 2 * tokens * width * block.mlp.fc1.out_features,
    }


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a square matrix product, the median of five; what a step could reach."""
    side = 4096 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        (left @ right)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - begin)
    return 2.0 * side**3 / statistics.median(times[1:])
