"""Swin Transformer V2 (https://arxiv.org/abs/2111.09883), with the constants of the released code.

The model knows nothing of training: activation checkpointing, sequential attention and precision are applied from
outside. Feature maps stay (B, Y, X, C) throughout; B images, Y X rows and columns, C channels, H heads, D head width.
Models of clips have a time axis T before Y, and are otherwise the same modules (video.py).

    SwinTransformerV2: patch_embed -> layers (stages) -> norm -> mean over the map -> head
    Stage:             blocks -> downsample (patch merging)
    Block:             x + norm1(attn(x)), x + norm2(mlp(x))              residual post-norm
    WindowAttention:   qkv -> cosine_window_attention(…, bias table) -> proj
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinv2_scale.models.initial import init_weights
from swinv2_scale.models.position_bias import PositionBias
from swinv2_scale.ops import cosine_window_attention
from swinv2_scale.ops.block import first_images, layer_norm, linear, mlp, residual_post_norm
from swinv2_scale.ops.windows import fit_window

PATCH = 4  # pixels per axis; every released model has it


class LayerNorm(nn.LayerNorm):
    """Normalises in the type of its weights (float32 in mixed precision) and returns the type of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias)


class PostNorm(nn.LayerNorm):
    """Residual post-norm: x + keep · LayerNorm(branch), the norm in the type of its weights, the sum in x's."""

    def forward(  # type: ignore[override]
        self, x: Tensor, branch: Tensor, keep: Tensor | None = None, images: Tensor | None = None
    ) -> Tensor:
        return residual_post_norm(x, branch, self.weight, self.bias, keep, images)


class Linear(nn.Linear):
    """A linear layer whose backward is ours (ops/block.py)."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class DropPath(nn.Module):
    """Drops the whole branch for a random share of the images, and scales the rest to keep the mean.

    An image's dropped branch is not computed. That changes nothing but time, memory and the order of sums: images meet
    nowhere in a block. A compiler wants the same shapes in every step, so compiled models compute all branches.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, branch: Callable[[Tensor], Tensor], norm: PostNorm) -> Tensor:
        """x (B, …) + norm(branch(x))"""
        if not self.training or self.rate == 0.0:
            return norm(x, branch(x))
        compiled = torch.compiler.is_compiling()
        device = x.device if compiled else "cpu"  # where nothing waits for a GPU to know how many there are
        keep = (torch.rand(len(x), device=device) >= self.rate) / (1.0 - self.rate)
        if compiled or keep.all():
            return norm(x, branch(x), keep.to(x.device, non_blocking=True))
        kept = int(keep.count_nonzero())
        keep, images = (t.to(x.device, non_blocking=True) for t in keep.sort(descending=True, stable=True))
        x, some = first_images(x, images, kept)
        return norm(x, branch(some), keep[:kept], images)


class WindowAttention(nn.Module):
    """Cosine attention inside windows with a continuous position bias. The key has no bias: it would turn k."""

    def __init__(self, channels: int, num_heads: int, axes: int, position_bias: str) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.implementation = "auto"  # of the operator; models/memory.py changes it
        self.logit_scale = nn.Parameter(torch.empty(num_heads, 1, 1))
        self.cpb_mlp = PositionBias(num_heads, axes, spacing=position_bias)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.q_bias = nn.Parameter(torch.empty(channels))
        self.v_bias = nn.Parameter(torch.empty(channels))
        self.proj = Linear(channels, channels)

    def forward(self, x: Tensor, window: Sequence[int], shift: Sequence[int], reference: Sequence[int]) -> Tensor:
        """(B, Y, X, C) -> (B, Y, X, C). `reference` is the window in whose units the bias measures distance."""
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        qkv = linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1))
        bias_table = self.cpb_mlp(window, reference)
        logit_scale = self.logit_scale.flatten().to(bias_table.dtype)
        out = cosine_window_attention(
            qkv, logit_scale, bias_table, window=window, shift=shift, implementation=self.implementation
        )
        return self.proj(out)


