"""Clips: which frames they take at any rate and length, and that what is drawn is drawn once for all of them."""

from typing import Any

import numpy as np
import pytest
import torch

from swinv2_scale.data.clips import ClipEvaluationTransform, ClipTransform, frame_numbers
from swinv2_scale.data.transforms import Mix

SAMPLED = {"frames": 4, "sampling": "uniform", "interval": 2, "shuffled": False, "image_size": 32}
AUGMENTED = {
    **SAMPLED,
    **{"crop_scale": [0.3, 1.0], "crop_ratio": [0.75, 1.33], "flip": 0.5, "interpolation": "bicubic"},
    **{"randaugment_ops": 2, "randaugment_magnitude": 9, "erase_probability": 1.0},
}


class Film:
    """Frames of given pixels, or of their own number."""

    def __init__(self, number: int, pixels: torch.Tensor | None = None) -> None:
        self.times = np.arange(number) / 25
        self.pixels = pixels

    def frames(self, numbers: list[int]) -> torch.Tensor:
        if self.pixels is not None:
            return self.pixels.expand(len(numbers), -1, -1, -1).clone()
        return torch.tensor(numbers, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 32, 64).clone()


def evaluated(film: Film, **changes: Any) -> torch.Tensor:
    settings = {**SAMPLED, "views": 1, "crops": 1, "resize": 1.0, "interpolation": "bilinear", **changes}
    return ClipEvaluationTransform(**settings)({"image": film})["image"]


def shown(clip: torch.Tensor) -> list[int]:
    """Numbers of the frames of a Film's clip (3, T, Y, X)."""
    return (255 * (0.229 * clip[0, :, 0, 0] + 0.485)).round().int().tolist()


def test_dense_clips_are_frames_of_an_interval() -> None:
    times = np.arange(100) / 29.97
    for where in np.linspace(0, 1, 41):
        numbers = frame_numbers(times, 8, "dense", 4, where)
        assert np.diff(numbers).tolist() == [4] * 7, where
    assert frame_numbers(times, 8, "dense", 4, 0.0)[0] == 0 and frame_numbers(times, 8, "dense", 4, 1.0)[-1] == 99


def test_uniform_clips_are_spread_over_the_video() -> None:
    times = np.arange(80) / 25
    assert frame_numbers(times, 8, "uniform", 1, 0.0) == list(range(0, 80, 10))
    assert frame_numbers(times, 8, "uniform", 1, 0.5) == list(range(5, 80, 10))
    assert frame_numbers(times, 8, "uniform", 1, 0.99) == list(range(9, 80, 10))


def test_short_videos_stand_still_at_their_end() -> None:
    assert frame_numbers(np.arange(5) / 25, 8, "dense", 2, 0.7) == [0, 2, 4, 4, 4, 4, 4, 4]
    assert frame_numbers(np.arange(4) / 25, 8, "uniform", 1, 0.0) == [0, 0, 1, 1, 2, 2, 3, 3]
    for sampling in ("dense", "uniform"):
        assert frame_numbers(np.zeros(1), 3, sampling, 8, 0.5) == [0, 0, 0]


def test_variable_rates_keep_their_speed() -> None:
    """Ten frames a second, then one a second: a clip has equal steps in time, and slow frames are seen longer."""
    times = np.array([*np.arange(0, 2, 0.1), *np.arange(2, 12, 1.0)])
    numbers = frame_numbers(times, 6, "uniform", 1, 0.0)
    moments = np.arange(6) * len(times) * times[-1] / (len(times) - 1) / 6
    assert [times[n] <= m + 0.004 for n, m in zip(numbers, moments, strict=True)] == [True] * 6
    assert all(times[n + 1] > m for n, m in zip(numbers[:-1], moments, strict=False))


@pytest.mark.parametrize("seed", range(12))
def test_what_is_drawn_is_drawn_once_for_all_frames(seed: int) -> None:
    pixels = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    clip = ClipTransform(**AUGMENTED)({"image": Film(50, pixels), "key": "x"})["image"]
    assert clip.shape == (3, 4, 32, 32) and clip.dtype == torch.float32 and clip.is_contiguous()
    assert all(torch.equal(clip[:, 0], clip[:, frame]) for frame in range(1, 4))
    torch.manual_seed(seed + 1)
    assert not torch.equal(clip, ClipTransform(**AUGMENTED)({"image": Film(50, pixels)})["image"])


def test_views_and_crops() -> None:
    film = Film(32)
    assert shown(evaluated(film)[0]) == [4, 12, 20, 28]
    assert [shown(view) for view in evaluated(film, views=2)] == [[2, 10, 18, 26], [6, 14, 22, 30]]
    dense = evaluated(film, sampling="dense", views=3)
    assert [shown(view) for view in dense] == [[0, 2, 4, 6], [12, 14, 16, 18], [25, 27, 29, 31]]
    columns = torch.arange(64, dtype=torch.uint8).expand(3, 32, 64)
    views = evaluated(Film(9, columns), crops=3, views=2)
    assert views.shape == (6, 3, 4, 32, 32)
    assert [shown(view)[0] for view in views] == [0, 16, 32] * 2
    assert shown(evaluated(Film(9, columns.transpose(1, 2)), crops=5)[4])[0] == 32
    assert evaluated(Film(9, columns), resize=1.25).shape == (1, 3, 4, 32, 32)


def test_shuffled_frames_are_the_same_frames() -> None:
    torch.manual_seed(0)
    found = [shown(evaluated(Film(32), shuffled=True)[0]) for _ in range(8)]
    assert all(sorted(numbers) == [4, 12, 20, 28] for numbers in found) and len(set(map(tuple, found))) > 2


def test_clips_are_mixed_as_images_are() -> None:
    mix = Mix(
        **{"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "probability": 1.0, "switch_probability": 0.5},
        **{"label_smoothing": 0.0, "num_classes": 2},
    )
    clips = [torch.full((3, 4, 8, 8), float(label)) for label in (0, 1)]
    for number in range(6):
        batch = mix([{"image": clip, "label": n, "draw": number, "key": ""} for n, clip in enumerate(clips)])
        assert torch.allclose(batch["image"].mean(dim=(1, 2, 3, 4)), batch["target"][:, 1], atol=1e-6)
        assert (batch["image"] == batch["image"][:, :, :1]).all()  # one box for all frames


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": None}, "choose model=video_b"),
        ({"sampling": "random"}, "sampling 'random' is not one of uniform, dense"),
        ({"interval": 0}, "interval=0 must be positive"),
        ({"views": 0}, "views=0, crops=1 and resize=1.0 must be 1 or more"),
    ],
)
def test_numbers_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluated(Film(4), **changes)
