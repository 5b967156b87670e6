"""Decoding at reduced scale: as near to decoding whole as was said, and only where it may be."""

import io

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image, JpegImagePlugin
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from swinv2_scale.data import images
from swinv2_scale.data.images import CorruptSampleError, EncodedImage, decode
from swinv2_scale.data.transforms import RandomResizedCrop

LINEAR, CUBIC = v2.InterpolationMode.BILINEAR, v2.InterpolationMode.BICUBIC


def photograph(width: int, height: int, file_format: str = "JPEG", mode: str = "RGB") -> bytes:
    """A mosaic of photographs, finer than a photograph of that size would be."""
    tiles = [Image.fromarray(getattr(skimage.data, name)()) for name in ("astronaut", "coffee", "chelsea", "rocket")]
    mosaic = Image.new("RGB", (width, height))
    for number, (x, y) in enumerate((x, y) for y in range(0, height, 500) for x in range(0, width, 500)):
        mosaic.paste(tiles[number % 4].resize((500, 500)), (x, y))
    buffer = io.BytesIO()
    mosaic.convert(mode).save(buffer, file_format, quality=90)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def large() -> bytes:
    return photograph(4001, 2999)  # no multiples of 8


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The sizes that PIL decoded at."""
    found: list[tuple[int, int]] = []
    original = JpegImagePlugin.JpegImageFile.draft

    def draft(self, mode, size):
        answer = original(self, mode, size)
        found.append(self.size)
        return answer

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", draft)
    return found


@pytest.mark.parametrize("interpolation", [LINEAR, CUBIC])
@pytest.mark.parametrize(
    ("box", "scale"),
    [
        ((101, 203, 2801, 2903), 8),
        ((0, 0, 2999, 4001), 8),
        ((500, 900, 1601, 1601), 4),
        ((503, 901, 1001, 1103), 2),
        ((2311, 3303, 688, 698), 2),  # to the last row and column
    ],
)
def test_a_reduced_scale_is_as_good_as_decoding_whole(large, asked, box, scale, interpolation):
    whole = F.resized_crop(decode(large), *box, [192, 192], interpolation, antialias=True).float()
    made = EncodedImage(large).resized_crop(*box, size=[192, 192], interpolation=interpolation)
    assert asked == [(-(-4001 // scale), -(-2999 // scale))]  # each block gives 8 / scale pixels, also the last
    assert made.shape == (3, 192, 192) and made.dtype == torch.uint8
    difference = made.float() - whole
    assert difference.abs().mean() < 1.5  # levels of 255
    assert 10 * np.log10(255**2 / difference.square().mean()) > 39  # dB
    shifted = F.resized_crop(decode(large), box[0], box[1] - 2 * scale, *box[2:], [192, 192], interpolation).float()
    assert difference.square().mean() < 0.2 * (shifted - whole).square().mean() or box[1] == 0


def test_everything_else_is_decoded_whole(asked):
    for content, side in (
        (photograph(500, 400), 390),
        (photograph(1600, 1200, "PNG"), 1200),
        (photograph(1000, 800), 575),
    ):
        box = (0, 0, side, side)
        made = EncodedImage(content).resized_crop(*box, size=[192, 192], interpolation=LINEAR)
        assert torch.equal(made, F.resized_crop(decode(content), *box, [192, 192], LINEAR, antialias=True))
    assert asked == []


def test_the_rectangle_is_the_one_that_torchvision_draws():
    content = photograph(500, 400, "PNG")
    for seed in range(5):
        torch.manual_seed(seed)
        expected = v2.RandomResizedCrop(64, (0.1, 1.0))(decode(content))
        after = torch.rand(1)
        torch.manual_seed(seed)
        assert torch.equal(RandomResizedCrop(64, (0.1, 1.0))(EncodedImage(content)), expected)
        assert torch.equal(torch.rand(1), after)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_four_colours_become_rgb(mode, asked):
    content = photograph(2000, 1600, mode=mode)
    made = EncodedImage(content).resized_crop(0, 0, 1600, 1600, size=[192, 192], interpolation=LINEAR)
    with Image.open(io.BytesIO(content)) as picture:
        whole = picture.convert("RGB").crop((0, 0, 1600, 1600)).resize((192, 192), Image.Resampling.BILINEAR)
    assert len(asked) == 1
    assert (made.float() - F.pil_to_tensor(whole).float()).abs().mean() < 1.5


def test_what_is_damaged_is_corrupt_at_any_scale(large):
    box = (0, 0, 2999, 2999)
    assert RandomResizedCrop(192)(EncodedImage(large)).shape == (3, 192, 192)
    for content, cause in ((large[: len(large) // 2], "truncated"), (b"no image", "identify"), (b"", "identify")):
        with pytest.raises(CorruptSampleError, match=rf"image does not decode \(.*{cause}"):
            RandomResizedCrop(192)(EncodedImage(content))
        with pytest.raises(CorruptSampleError, match="image does not decode"):
            EncodedImage(content).resized_crop(*box, size=[192, 192], interpolation=LINEAR)
        with pytest.raises(CorruptSampleError, match="image does not decode"):
            EncodedImage(content).pixels()


def test_the_margin_is_what_the_bounds_were_measured_at():
    assert images.MARGIN == 1.5
