"""UPerNet (https://arxiv.org/abs/1807.10221) on a Swin Transformer V2: the class of every pixel.

    UPerNet:  encoder -> LayerNorm of each stage's map -> decoder -> logits, resized to the image
    Decoder:  pyramid pooling of the last map -> sums from top to bottom -> all levels together -> classifier
              the last map but one -> one convolution -> classifier, for the auxiliary loss

Equal to transformers' UperNetForSemanticSegmentation, and so to OpenMMLab's: all resizing is bilinear with
align_corners=False, the same at every size of image. What neither of them fixes: the last map has the backbone's own
final norm, which pretrained weights bring; the norms of the other maps are fresh. Weights start as normal noise of
deviation 0.02, which for 3 x 3 convolutions of 512 channels is He's.

B images, Y X rows and columns, C channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinv2_scale import distributed
from swinv2_scale.models.initial import init_weights
from swinv2_scale.models.swin_v2 import LayerNorm, SwinTransformerV2

EPS, MOMENTUM = 1e-5, 0.1  # PyTorch's defaults, and those of both libraries


class BatchNorm(nn.Module):
    """Batch norm over the micro-batches of all ranks, in the type of its weights (float32 in mixed precision).

    The same as torch's SyncBatchNorm, which does not run on a CPU. Statistics are those of a micro-batch times the
    ranks: unlike all else, a step depends on how the global batch is cut into micro-batches. A batch that is not
    finite leaves the running statistics as they are, so that a step can be skipped. Evaluation uses those. On the meta
    device, where there are no values, no rank asks another.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, Y, X) -> (B, C, Y, X), in the type of x. Raises ValueError for a single value per channel."""
        exact = x.to(self.weight.dtype)
        if not self.training:
            out = F.batch_norm(exact, self.running_mean, self.running_var, self.weight, self.bias, eps=EPS)
            return out.to(x.dtype)
        values = x.numel() // x.shape[1] * distributed.world_size()
        if values < 2 and not x.is_meta:
            raise ValueError(
                "batch norm has one value per channel in a micro-batch of one image on one rank (the map that is "
                "pooled to 1 x 1): set micro_batch=2 or more, or use more ranks"
            )
        out, mean, variance = _Normalised.apply(exact, self.weight, self.bias)
        with torch.no_grad():
            finite = mean.isfinite() & variance.isfinite()
            for running, new in (
                (self.running_mean, mean),
                (self.running_var, variance * (values / max(values - 1, 1))),
            ):
                running.lerp_(torch.where(finite, new, running), MOMENTUM)
        return out.to(x.dtype)


class _Normalised(torch.autograd.Function):
    """x (B, C, Y, X) normalised over all but C and all ranks, and the mean and variance (C,) that it had."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean = distributed.mean_over_ranks(x.mean((0, 2, 3)))
        variance = distributed.mean_over_ranks((x - _spread(mean)).square().mean((0, 2, 3)))
        scale = (variance + EPS).rsqrt()
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.mark_non_differentiable(mean, variance)
        return (x - _spread(mean)) * _spread(scale * weight) + _spread(bias), mean, variance

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, mean, scale = ctx.saved_tensors
        normal = (x - _spread(mean)) * _spread(scale)
        own = torch.stack((grad.mean((0, 2, 3)), (grad * normal).mean((0, 2, 3))))
        values = x.numel() // x.shape[1]
        bias_grad, weight_grad = (own * values).unbind()
        grad_mean, grad_along = (_spread(part) for part in distributed.mean_over_ranks(own.clone()))
        return (grad - grad_mean - normal * grad_along) * _spread(scale * weight), weight_grad, bias_grad


def _spread(channels: Tensor) -> Tensor:
    return channels[:, None, None]


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.norm = BatchNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, Y, X) -> (B, outputs, Y, X)"""
        return F.relu(self.norm(self.conv(x)))


class Level(nn.Module):
    """What one stage's map goes through, below the last: `norm`, `lateral` before the sum, `output` after it."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.norm = LayerNorm(width)
        self.lateral = ConvNorm(width, channels, 1)
        self.output = ConvNorm(channels, channels, 3)


