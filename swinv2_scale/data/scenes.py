"""Photographs with handwritten digits on them: real pixels for detection and segmentation, with exact annotations.

The photographs are scikit-image's and scikit-learn's, the digits scikit-learn's, each enlarged from 8 x 8 pixels,
painted in a light colour with a dark rim at a random place. Training and validation have other photographs and other
digits. A pixel, of rim or ink, belongs to the digit that was painted on it last: annotations are exact before JPEG.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from swinv2_scale.data import demo
from swinv2_scale.data.images import decode

CLASSES = [f"digit {number}" for number in range(10)]
BACKGROUND = "photograph"  # of a semantic map: the class after the digits
COUNTS = {"training": 4000, "validation": 100}
_SPLITS = {"training": "train", "validation": "validation"}  # as demo.py calls them
_EDGES = (112, 161)  # pixels of a scene's sides, the second excluded
_DIGITS = (2, 5)  # of a scene, the second excluded
_SIZES = (40, 65)  # pixels of a digit's square before it is cut to its ink, the second excluded
_RIM = 3  # pixels around the ink
_LIGHT = (200, 256)  # each channel of the ink, the second excluded
_INK = 0.45  # of an enlarged digit's 0 … 1, from which on a pixel is painted
_VISIBLE = 0.8  # the share of a digit that must not be painted over, or else the new one goes elsewhere


class Scene(NamedTuple):
    """image uint8 (Y, X, 3); for each of N digits: label int64 (N,), mask bool (N, Y, X) of what is visible of it, box
    float64 (N, 4) around that, left, top, right, bottom in pixels, the last two excluded."""

    image: np.ndarray
    labels: np.ndarray
    masks: np.ndarray
    boxes: np.ndarray

    def semantic(self) -> np.ndarray:
        """uint8 (Y, X) as ADE20K stores maps: 1 … 10 for digits 0 … 9, 11 for the photograph."""
        values = np.full(self.image.shape[:2], len(CLASSES) + 1, np.uint8)
        for label, mask in zip(self.labels, self.masks, strict=True):
            values[mask] = label + 1
        return values


def scenes(split: str, number: int | None = None) -> Iterator[Scene]:
    """The first `number` scenes of "training" or "validation", all COUNTS by default; the same on every machine.

    Raises ValueError for other splits, and without the packages that the pictures come from.
    """
    if split not in _SPLITS:
        raise ValueError(f"the scenes have no part {split!r}; choose one of {', '.join(_SPLITS)}")
    photographs = [
        _opened(path)
        for n, path in enumerate(demo.photograph_files().values())
        if (n % 4 == 2) == (split != "training")
    ]
    _, items = demo.digits(_SPLITS[split])
    glyphs = [decode(bytes(item.members["png"]))[0].numpy() / 255.0 for item in items]
    labels = [item.label for item in items]
    random = np.random.Generator(np.random.Philox([0, len(split)]))
    for index in range(COUNTS[split] if number is None else number):
        background = _background(photographs[index % len(photographs)], random)
        yield _painted(background, glyphs, np.array(labels), random)


def write_tree(root: Path, numbers: dict[str, int] | None = None) -> None:
    """Write scenes as a tree like ADEChallengeData2016: images, annotations, objectInfo150.txt (with 11 classes); and
    beside the images of each split COCO's annotation file, images/instances_SPLIT.json, with masks as RLE.

    numbers: of scenes per split, COUNTS by default. Raises ValueError when there is such a tree already.
    """
    if (root / "images").exists():
        raise ValueError(f"{root} holds images already: remove it, or choose another directory")
    for split, number in (numbers or COUNTS).items():
        images, maps = root / "images" / split, root / "annotations" / split
        images.mkdir(parents=True)
        maps.mkdir(parents=True)
        objects = _Objects()
        for index, scene in enumerate(scenes(split, number)):
            name = f"scene_{split}_{index:05d}"
            objects.add(index, f"{name}.jpg", scene)
            Image.fromarray(scene.image).save(images / f"{name}.jpg", quality=95, subsampling=0)
            Image.fromarray(scene.semantic()).save(maps / f"{name}.png")
        (root / "images" / f"instances_{split}.json").write_text(json.dumps(objects.content))
    names = [f"{number}\t-\t-\t-\t-\t{name}" for number, name in enumerate([*CLASSES, BACKGROUND], 1)]
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *names]) + "\n")


class _Objects:
    """`content` of a COCO annotation file. Digit n has the category id n + 1."""

    def __init__(self) -> None:
        self.content: dict[str, Any] = {"images": [], "annotations": []}
        self.content["categories"] = [{"id": number, "name": name} for number, name in enumerate(CLASSES, 1)]

    def add(self, number: int, file: str, scene: Scene) -> None:
        rows, columns = scene.image.shape[:2]
        self.content["images"].append({"id": number, "file_name": file, "width": columns, "height": rows})
        for label, mask, (left, top, right, bottom) in zip(scene.labels, scene.masks, scene.boxes, strict=True):
            self.content["annotations"].append(
                {
                    "id": len(self.content["annotations"]) + 1,
                    "image_id": number,
                    "category_id": int(label) + 1,
                    "bbox": [float(left), float(top), float(right - left), float(bottom - top)],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": {"size": [rows, columns], "counts": _runs(mask)},
                }
            )


def _runs(mask: np.ndarray) -> list[int]:
    """Lengths of the runs of a mask (Y, X), column by column, the first of what is not in it: COCO's plain RLE."""
    values = mask.T.flatten()
    edges = np.flatnonzero(np.diff(values, prepend=False)).tolist()
    return np.diff([0, *edges, values.size]).tolist()


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


