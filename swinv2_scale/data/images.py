"""Encoded images, decoded as far as they are needed.

A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size for a fraction of the time: its blocks of 8 x 8 pixels are stored
as frequencies, of which the decoder then uses the low ones. That is done where a crop is still at least MARGIN times as
large as what it is resized to; all else is decoded whole. docs/data.md has times and differences.
"""

import io
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

# PIL imports the readers of its formats when it meets them. Loading processes are forked, perhaps while another thread
# of the run imports something (wandb imports PIL too): the lock of such an import would stay locked in them for ever.
Image.init()

MARGIN = 1.5  # at less, differences from decoding whole can be seen
_RESAMPLING = {
    InterpolationMode.BILINEAR: Image.Resampling.BILINEAR,
    InterpolationMode.BICUBIC: Image.Resampling.BICUBIC,
}


class CorruptSampleError(ValueError):
    """A sample that cannot be used: no image, an image or map that does not decode, a class that does not exist."""


class EncodedImage:
    """An image file's bytes. Its pixels are those of `decode`, however it comes to them."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    @cached_property
    def header(self) -> Image.Image:
        """PIL's image, of which size, mode and format are known and nothing is decoded.

        Raises CorruptSampleError for bytes that are no image.
        """
        try:
            return Image.open(io.BytesIO(self.content))
        except Exception as error:  # PIL's readers raise whatever their parsing runs into
            raise CorruptSampleError(f"image does not decode ({error})") from error

    def pixels(self) -> torch.Tensor:
        """uint8 (3, Y, X). Raises CorruptSampleError."""
        return decode(self.content)

    def resized_crop(
        self, top: int, left: int, height: int, width: int, size: list[int], interpolation: InterpolationMode
    ) -> torch.Tensor:
        """A rectangle, in pixels of the image, resized to `size` (Y, X) with antialiasing: uint8 (3, *size).

        Raises CorruptSampleError.
        """
        room = min(height / size[0], width / size[1]) / MARGIN
        scale = next((scale for scale in (8, 4, 2) if scale <= room), 1)
        if scale == 1 or self.header.format != "JPEG":
            return F.resized_crop(self.pixels(), top, left, height, width, size, interpolation, antialias=True)
        columns, rows = self.header.size
        try:
            with Image.open(io.BytesIO(self.content)) as picture:  # anew: decoding changes the size that it tells
                picture.draft("RGB", (columns // scale, rows // scale))
                small = picture.convert("RGB")
        except Exception as error:
            raise CorruptSampleError(f"image does not decode ({error})") from error
        box = (left / scale, top / scale, (left + width) / scale, (top + height) / scale)
        return F.pil_to_tensor(small.resize((size[1], size[0]), _RESAMPLING[interpolation], box=box))


class EncodedMap:
    """The bytes of a PNG whose values are numbers of classes, such as ADE20K's: 0 for none, c + 1 for class c."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def values(self, classes: int = 0) -> torch.Tensor:
        """uint8 (Y, X). Raises CorruptSampleError for what is no image of one value per pixel, and, unless `classes` is
        0, for values above it; 255 is no class either.

        Of a palette the indices are taken: the colours are only there to be looked at.
        """
        try:
            with Image.open(io.BytesIO(self.content)) as picture:
                if picture.mode not in ("L", "P"):
                    raise ValueError(f"mode {picture.mode}; a map has one value of 8 bits per pixel")
                values = np.array(picture)
        except Exception as error:  # PIL's readers raise whatever their parsing runs into
            raise CorruptSampleError(f"map of classes does not decode ({error})") from error
        if classes and (strange := np.setdiff1d(values[values > classes], [255])).size:
            raise CorruptSampleError(f"map of classes has the value {strange[0]}, and there are {classes} classes")
        return torch.from_numpy(values)


def decode(content: bytes) -> torch.Tensor:
    """An encoded image as uint8 (3, Y, X): grey is repeated, alpha and later frames are dropped.

    Raises CorruptSampleError for bytes that are no image.

    torchvision's decoder gives the values of PIL's, and sooner; PIL knows the formats that it does not. Both refuse a
    truncated JPEG instead of filling it up with grey. torchvision 0.29 announces that its decoder will move to another
    package: then PIL's lines alone are correct, only slower.
    """
    try:
        image = decode_image(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except (RuntimeError, ValueError):
        try:
            with Image.open(io.BytesIO(content)) as picture:
                return F.pil_to_tensor(_eight_bits(picture).convert("RGB"))
        except Exception as error:  # PIL's readers raise whatever their parsing runs into
            raise CorruptSampleError(f"image does not decode ({error})") from error
    if image.dtype != torch.uint8:
        image = F.to_dtype(image, torch.uint8, scale=True)  # 16-bit PNG
    return image[0] if image.ndim == 4 else image  # first frame of a GIF


def _eight_bits(picture: Image.Image) -> Image.Image:
    """PIL would clip wider grey values to 255: 16 bits are scaled down, values without a known range are refused."""
    if picture.mode in ("I", "F"):
        raise ValueError(f"grey values of mode {picture.mode} have no known range; store 8 or 16 bits")
    return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)) if picture.mode.startswith("I;16") else picture
