"""Photographs and handwritten digits set in motion, as videos in the layout of Kinetics: the class is how they move.

In half of the videos all of a photograph moves, in the others a digit in front of a photograph that stands still.
Place, size and angle at half time, when all motions are at the same point, are drawn alike for all classes, so no
single frame tells the class; nor does any frame where a motion and its opposite are concerned, which show the same
pictures in reverse. Training and validation have other photographs and other digits.
"""

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from swinv2_scale.data import demo
from swinv2_scale.data.images import decode
from swinv2_scale.data.videos import encode

COUNTS = {"training": 1200, "validation": 320}
FRAMES, RATE, EDGE = 24, 12, 64  # frames of a video, frames a second, pixels
_SPLITS = {"training": "train", "validation": "validation"}  # as demo.py calls them
_SHIFT, _ANGLE, _ZOOM = 36.0, 150.0, 2.5  # pixels, degrees and factor, from the first frame to the last
_TRIES, _CONTRAST = 20, 30.0  # draws of a part of a photograph, and the spread of its pixels that is enough


class Motion(NamedTuple):
    """What changes from the first frame to the last, in units of _SHIFT, _ANGLE and log _ZOOM."""

    right: float = 0.0
    down: float = 0.0
    clockwise: float = 0.0
    closer: float = 0.0


MOTIONS = {
    "moving left": Motion(right=-1.0),
    "moving right": Motion(right=1.0),
    "moving up": Motion(down=-1.0),
    "moving down": Motion(down=1.0),
    "turning clockwise": Motion(clockwise=1.0),
    "turning counterclockwise": Motion(clockwise=-1.0),
    "coming closer": Motion(closer=1.0),
    "going away": Motion(closer=-1.0),
}


def write_tree(root: Path, numbers: dict[str, int] | None = None) -> None:
    """Write root/SPLIT/ID_START_END.mp4 and Kinetics' table of them, root/SPLIT.csv.

    numbers: of videos per split, COUNTS by default. Raises ValueError when there is such a table already.
    """
    for split, number in (numbers or COUNTS).items():
        table = root / f"{split}.csv"
        if table.exists():
            raise ValueError(f"{root} holds videos already: remove it, or choose another directory")
        (root / split).mkdir(parents=True, exist_ok=True)
        rows = []
        for index, (label, frames) in enumerate(videos(split, number)):
            name = f"motion-{split}-{index:04d}"
            content = encode(frames, [frame / RATE for frame in range(FRAMES)])
            (root / split / f"{name}_{0:06d}_{FRAMES // RATE:06d}.mp4").write_bytes(content)
            rows.append([label, name, 0, FRAMES // RATE, split])
        with table.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["label", "youtube_id", "time_start", "time_end", "split"], *rows])


def videos(split: str, number: int | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Class and frames, uint8 (FRAMES, EDGE, EDGE, 3), of the first videos of "training" or "validation".

    number: COUNTS by default. The same on every machine. Raises ValueError for other splits, and without the packages
    that the pictures come from.
    """
    if split not in _SPLITS:
        raise ValueError(f"the videos have no part {split!r}; choose one of {', '.join(_SPLITS)}")
    paths = demo.photograph_files().values()
    photographs = []
    for path in [path for n, path in enumerate(paths) if (n % 4 == 2) == (split != "training")]:
        with Image.open(path) as picture:
            photographs.append(picture.convert("RGB"))
    digits = [decode(bytes(item.members["png"]))[0].numpy() for item in demo.digits(_SPLITS[split])[1]]
    random = np.random.Generator(np.random.Philox([1, len(split)]))
    for index in range(COUNTS[split] if number is None else number):
        name = list(MOTIONS)[index % len(MOTIONS)]
        photograph = photographs[int(random.integers(len(photographs)))]
        digit = digits[int(random.integers(len(digits)))] if index // len(MOTIONS) % 2 else None
        yield name, _frames(MOTIONS[name], photograph, digit, random)


def _frames(
    motion: Motion, photograph: Image.Image, digit: np.ndarray | None, random: np.random.Generator
) -> np.ndarray:
    """A video; of a photograph that moves where there is no digit."""
    reach = EDGE * math.sqrt(_ZOOM / 2) + _SHIFT / 2  # pixels around a photograph's centre that may be seen
    for _ in range(_TRIES):
        shrink = random.uniform(0.5, 1.0) * (min(photograph.size) / 2 - 1) / reach
        centre = [random.uniform(shrink * reach, length - shrink * reach) for length in photograph.size]
        still = _seen(photograph, centre, shrink, 0.0, (0.0, 0.0))
        if np.asarray(still).std() >= _CONTRAST:
            break
    angle = random.uniform(0, 360) if digit is not None else random.uniform(-20, 20)
    place = random.uniform(-8, 8, 2) if digit is not None else np.zeros(2)
    size = random.uniform(0.8, 1.25)
    if digit is not None:
        ink = Image.fromarray(digit).resize((EDGE // 2, EDGE // 2), Image.Resampling.BICUBIC)
        glyph = Image.new("L", (2 * EDGE, 2 * EDGE))
        glyph.paste(ink, (EDGE * 3 // 4, EDGE * 3 // 4))
        dark = np.asarray(still).mean() > 127
        colour = Image.new("RGB", (EDGE, EDGE), tuple(int(v) for v in random.integers(0, 60, 3) + 195 * (not dark)))
    frames = []
    for number in range(FRAMES):
        share = number / (FRAMES - 1) - 0.5
        scale = size * _ZOOM ** (share * motion.closer)
        offset = (place[0] + _SHIFT * share * motion.right, place[1] + _SHIFT * share * motion.down)
        turned = angle + _ANGLE * share * motion.clockwise
        if digit is None:
            frames.append(np.asarray(_seen(photograph, centre, shrink / scale, turned, offset)))
        else:
            mask = _seen(glyph, [EDGE, EDGE], 1 / scale, turned, offset)
            frames.append(np.asarray(Image.composite(colour, still, mask)))
    return np.stack(frames)


def _seen(
    picture: Image.Image, centre: list[float], pixels: float, clockwise: float, offset: tuple[float, float]
) -> Image.Image:
    """EDGE x EDGE of a picture whose `centre` has come to the middle of the frame plus `offset`, turned by degrees.

    pixels: of the picture to one of the frame.
    """
    cosine = pixels * math.cos(math.radians(clockwise))
    sine = pixels * math.sin(math.radians(clockwise))
    x, y = EDGE / 2 + offset[0], EDGE / 2 + offset[1]
    matrix = (cosine, sine, centre[0] - cosine * x - sine * y, -sine, cosine, centre[1] + sine * x - cosine * y)
    return picture.transform((EDGE, EDGE), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