class Mlp(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)


class Block(nn.Module):
    """Attention and MLP with residual post-norm; the norms of a fresh block are zero, so that it is the identity."""

    def __init__(
        self,
        channels: int,
        num_heads: int,
        *,
        window: Sequence[int],
        shifted: bool,
        reference: Sequence[int],
        mlp_ratio: float,
        drop_path_rate: float,
        extra_norm: bool,
        position_bias: str,
    ) -> None:
        super().__init__()
        self.window, self.reference_window = list(window), list(reference)
        self.shift = [w // 2 if shifted else 0 for w in window]
        self.attn = WindowAttention(channels, num_heads, len(window), position_bias)
        self.norm1 = PostNorm(channels)
        self.mlp = Mlp(channels, int(channels * mlp_ratio))
        self.norm2 = PostNorm(channels)
        self.drop_path = DropPath(drop_path_rate)
        self.enorm = LayerNorm(channels) if extra_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, Y, X, C) -> (B, Y, X, C)"""
        window, shift = fit_window(x.shape[1:-1], self.window, self.shift)
        x = self.drop_path(x, lambda x: self.attn(x, window, shift, self.reference_window), self.norm1)
        x = self.drop_path(x, self.mlp, self.norm2)
        return self.enorm(x)


class PatchMerging(nn.Module):
    """Halves the map and doubles the channels: concatenate 2×2 neighbours, linear 4C -> 2C, then LayerNorm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduction = Linear(4 * channels, 2 * channels, bias=False)
        self.norm = LayerNorm(2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, Y, X, C) -> (B, ceil(Y/2), ceil(X/2), 2C); an odd map gets a zero row or column at its end."""
        rows, columns = x.shape[-3:-1]
        if rows % 2 or columns % 2:
            x = F.pad(x, (0, 0, 0, columns % 2, 0, rows % 2))
        neighbours = x.unflatten(-2, (-1, 2)).unflatten(-4, (-1, 2)).movedim(-4, -2)  # B Y/2 X/2 column row C
        return self.norm(self.reduction(neighbours.flatten(-3)))


class Stage(nn.Module):
    """Blocks at one resolution, then patch merging (except after the last stage)."""

    def __init__(self, blocks: list[Block], downsample: PatchMerging | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The stage's feature map, and what the next stage receives."""
        for block in self.blocks:
            x = block(x)
        return x, x if self.downsample is None else self.downsample(x)


