"""Transforms and collation: shapes, mask counts, where randomness comes from, and soft targets."""

import random
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from torchvision.io import encode_png
from torchvision.transforms import functional as v1

from swinv2_scale.data.images import EncodedImage
from swinv2_scale.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ClassificationTransform,
    EvaluationTransform,
    Mix,
    SimMIMEvaluationTransform,
    SimMIMTransform,
    collate,
    random_mask,
)

CROP = {"crop_scale": [0.67, 1.0], "crop_ratio": [0.75, 4 / 3], "flip": 0.5}
CLASSIFICATION = {
    **CROP,
    "image_size": 64,
    "interpolation": "bicubic",
    "randaugment_ops": 2,
    "randaugment_magnitude": 9,
    "erase_probability": 0.5,
}
MIX = {
    "mixup_alpha": 0.8,
    "cutmix_alpha": 1.0,
    "probability": 1.0,
    "switch_probability": 0.5,
    "label_smoothing": 0.1,
    "num_classes": 5,
}


def encoded(pixels: torch.Tensor) -> EncodedImage:
    """A PNG of uint8 (3, Y, X)."""
    return EncodedImage(encode_png(pixels.contiguous()).numpy().tobytes())


def sample(number: int = 0) -> dict[str, Any]:
    pixels = np.random.default_rng(number).integers(0, 256, (3, 70, 90), dtype=np.uint8)
    return {
        "image": encoded(torch.from_numpy(pixels)),
        "label": number % 5,
        "key": f"k{number}",
        "draw": number,
        "corrupt": [],
    }


def simmim(**changes: Any) -> SimMIMTransform:
    return SimMIMTransform(**{**CROP, "image_size": 192, "mask_unit": 32, "mask_ratio": 0.6, **changes})


def test_simmim_masks_22_of_36_units_at_192_pixels():
    made = simmim()(sample())
    assert made["image"].shape == (3, 192, 192) and made["image"].dtype == torch.float32
    assert made["mask"].shape == (48, 48) and made["mask"].dtype == torch.bool
    units = made["mask"].view(6, 8, 6, 8).float().mean((1, 3))
    assert set(units.unique().tolist()) == {0.0, 1.0}, "a unit is masked as a whole or not at all"
    assert units.sum() == 22
    evaluation = SimMIMEvaluationTransform(image_size=192, mask_unit=32, mask_ratio=0.6)(sample())
    assert evaluation["image"].shape == (3, 192, 192) and evaluation["mask"].sum() == 22 * 64


def test_every_unit_is_masked_equally_often():
    torch.manual_seed(0)
    share = torch.stack([random_mask(64, 16, 0.5) for _ in range(2000)]).float().mean(0)
    assert (share - 0.5).abs().max() < 0.06


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 200}, r"image_size 200 is not a multiple of mask_unit 32; take 192 or 224"),
        ({"mask_ratio": 1.0}, r"mask_ratio 1.0 is not between 0 and 1"),
        ({"mask_ratio": 0}, r"mask_ratio 0 is not between 0 and 1"),
        ({"mask_unit": 6}, r"mask_unit 6 is not a positive multiple of the patch of 4"),
    ],
)
def test_masks_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        simmim(**changes)