def _background(photograph: Image.Image, random: np.random.Generator) -> np.ndarray:
    """A random part of a photograph at half its size or more, uint8 (Y, X, 3)."""
    shrink = random.uniform(1.0, 2.0)
    height, width = (int(edge) for edge in random.integers(*_EDGES, size=2))
    shrink = min(shrink, photograph.height / height, photograph.width / width)
    across, down = int(width * shrink), int(height * shrink)
    left = int(random.integers(photograph.width - across + 1))
    top = int(random.integers(photograph.height - down + 1))
    part = photograph.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, left + across, top + down))
    return np.array(part)


def _painted(image: np.ndarray, glyphs: list[np.ndarray], classes: np.ndarray, random: np.random.Generator) -> Scene:
    """A photograph with digits painted on it, in its place."""
    masks: list[np.ndarray] = []
    full: list[int] = []  # pixels of each digit before others covered it
    labels: list[int] = []
    for _ in range(int(random.integers(*_DIGITS))):
        chosen = int(random.integers(len(glyphs)))
        ink = _enlarged(glyphs[chosen], int(random.integers(*_SIZES)))
        rows, columns = ink.shape
        if rows > image.shape[0] or columns > image.shape[1]:
            continue
        top = int(random.integers(image.shape[0] - rows + 1))
        left = int(random.integers(image.shape[1] - columns + 1))
        place = np.s_[top : top + rows, left : left + columns]
        mask = np.zeros(image.shape[:2], bool)
        mask[place] = _spread(ink)
        if any((own & ~mask).sum() < _VISIBLE * size for own, size in zip(masks, full, strict=True)):
            continue
        image[mask] //= 4
        image[place][ink] = random.integers(*_LIGHT, 3)
        masks = [own & ~mask for own in masks] + [mask]
        full.append(int(mask.sum()))
        labels.append(int(classes[chosen]))
    stacked = np.stack(masks) if masks else np.zeros((0, *image.shape[:2]), bool)
    return Scene(image, np.array(labels, np.int64), stacked, np.array([_box(mask) for mask in masks]).reshape(-1, 4))


def _enlarged(glyph: np.ndarray, size: int) -> np.ndarray:
    """The ink of a digit (8, 8) in a square of `size` pixels, bool, cut to where there is any and room for its rim."""
    grey = np.array(Image.fromarray(glyph.astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC))
    left, top, right, bottom = (int(edge) for edge in _box(grey >= _INK))
    return np.pad(grey[top:bottom, left:right] >= _INK, _RIM)


def _spread(ink: np.ndarray) -> np.ndarray:
    """Where there is ink within _RIM rows and columns, bool (Y, X)."""
    return np.array(Image.fromarray(ink.astype(np.uint8)).filter(ImageFilter.MaxFilter(2 * _RIM + 1))) > 0


def _box(mask: np.ndarray) -> tuple[float, float, float, float]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