class PatchEmbed(nn.Module):
    """4×4 patches to channels, then LayerNorm. The image is completed with zeros to a multiple of the patch.

    frames: how many a patch of a clip has; the clip is completed with its last one. None: images, without time.
    """

    def __init__(self, in_channels: int, channels: int, frames: int | None = None) -> None:
        super().__init__()
        self.frames = frames
        self.proj: nn.Conv2d | nn.Conv3d
        if frames is None:
            self.proj = nn.Conv2d(in_channels, channels, PATCH, PATCH)
        else:
            self.proj = nn.Conv3d(in_channels, channels, (frames, PATCH, PATCH), (frames, PATCH, PATCH))
        self.norm = LayerNorm(channels)

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_channels, Y, X) -> (B, ceil(Y/4), ceil(X/4), C), in the type of the weights."""
        if images.dim() != self.proj.weight.dim() or images.shape[1] != self.proj.in_channels:
            expected = f"(B, {self.proj.in_channels}, {'T, ' if self.frames else ''}Y, X)"
            raise ValueError(f"images must be {expected}, got shape {tuple(images.shape)}; see in_channels and frames")
        rows, columns = images.shape[-2:]
        if rows % PATCH or columns % PATCH:
            images = F.pad(images, (0, -columns % PATCH, 0, -rows % PATCH))
        if self.frames and images.shape[2] % self.frames:
            images = F.pad(images, (0, 0, 0, 0, 0, -images.shape[2] % self.frames), mode="replicate")
        channels_last = torch.channels_last_3d if self.frames else torch.channels_last  # as the map that comes out
        images = images.to(self.proj.weight.dtype, memory_format=channels_last)
        return self.norm(self.proj(images).movedim(1, -1))


class SwinTransformerV2(nn.Module):
    """The backbone, with a linear classifier when num_classes is not 0.

    window_size and pretrained_window_size: an integer, a pair (rows, columns), or a list with one of either per stage.
    pretrained_window_size null: the windows that this model has at image_size. Windows larger than a feature map
    shrink to it at run time, per axis, so any image size can be passed to forward.
    weight_init: how fresh weights start, "released" or "research"; see initial.py.
    position_bias: how its coordinates are spaced, "log" or "linear" (position_bias.py).
    frames: null for images; a number, as image_size, for clips (B, in_channels, T, Y, X) of any T. A window then has
    three values (time, rows, columns) or one for all, and a patch has patch_frames frames (null: one); see video.py.
    Raises ValueError for arguments that do not fit together.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: int | Sequence[int | Sequence[int]],
        pretrained_window_size: int | Sequence[int | Sequence[int]] | None,
        mlp_ratio: float,
        drop_path_rate: float,
        extra_norm_period: int,
        absolute_pos_embed: bool,
        num_classes: int,
        image_size: int | Sequence[int],
        weight_init: str,
        position_bias: str = "log",
        frames: int | None = None,
        patch_frames: int | None = None,
    ) -> None:
        super().__init__()
        stages = len(depths)
        if len(num_heads) != stages or min(depths) < 1:
            raise ValueError(f"depths {list(depths)} must be positive, and num_heads {list(num_heads)} as many")
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate must be at least 0 and below 1, got {drop_path_rate}")
        self.widths = [embed_dim * 2**i for i in range(stages)]
        for width, heads in zip(self.widths, num_heads, strict=True):
            if width % heads:
                raise ValueError(f"num_heads: {heads} does not divide the {width} channels of its stage")
        size, self.patch = _per_axis("image_size", image_size, 2), [PATCH, PATCH]
        if any(n is not None and n < 1 for n in (frames, patch_frames)) or (frames is None and patch_frames):
            raise ValueError(f"frames {frames} and patch_frames {patch_frames} must be positive; for images, both null")
        if frames is not None and absolute_pos_embed:
            raise ValueError("absolute_pos_embed is for images: a model with frames needs absolute_pos_embed=false")
        if frames is not None:
            size, self.patch = [frames, *size], [patch_frames or 1, *self.patch]
        grid = [math.ceil(s / p) for s, p in zip(size, self.patch, strict=True)]
        windows = per_stage("window_size", window_size, stages, len(grid))
        references = None
        if pretrained_window_size is not None:
            references = per_stage("pretrained_window_size", pretrained_window_size, stages, len(grid))
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()

        self.patch_embed = PatchEmbed(in_channels, embed_dim, None if frames is None else self.patch[0])
        self.absolute_pos_embed = (
            nn.Parameter(torch.empty(1, math.prod(grid), embed_dim)) if absolute_pos_embed else None
        )
        self.absolute_grid = grid
        self.layers = nn.ModuleList()
        for i, depth in enumerate(depths):
            fitted = [min(w, g) for w, g in zip(windows[i], stage_grid(grid, i), strict=True)]
            blocks = [
                Block(
                    self.widths[i],
                    num_heads[i],
                    window=windows[i],
                    shifted=b % 2 == 1,
                    reference=fitted if references is None else references[i],
                    mlp_ratio=mlp_ratio,
                    drop_path_rate=rates[sum(depths[:i]) + b],
                    extra_norm=extra_norm_period > 0 and (b + 1) % extra_norm_period == 0,
                    position_bias=position_bias,
                )
                for b in range(depth)
            ]
            self.layers.append(Stage(blocks, PatchMerging(self.widths[i]) if i < stages - 1 else None))
        self.norm = LayerNorm(self.widths[-1])
        self.head = nn.Linear(self.widths[-1], num_classes) if num_classes else nn.Identity()
        self.depths, self.weight_init = list(depths), weight_init
        init_weights(self, depths=depths, scheme=weight_init)

    @property
    def input_size(self) -> list[int]:
        """Rows and columns of image_size, in whole patches; frames before them where there are any."""
        return [g * p for g, p in zip(self.absolute_grid, self.patch, strict=True)]

    @property
    def windows(self) -> list[list[int]]:
        """Per stage, the window that blocks have at image_size; at another size it shrinks to the map by itself."""
        first = [blocks[0] for blocks in self.blocks()]
        return [fit_window(stage_grid(self.absolute_grid, i), b.window, b.shift)[0] for i, b in enumerate(first)]

    @property
    def pretrained_windows(self) -> list[list[int]]:
        """Per stage, the window in whose units the position bias measures distance. It travels with the weights."""
        return [blocks[0].reference_window for blocks in self.blocks()]

    @pretrained_windows.setter
    def pretrained_windows(self, references: Sequence[Sequence[int]]) -> None:
        for blocks, reference in zip(self.blocks(), references, strict=True):
            for block in blocks:
                block.reference_window = list(reference)

    def blocks(self) -> list[list[Block]]:
        """The blocks of each stage."""
        return [[block for block in stage.modules() if isinstance(block, Block)] for stage in self.layers]

    def add_position(self, x: Tensor) -> Tensor:
        """Embedded patches (B, Y/4, X/4, C) with their absolute position, if the model has one."""
        if self.absolute_pos_embed is None:
            return x
        if list(x.shape[1:-1]) != self.absolute_grid:
            grid, size = tuple(x.shape[1:-1]), self.input_size
            raise ValueError(f"absolute_pos_embed fits images of {size} pixels only, got a map of {grid} patches")
        return x + self.absolute_pos_embed.unflatten(1, self.absolute_grid)

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """The feature map of each stage, from embedded patches (B, Y/4, X/4, C)."""
        maps = []
        for stage in self.layers:
            feature_map, x = stage(x)
            maps.append(feature_map)
        return maps

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """(B, in_channels, Y, X) -> one map (B, Y/s, X/s, C·s/4) per stage, s = 4, 8, 16, 32, before the final norm."""
        return self.forward_stages(self.add_position(self.patch_embed(images)))

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_channels, Y, X), any Y and X -> logits (B, num_classes), or pooled features when num_classes is 0."""
        x = self.norm(self.forward_features(images)[-1])
        return self.head(x.mean(dim=tuple(range(1, x.dim() - 1))))


def stage_grid(grid: Sequence[int], stage: int) -> list[int]:
    """Tokens per axis of a stage, the first being 0, from those of the embedding: merging halves rows and columns."""
    return [*grid[:-2], *(math.ceil(g / 2**stage) for g in grid[-2:])]


def per_stage(name: str, value: int | Sequence[int | Sequence[int]], stages: int, axes: int = 2) -> list[list[int]]:
    """A value per axis for each stage, from an integer, one per axis, or a list with one of either per stage.

    As many integers as axes, for a model of as many stages, could mean either: they are one per axis.
    """
    if isinstance(value, int) or (len(value) == axes and all(isinstance(v, int) for v in value)):
        return [_per_axis(name, value, axes) for _ in range(stages)]  # type: ignore[arg-type]
    if len(value) != stages:
        each = f"an integer, {axes} of them (one per axis), or one of either for each of {stages} stages"
        raise ValueError(f"{name} {list(value)}: give {each}")
    return [_per_axis(name, v, axes) for v in value]


def _per_axis(name: str, value: int | Sequence[int], axes: int) -> list[int]:
    values = [value] * axes if isinstance(value, int) else list(value)
    if len(values) != axes or min(values) < 1:
        raise ValueError(f"{name}: expected a positive integer or {axes} of them, one per axis, got {value!r}")
    return values