@pytest.mark.parametrize("transform", [simmim(), ClassificationTransform(**CLASSIFICATION)])
def test_all_randomness_is_that_of_torchs_default_generator(transform):
    def made(seed: int, *others: int) -> list[torch.Tensor]:
        random.seed(others[0])
        np.random.seed(others[1])
        results = []
        for number in range(20):
            torch.manual_seed(1000 * seed + number)
            results.append(transform(sample(number))["image"])
        return results

    assert all(torch.equal(a, b) for a, b in zip(made(0, 1, 2), made(0, 3, 4), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(made(0, 1, 2), made(1, 1, 2), strict=True))


def test_classification_off_switches_leave_a_plain_crop():
    off = {
        "randaugment_ops": 0,
        "erase_probability": 0.0,
        "flip": 0.0,
        "crop_scale": (1, 1),
        "crop_ratio": (9 / 7, 9 / 7),
    }
    whole = ClassificationTransform(**{**CLASSIFICATION, **off})(sample())["image"]
    expected = torch.nn.functional.interpolate(
        sample()["image"].pixels()[None].float(), size=(64, 64), mode="bicubic", antialias=True, align_corners=False
    )[0].clamp(0, 255)
    pixels = (whole * torch.tensor(IMAGENET_STD)[:, None, None] + torch.tensor(IMAGENET_MEAN)[:, None, None]) * 255
    assert (pixels - expected).abs().mean() < 1  # the transform rounds to uint8 after each axis


def test_erasing_fills_with_noise_per_pixel():
    torch.manual_seed(0)
    plain = {"randaugment_ops": 0, "flip": 0.0, "erase_probability": 1.0}
    flat = {**sample(), "image": encoded(torch.full((3, 70, 90), 128, dtype=torch.uint8))}
    image = ClassificationTransform(**{**CLASSIFICATION, **plain})(flat)["image"]
    background = image[0].flatten().mode().values
    noise = image[0][image[0] != background]
    assert 0.02 * 64**2 * 0.9 < len(noise) < 64**2 / 3 * 1.1
    assert len(noise.unique()) > 0.9 * len(noise)


def test_magnitude_nine_is_nine_tenths_of_the_range():
    from torchvision.transforms import v2

    transform = ClassificationTransform(**CLASSIFICATION)
    (augment,) = (step for step in transform.image.transforms if isinstance(step, v2.RandAugment))
    angles, _ = augment._AUGMENTATION_SPACE["Rotate"]
    assert float(angles(augment.num_magnitude_bins, 64, 64)[augment.magnitude]) == pytest.approx(0.9 * 30)
    with pytest.raises(ValueError, match="randaugment_magnitude 11 is not one of 0 to 10"):
        ClassificationTransform(**{**CLASSIFICATION, "randaugment_magnitude": 11})


def test_evaluation_crops_the_centre_of_the_resized_image():
    striped = torch.zeros(3, 70, 140, dtype=torch.uint8)
    striped[:, :, 35:105] = 255  # the middle square
    made = EvaluationTransform(image_size=70, crop=True, interpolation="bicubic")(
        {**sample(), "image": encoded(striped)}
    )
    white = (1 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    assert torch.allclose(made["image"], white[:, None, None].expand(3, 70, 70))
    with pytest.raises(ValueError, match="interpolation 'cubic' is not one of bilinear, bicubic"):
        EvaluationTransform(image_size=64, crop=None, interpolation="cubic")


@pytest.mark.parametrize(
    ("size", "crop", "resize"),
    [
        (224, None, [256]),
        (256, None, [292]),
        (384, None, [384, 384]),
        (384, True, [438]),
        (256, False, [256, 256]),
    ],
)
def test_evaluation_is_the_released_one_in_pil_to_a_level_of_255(size, crop, resize):
    """Against torchvision's PIL backend, which the released code uses, on photographs of two shapes."""
    transform = EvaluationTransform(image_size=size, crop=crop, interpolation="bicubic")
    assert transform.resize == resize
    for name in ("astronaut", "chelsea"):
        pixels = getattr(skimage.data, name)()
        picture = v1.resize(Image.fromarray(pixels), resize, v1.InterpolationMode.BICUBIC)
        expected = v1.pil_to_tensor(v1.center_crop(picture, [size, size])).float()
        made = transform({**sample(), "image": encoded(torch.from_numpy(pixels).permute(2, 0, 1))})["image"]
        mean, std = torch.tensor(IMAGENET_MEAN)[:, None, None], torch.tensor(IMAGENET_STD)[:, None, None]
        difference = ((made * std + mean) * 255 - expected).abs()
        assert difference.max() < 2.01
        assert (difference > 0.01).float().mean() < 0.01


def constant(number: int, size: int = 40) -> dict[str, Any]:
    """A sample whose pixels all are its number, so that pixels tell where they come from."""
    return {**sample(number), "image": torch.full((3, size, size), float(number))}


def test_collate_keeps_everything():
    batch = collate([{**constant(1), "corrupt": ["a"]}, {**constant(2), "corrupt": []}])
    assert batch["image"].shape == (2, 3, 40, 40) and batch["label"].tolist() == [1, 2]
    assert batch["key"] == ["k1", "k2"] and batch["corrupt"] == ["a"]
    assert batch["label"].dtype == batch["draw"].dtype == torch.int64


def test_cutmix_targets_weigh_what_the_pixels_show():
    mix = Mix(**{**MIX, "mixup_alpha": 0.0, "label_smoothing": 0.0})
    weights = []
    for first in range(0, 400, 2):
        pair = [constant(first), constant(first + 1)]
        batch = mix(pair)
        for row, number in enumerate((first, first + 1)):
            own = (batch["image"][row] == number).float().mean().item()
            assert batch["target"][row, number % 5].item() == pytest.approx(own, abs=1e-6)
            assert batch["target"][row].sum().item() == pytest.approx(1)
            weights.append(own)
    assert 0.6 < np.mean(weights) < 0.75 and np.std(weights) > 0.1  # above 0.5: boxes are clipped at the border


def test_mixup_blends_pixels_and_targets_alike():
    mix = Mix(**{**MIX, "cutmix_alpha": 0.0, "label_smoothing": 0.0})
    batch = mix([constant(number) for number in range(4)])
    for row, other in ((0, 1), (1, 0), (2, 3), (3, 2)):
        own, partner = batch["target"][row, row].item(), batch["target"][row, other].item()
        assert own + partner == pytest.approx(1) and 0 < own < 1
        assert torch.allclose(batch["image"][row], torch.tensor(own * row + partner * other), atol=1e-5)


def test_both_mixes_and_none_occur_as_often_as_asked():
    mix = Mix(**{**MIX, "probability": 0.6, "switch_probability": 0.5, "label_smoothing": 0.0})
    kinds = {"none": 0, "cutmix": 0, "mixup": 0}
    for first in range(0, 2000, 2):
        image = mix([constant(first, 8), constant(first + 1, 8)])["image"][0, 0]
        integers = bool((image == image.round()).all())
        kinds["mixup" if not integers else "none" if bool((image == first).all()) else "cutmix"] += 1
    assert 380 <= kinds["none"] <= 560  # 400, and the CutMix boxes of less than a pixel
    assert 200 <= kinds["cutmix"] <= 340 and 260 <= kinds["mixup"] <= 340


def test_label_smoothing_alone():
    batch = Mix(**{**MIX, "mixup_alpha": 0.0, "cutmix_alpha": 0.0})([constant(number) for number in range(3)])
    assert torch.allclose(batch["target"][1], torch.tensor([0.02, 0.92, 0.02, 0.02, 0.02]))
    assert torch.equal(batch["image"][1], torch.full((3, 40, 40), 1.0))


def test_soft_targets_sum_to_one_and_do_not_depend_on_how_pairs_are_batched():
    mix = Mix(**MIX)
    samples = [sample(number) | {"image": torch.rand(3, 16, 16)} for number in range(8)]
    whole = mix(samples)
    assert torch.allclose(whole["target"].sum(1), torch.ones(8))
    parts = [mix(samples[begin:end]) for begin, end in ((0, 2), (2, 6), (6, 8))]
    assert torch.equal(whole["image"], torch.cat([part["image"] for part in parts]))
    assert torch.equal(whole["target"], torch.cat([part["target"] for part in parts]))


def test_odd_micro_batches_and_foreign_labels():
    with pytest.raises(ValueError, match=r"has 3 samples; choose an even micro-batch"):
        Mix(**MIX)([constant(number) for number in range(3)])
    with pytest.raises(ValueError, match=r"sample k0 has label 5, outside of num_classes=5"):
        Mix(**MIX)([{**constant(0), "label": 5}, constant(1)])
    with pytest.raises(ValueError, match=r"label -1"):
        Mix(**MIX)([constant(1), {**constant(0), "label": -1}])
