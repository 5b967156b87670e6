"""Swin V2 over clips (Kinetics-400 in the paper, https://arxiv.org/abs/2111.09883), started from weights of images.

SwinTransformerV2 with `frames` is that model: the modules of the image model, with a time axis T before rows Y and
columns X. A clip is (B, in_channels, T, Y, X), a feature map (B, T/t, Y/s, X/s, C), t = patch_frames.

    patch     t × 4 × 4. The paper does not state t; its windows of 8 over clips of 8 frames say one
    window    three values. Each axis shrinks to the map by itself, and is not shifted where one window covers it
    merging   of rows and columns only: all stages see the same T/t
    bias      of three coordinates, time first, log-spaced in units of the pretrained window. The paper does not say how
              the bias gets its third: here the network's first layer gains an input, whose weights `inflate` sets to
              zero. So the bias of an image model holds at any difference in time, until training makes it one
    head      of the mean over all tokens of a clip

The paper trains at 8×256×256 with windows of 8×16×16, then at 8×320×320 with 8×20×20, and also tests at 8×384×384 with
8×24×24; weights go from one to the next as those of images do, by the units of their position bias.
"""

import re
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

PATCH_WEIGHT = re.compile(r"(encoder\.)?patch_embed\.proj\.weight$")
BIAS_WEIGHT = re.compile(r"(encoder\.)?layers\.\d+\.blocks\.\d+\.attn\.cpb_mlp\.0\.weight$")


def is_of_images(tensors: Mapping[str, Tensor]) -> bool:
    """Whether weights in released names are those of a model of images: their patches have no time."""
    return any(PATCH_WEIGHT.match(name) and tensor.dim() == 4 for name, tensor in tensors.items())


def inflate(tensors: Mapping[str, Tensor], patch_frames: int) -> dict[str, Tensor]:
    """Weights of a model of images, in released names, as those of a model of clips with patches of patch_frames.

    A clip of equal frames then gives what its frame gave, at any number of frames and any window over time:

        patch_embed.proj.weight   (C, in_channels, 4, 4) -> (C, in_channels, t, 4, 4): repeated, and divided by t
        attn.cpb_mlp.0.weight     (hidden, 2) -> (hidden, 3): a column of zeros before the others, for time

    Other tensors are those of the input. Raises ValueError for weights that are not those of a model of images, and for
    patch_frames below 1.
    """
    if patch_frames < 1:
        raise ValueError(f"patch_frames must be at least 1, got {patch_frames}")
    if not is_of_images(tensors):
        raise ValueError("only weights of images can be inflated: these have no patch_embed.proj.weight of four axes")
    inflated = {}
    for name, tensor in tensors.items():
        if PATCH_WEIGHT.match(name):
            inflated[name] = tensor[:, :, None].repeat(1, 1, patch_frames, 1, 1) / patch_frames
        else:
            inflated[name] = F.pad(tensor, (1, 0)) if BIAS_WEIGHT.match(name) else tensor
    return inflated
