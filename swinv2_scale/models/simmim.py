"""SimMIM (https://arxiv.org/abs/2111.09886): hide patches of an image, predict their pixels, compare with L1."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinv2_scale.models.swin_v2 import PATCH, SwinTransformerV2


class SimMIM(nn.Module):
    """An encoder with a mask token, and a one-layer decoder to pixels.

    encoder            a SwinTransformerV2 without head; it gains the parameter `mask_token`
    norm_target_window edge in pixels of the sliding window by whose mean and variance the target is normalised, as
                       Swin V2 does (47); 0 compares plain pixels
    """

    def __init__(self, encoder: SwinTransformerV2, *, norm_target_window: int) -> None:
        super().__init__()
        if not isinstance(encoder.head, nn.Identity):
            raise ValueError("SimMIM needs an encoder without classifier: build it with num_classes=0")
        if encoder.patch_embed.frames is not None:
            raise ValueError("SimMIM is for images: build its encoder with frames=null, and inflate it afterwards")
        if norm_target_window != 0 and (norm_target_window < 3 or norm_target_window % 2 == 0):
            raise ValueError(f"norm_target_window must be odd and 3 or more, or 0, got {norm_target_window}")
        self.encoder = encoder
        mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, encoder.widths[0]), std=0.02))
        self.encoder.register_parameter("mask_token", mask_token)
        self.stride = PATCH * 2 ** (len(encoder.layers) - 1)
        self.channels = encoder.patch_embed.proj.in_channels
        self.decoder = nn.Sequential(
            nn.Conv2d(encoder.widths[-1], self.stride**2 * self.channels, kernel_size=1),
            nn.PixelShuffle(self.stride),
        )
        self.norm_target_window = norm_target_window

    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        """Predicted pixels (B, C, Y, X) of images (B, C, Y, X), hidden where mask (B, Y/4, X/4) is 1."""
        if any(size % self.stride for size in images.shape[2:]):
            raise ValueError(f"SimMIM needs image sizes that {self.stride} divides, got {tuple(images.shape[2:])}")
        x = self.encoder.patch_embed(images)
        if mask.shape != x.shape[:3]:
            raise ValueError(
                f"mask must be {tuple(x.shape[:3])}, one value per {PATCH}-px patch, got {tuple(mask.shape)}"
            )
        hidden = mask[..., None].to(x.dtype)
        x = self.encoder.add_position(x * (1 - hidden) + self.encoder.get_parameter("mask_token") * hidden)
        x = self.encoder.norm(self.encoder.forward_stages(x)[-1])
        return self.decoder(x.permute(0, 3, 1, 2).to(self.decoder[0].weight.dtype))

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """Mean L1 distance over hidden pixels, at least float32: scalar. Shapes as in `reconstruct`."""
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        target = images if not self.norm_target_window else normalise_target(images, self.norm_target_window)
        predicted = self.reconstruct(images, mask)
        hidden = mask.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)[:, None].to(target.dtype)
        distance = (target - predicted.to(target.dtype)).abs()
        return (distance * hidden).sum() / (hidden.sum() + 1e-5) / self.channels


def normalise_target(images: Tensor, window: int) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-6) over a sliding window centred on each pixel: (B, C, Y, X) -> same.

    At the border only pixels of the image count; the variance is the unbiased one, never below 0.
    """

    def box_mean(x: Tensor) -> Tensor:  # separable, because the number of pixels inside the image is
        for kernel in ((window, 1), (1, window)):
            x = F.avg_pool2d(x, kernel, 1, (kernel[0] // 2, kernel[1] // 2), count_include_pad=False)
        return x

    ones = torch.ones_like(images[:1, :1])
    count = F.avg_pool2d(ones, (window, 1), 1, (window // 2, 0)) * F.avg_pool2d(ones, (1, window), 1, (0, window // 2))
    count = count * window**2
    mean = box_mean(images)
    variance = (box_mean(images**2) - mean**2).clamp(min=0) * count / (count - 1)
    return (images - mean) / (variance + 1e-6).sqrt()