class Decoder(nn.Module):
    """The heads: maps of widths C_1 … C_n, at strides 4, 8, …, to logits at stride 4, and auxiliary ones."""

    def __init__(
        self,
        widths: Sequence[int],
        *,
        num_classes: int,
        channels: int,
        auxiliary_channels: int,
        pool_scales: Sequence[int],
        dropout: float,
    ) -> None:
        super().__init__()
        self.pool_scales = list(pool_scales)
        self.levels = nn.ModuleList(Level(width, channels) for width in widths[:-1])
        self.pyramid = nn.ModuleList(ConvNorm(widths[-1], channels, 1) for _ in pool_scales)
        self.bottleneck = ConvNorm(widths[-1] + len(pool_scales) * channels, channels, 3)
        self.fuse = ConvNorm(len(widths) * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)  # whole channels
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        self.auxiliary = ConvNorm(widths[-2], auxiliary_channels, 3)
        self.auxiliary_classifier = nn.Conv2d(auxiliary_channels, num_classes, 1)

    def lower(self) -> list[Level]:
        """The levels below the last map."""
        return [level for level in self.levels if isinstance(level, Level)]

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """(B, C_i, Y_i, X_i) -> logits (B, classes, Y_1, X_1)"""
        last = maps[-1]
        pooled = [
            resized(conv(F.adaptive_avg_pool2d(last, scale)), last.shape[2:])
            for scale, conv in zip(self.pool_scales, self.pyramid, strict=True)
        ]
        top = self.bottleneck(torch.cat([last, *pooled], dim=1))
        outputs = [top]
        for level, feature_map in reversed(list(zip(self.lower(), maps[:-1], strict=True))):
            top = level.lateral(feature_map) + resized(top, feature_map.shape[2:])
            outputs.insert(0, level.output(top))
        together = torch.cat([resized(output, maps[0].shape[2:]) for output in outputs], dim=1)
        return self.classifier(self.dropout(self.fuse(together)))

    def auxiliary_logits(self, maps: Sequence[Tensor]) -> Tensor:
        """(B, C_i, Y_i, X_i) -> logits (B, classes, Y_{n-1}, X_{n-1}) of the last map but one."""
        return self.auxiliary_classifier(self.dropout(self.auxiliary(maps[-2])))


class UPerNet(nn.Module):
    """A backbone without classifier, and the heads.

    encoder             a SwinTransformerV2 of two stages or more
    channels            of the decoder, auxiliary_channels of the auxiliary head
    pool_scales         of the pyramid: the last map is averaged to 1 x 1, 2 x 2, …
    dropout             the share of channels that is dropped before each classifier
    Raises ValueError for an encoder with a classifier, of one stage, and for impossible numbers.
    """

    def __init__(
        self,
        encoder: SwinTransformerV2,
        *,
        num_classes: int,
        channels: int,
        auxiliary_channels: int,
        pool_scales: Sequence[int],
        dropout: float,
    ) -> None:
        super().__init__()
        if not isinstance(encoder.head, nn.Identity) or len(encoder.widths) < 2:
            raise ValueError("UPerNet needs an encoder without classifier (num_classes=0) and with two stages or more")
        if min(num_classes, channels, auxiliary_channels, *pool_scales) < 1 or not pool_scales:
            raise ValueError(
                f"num_classes={num_classes}, channels={channels}, auxiliary_channels={auxiliary_channels} and each of "
                f"pool_scales={list(pool_scales)} must be 1 or more"
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout={dropout} must be at least 0 and below 1")
        self.encoder = encoder
        self.decoder = Decoder(
            encoder.widths,
            num_classes=num_classes,
            channels=channels,
            auxiliary_channels=auxiliary_channels,
            pool_scales=pool_scales,
            dropout=dropout,
        )
        init_weights(self, depths=encoder.depths, scheme=encoder.weight_init)

    def maps(self, features: Sequence[Tensor]) -> list[Tensor]:
        """What forward_features of the encoder gives -> the normalised maps (B, C·s/4, Y/s, X/s), s = 4, 8, 16, 32."""
        *lower, last = features
        normed = [level.norm(feature_map) for level, feature_map in zip(self.decoder.lower(), lower, strict=True)]
        return [feature_map.permute(0, 3, 1, 2) for feature_map in (*normed, self.encoder.norm(last))]

    def segment(self, images: Tensor) -> Tensor:
        """(B, in_channels, Y, X), any Y and X -> logits (B, classes, Y, X), at least float32."""
        return _at_image(self.decoder(self.maps(self.encoder.forward_features(images))), images.shape[2:])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As `segment`, and the logits of the auxiliary head, of the same shape: what training needs."""
        return self.answers(self.encoder.forward_features(images), images.shape[2:])

    def answers(self, features: Sequence[Tensor], size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Of the encoder's maps, for images of `size`, rows and columns: what `forward` gives."""
        maps = self.maps(features)
        return _at_image(self.decoder(maps), size), _at_image(self.decoder.auxiliary_logits(maps), size)


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, Y, X) -> (B, C, *size), bilinearly, without aligned corners."""
    return x if x.shape[2:] == torch.Size(size) else F.interpolate(x, list(size), mode="bilinear", align_corners=False)


def _at_image(logits: Tensor, size: Sequence[int]) -> Tensor:
    return resized(logits.to(torch.promote_types(logits.dtype, torch.float32)), size)
