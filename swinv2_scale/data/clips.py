"""Videos -> clips, as training examples: which frames are taken, and what is done to all of them alike.

A sample has "image", an EncodedVideo; a transformed one has float32 (3, T, S, S), normalised, or (V, 3, T, S, S) of V
views. Frames are chosen by the times at which they are shown, so that speed is right at any and at variable frame
rate: T times at equal steps, at each the frame that is shown then. `sampling` says how far apart:

    uniform    1/T of the video: a clip is all of it
    dense      `interval` frames of mean duration. Where a video is shorter than that, its last frame stands still

As in transforms.py all randomness comes out of torch's default generator.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from swinv2_scale.data.transforms import Sample, augmentation, interpolation_mode, normalisation
from swinv2_scale.data.videos import EncodedVideo

SAMPLINGS = ("uniform", "dense")


class ClipTransform:
    """A clip at a random time: random crop, flip, RandAugment and erasing as ClassificationTransform has them.

    What is drawn is drawn once for all frames. Raises ValueError for numbers that make no sense.
    """

    def __init__(
        self,
        *,
        frames: int | None,
        sampling: str,
        interval: float,
        shuffled: bool,
        image_size: int,
        crop_scale: Sequence[float],
        crop_ratio: Sequence[float],
        flip: float,
        interpolation: str,
        randaugment_ops: int,
        randaugment_magnitude: int,
        erase_probability: float,
    ) -> None:
        self.frames = _checked(frames, sampling, interval)
        self.sampling, self.interval, self.shuffled = sampling, interval, shuffled
        crop = v2.RandomResizedCrop(
            image_size, tuple(crop_scale), tuple(crop_ratio), interpolation_mode(interpolation), antialias=True
        )
        self.clip = v2.Compose([crop, *augmentation(flip, randaugment_ops, randaugment_magnitude, erase_probability)])

    def __call__(self, sample: Sample) -> Sample:
        video: EncodedVideo = sample["image"]
        where = float(torch.rand(()))
        numbers = frame_numbers(video.times, self.frames, self.sampling, self.interval, where)
        clip = self.clip(tv_tensors.Video(video.frames(numbers))).as_subclass(Tensor).transpose(0, 1)
        return {**sample, "image": _in_order(clip, self.shuffled).contiguous()}


class ClipEvaluationTransform:
    """`views` clips at times spread over the video, each cut into `crops` squares spread over its long side, or
    over the diagonal of a square video.

    One view is that of the middle, one crop that of the centre. The short side is resized to `resize` x image_size.
    "image" becomes float32 (views x crops, 3, T, S, S).
    """

    def __init__(
        self,
        *,
        frames: int | None,
        sampling: str,
        interval: float,
        shuffled: bool,
        image_size: int,
        views: int,
        crops: int,
        resize: float,
        interpolation: str,
    ) -> None:
        if min(views, crops) < 1 or resize < 1:
            raise ValueError(f"views={views}, crops={crops} and resize={resize} must be 1 or more")
        self.frames = _checked(frames, sampling, interval)
        self.sampling, self.interval, self.shuffled = sampling, interval, shuffled
        self.image_size, self.views, self.crops = image_size, views, crops
        self.resize = v2.Resize(round(resize * image_size), interpolation_mode(interpolation), antialias=True)
        self.normalise = v2.Compose(normalisation())
        self.settings = {"image_size": image_size, "frames": frames, "sampling": sampling, "interval": interval}
        self.settings |= {"views": views, "crops": crops, "resize": resize, "interpolation": interpolation}
        self.settings |= {"shuffled": shuffled}

    def __call__(self, sample: Sample) -> Sample:
        video: EncodedVideo = sample["image"]
        spread = [(view + 0.5) / self.views for view in range(self.views)]
        if self.sampling == "dense" and self.views > 1:
            spread = [view / (self.views - 1) for view in range(self.views)]
        chosen = [frame_numbers(video.times, self.frames, self.sampling, self.interval, where) for where in spread]
        distinct = sorted({number for numbers in chosen for number in numbers})  # views may share frames
        place = {number: position for position, number in enumerate(distinct)}
        whole = self.normalise(self.resize(tv_tensors.Video(video.frames(distinct)))).as_subclass(Tensor)
        clips = []
        for numbers in chosen:
            clip = whole[[place[number] for number in numbers]].transpose(0, 1)
            clips += [_in_order(crop, self.shuffled) for crop in self._squares(clip)]
        return {**sample, "image": torch.stack(clips)}

    def _squares(self, clip: Tensor) -> list[Tensor]:
        """(3, T, Y, X) -> `crops` times (3, T, S, S)"""
        edge = self.image_size
        room = [length - edge for length in clip.shape[2:]]
        shares = [number / (self.crops - 1) for number in range(self.crops)] if self.crops > 1 else [0.5]
        corners = [
            [round((share if room[axis] == max(room) else 0.5) * room[axis]) for axis in (0, 1)] for share in shares
        ]
        return [clip[:, :, top : top + edge, left : left + edge] for top, left in corners]


def frame_numbers(times: np.ndarray, frames: int, sampling: str, interval: float, where: float) -> list[int]:
    """The numbers of the frames of a clip, of a video whose frames begin to be shown at `times` (seconds).

    where: 0 … 1, between the first clip that the video has and the last one.
    """
    mean = times[-1] / (len(times) - 1) if len(times) > 1 else 1.0
    duration = len(times) * mean
    step = duration / frames if sampling == "uniform" else interval * mean
    # A uniform clip begins within its first step; a dense one where its last frame is still the video's.
    room = step if sampling == "uniform" else max(0.0, duration - mean - (frames - 1) * step)
    moments = where * room + step * np.arange(frames)
    # Time stamps are rounded to the ticks of a file: a moment just before a frame belongs to it.
    shown = np.searchsorted(times, moments + 0.01 * mean, side="right") - 1
    return np.clip(shown, 0, len(times) - 1).tolist()


def _in_order(clip: Tensor, shuffled: bool) -> Tensor:
    """(3, T, Y, X), its frames in random order if wanted: what a model then knows, it knows without their order."""
    return clip[:, torch.randperm(clip.shape[1])] if shuffled else clip


def _checked(frames: int | None, sampling: str, interval: float) -> int:
    if frames is None:
        raise ValueError("clips need a model of clips: choose model=video_b, or another one with model.frames=8")
    if sampling not in SAMPLINGS:
        raise ValueError(f"sampling {sampling!r} is not one of {', '.join(SAMPLINGS)}")
    if interval <= 0:
        raise ValueError(f"interval={interval} must be positive: it is the distance of a clip's frames, in frames")
    return frames
