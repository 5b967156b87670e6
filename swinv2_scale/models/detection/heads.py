"""Heads of a detector. Each takes features of any type, works in the type of its weights and answers in float32.

Every parameter takes part in every pass, for no boxes too: ranks that train together must send equal gradients.
R boxes, K classes, C channels.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.rpn import RPNHead


def exact(x: Tensor) -> Tensor:
    """A tensor in float32, or float64 where it has that: coordinates and losses need it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class GroupNorm(nn.GroupNorm):
    """Normalises in the type of its weights (float32 in mixed precision) and returns the type of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class Convolution(nn.Module):
    """A convolution that keeps the size, group normalisation if asked for, and ReLU."""

    def __init__(self, inputs: int, outputs: int, *, kernel: int = 3, normalised: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=not normalised)
        self.norm = GroupNorm(math.gcd(32, outputs), outputs) if normalised else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, Y, X) -> (B, outputs, Y, X), in the type of the weights."""
        return F.relu(self.norm(self.conv(x.to(self.conv.weight.dtype))))


class ProposalHead(RPNHead):
    """torchvision's, in any precision."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps (B, C, Y, X) -> per map, objectness (B, A, Y, X) and box deltas (B, 4·A, Y, X), A anchors a place."""
        objectness, deltas = super().forward([one.to(self.cls_logits.weight.dtype) for one in x])
        return [exact(one) for one in objectness], [exact(one) for one in deltas]


class BoxHead(nn.Module):
    """Convolutions with group normalisation and one linear layer; classes, and one box for all of them.

    The released detectors normalise by batches over all ranks. Groups of channels (arXiv 1803.08494) need no other
    rank and no batch.
    """

    def __init__(self, channels: int, *, convolutions: int, features: int, num_classes: int, side: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(*(Convolution(channels, channels, normalised=True) for _ in range(convolutions)))
        self.features = nn.Linear(channels * side**2, features)
        self.classes = nn.Linear(features, num_classes + 1)
        self.deltas = nn.Linear(features, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(R, C, side, side) -> logits (R, K + 1), the last one background, and box deltas (R, 4)."""
        x = F.relu(self.features(self.convs(x.to(self.features.weight.dtype)).flatten(1)))
        return exact(self.classes(x)), exact(self.deltas(x))


class MaskHead(nn.Module):
    """Convolutions, then the mask of each class at twice the size.

    With `follows`, it starts from its input plus the features of the head before it, through a 1×1 convolution: mask
    information flow (arXiv 1901.07518, section 3.1).
    """

    def __init__(self, channels: int, *, convolutions: int, num_classes: int, follows: bool) -> None:
        super().__init__()
        self.previous = Convolution(channels, channels, kernel=1) if follows else None
        self.convs = nn.Sequential(*(Convolution(channels, channels) for _ in range(convolutions)))
        self.larger = nn.ConvTranspose2d(channels, channels, 2, 2)
        self.masks = nn.Conv2d(channels, num_classes, 1)

    def features(self, x: Tensor, previous: Tensor | None) -> Tensor:
        """(R, C, side, side), and the features of the previous head or None -> features of the same shape."""
        if self.previous is not None and previous is not None:
            x = x + self.previous(previous).to(x.dtype)
        return self.convs(x)

    def forward(self, features: Tensor) -> Tensor:
        """Its own features (R, C, side, side) -> logits (R, K, 2·side, 2·side)."""
        return exact(self.masks(F.relu(self.larger(features.to(self.larger.weight.dtype)))))


def mask_logits(heads: Sequence[MaskHead], x: Tensor, *, flow: bool) -> list[Tensor]:
    """The logits of every head for the same input (R, C, side, side), each head fed by the one before if `flow`."""
    answers, previous = [], None
    for head in heads:
        features = head.features(x, previous)
        answers.append(head(features))
        previous = features if flow else None
    return answers


def last_mask_logits(heads: Sequence[MaskHead], x: Tensor, *, flow: bool) -> Tensor:
    """The last head's, as of `mask_logits`, without the masks of those before."""
    previous = None
    for head in heads[:-1] if flow else ():
        previous = head.features(x, previous)
    return heads[-1](heads[-1].features(x, previous))


class SemanticHead(nn.Module):
    """The class of every pixel, at stride 8, from all maps of the pyramid; and the features that tell it.

    Every map goes through its own 1×1 convolution and is brought to the second one's size; their sum goes through
    convolutions (arXiv 1901.07518, section 3.2).
    """

    STRIDE = 8

    def __init__(self, channels: int, *, maps: int, convolutions: int, num_classes: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(Convolution(channels, channels, kernel=1) for _ in range(maps))
        self.convs = nn.Sequential(*(Convolution(channels, channels) for _ in range(convolutions)))
        self.embedding = Convolution(channels, channels, kernel=1)
        self.classes = nn.Conv2d(channels, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Maps (B, C, Y/s, X/s), s = 4, 8, … -> logits (B, K, Y/8, X/8), features (B, C, Y/8, X/8)."""
        size = maps[1].shape[2:]
        total = torch.zeros((), device=maps[1].device)
        for lateral, one in zip(self.laterals, maps, strict=True):
            if one.shape[2:] != size:
                one = F.interpolate(one, size=size, mode="bilinear", align_corners=True)  # noqa: PLW2901
            total = total + exact(lateral(one))
        x = self.convs(total)
        return exact(self.classes(x)), exact(self.embedding(x))
