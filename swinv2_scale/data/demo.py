"""Real images that ship inside scikit-image and scikit-learn, so that the demonstrations download nothing.

    photographs   everyday photographs and textures, cut into tiles; the class is the photograph a tile comes from
    digits        1,797 handwritten digits of 8 x 8 pixels (E. Alpaydin, C. Kaynak, UCI repository, 1998)

Both are split by fixed rules, so that a held-out tile or digit is held out on every machine.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from swinv2_scale.data.folder import Item, one_file

SPLITS = ("train", "validation")
TILE = 128  # pixels; larger tiles leave the smallest photographs (451 x 300) with two of them

# Only files inside the wheels: scikit-image fetches its other pictures from the network.
_SKIMAGE = {
    **{name: f"{name}.png" for name in ("astronaut", "brick", "camera", "chelsea", "coffee", "coins")},
    **{name: f"{name}.png" for name in ("grass", "gravel", "moon")},
    "hubble_deep_field": "hubble_deep_field.jpg",
    "motorcycle": "motorcycle_left.png",
    "rocket": "rocket.jpg",
}
_SKLEARN = {"china": "china.jpg", "flower": "flower.jpg"}


def samples(name: str) -> tuple[list[str], list[Item]]:
    """Classes and samples of `photographs/train`, `photographs/validation`, `digits/train` or `digits/validation`.

    `photographs/four` are four of the second.
    """
    if name == "photographs/four":  # a batch, for a model too large for more
        classes, items = photographs("validation")
        return classes, items[:: len(items) // 4][:4]
    sources = {"photographs": photographs, "digits": digits}
    kind, _, split = name.partition("/")
    if kind not in sources or split not in SPLITS:
        valid = ", ".join(f"{kind}/{split}" for kind in sources for split in SPLITS)
        raise ValueError(f"the demonstration data have no part {name!r}; choose one of {valid}")
    return sources[kind](split)


def photographs(split: str) -> tuple[list[str], list[Item]]:
    """RGB tiles of `TILE` x `TILE` pixels as JPEG; no pixel is in both splits."""
    files = photograph_files()
    items = []
    for label, (name, path) in enumerate(files.items()):
        with Image.open(path) as image:
            photograph = image.convert("RGB")
        for left, top in tile_corners(photograph.width, photograph.height, split):
            tile = photograph.crop((left, top, left + TILE, top + TILE))
            content = _encode(tile, "JPEG", quality=95, subsampling=0)
            items.append(one_file(f"{name}/{top:04d}-{left:04d}", "jpg", label, content))
    return list(files), items


def photograph_files() -> dict[str, Path]:
    """Name and path of each photograph, sorted by name."""
    skimage, sklearn = _packages()
    files = {name: skimage / "data" / file for name, file in _SKIMAGE.items()}
    files |= {name: sklearn / "datasets" / "images" / file for name, file in _SKLEARN.items()}
    return dict(sorted(files.items()))


def tile_corners(width: int, height: int, split: str) -> list[tuple[int, int]]:
    """(left, top) of the tiles of a photograph that belong to `split`: every fifth of a centred grid is validation."""
    columns, rows = width // TILE, height // TILE
    left, top = (width - columns * TILE) // 2, (height - rows * TILE) // 2
    corners = [(left + column * TILE, top + row * TILE) for row in range(rows) for column in range(columns)]
    held_out = split == "validation"
    return [corner for number, corner in enumerate(corners) if (number % 5 == 2) == held_out]


def digits(split: str) -> tuple[list[str], list[Item]]:
    """8 x 8 grey PNGs (values 0 … 16 scaled to 0 … 255); 20 % of each class are held out, drawn once and for all."""
    _packages()
    from sklearn.datasets import load_digits

    data = load_digits()
    classes = [str(digit) for digit in range(10)]
    rank = np.empty(len(data.target), dtype=np.int64)  # position of a digit in its class, shuffled
    bits = np.random.Philox(0).random_raw(len(data.target))
    for label in range(10):
        members = np.flatnonzero(data.target == label)
        rank[members[np.argsort(bits[members], kind="stable")]] = np.arange(len(members))
    held_out = rank < np.round(0.2 * np.bincount(data.target))[data.target]
    items = []
    for index in np.flatnonzero(held_out == (split == "validation")):
        pixels = np.round(data.images[index] * (255 / 16)).astype(np.uint8)
        items.append(
            one_file(f"digit-{index:04d}", "png", int(data.target[index]), _encode(Image.fromarray(pixels), "PNG"))
        )
    return classes, items


def _encode(image: Image.Image, file_format: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def _packages() -> tuple[Path, Path]:
    try:
        import skimage
        import sklearn
    except ImportError as error:
        raise ValueError(
            f"the demonstration data come out of a package that is not installed ({error}); "
            "`pip install 'swinv2-scale[demo]'`"
        ) from error
    return Path(skimage.__file__).parent, Path(sklearn.__file__).parent
