"""The pictures of the docs: what a run says of several, `columns` of them side by side, as one JPEG.

    photographs=$(python -c 'import skimage; print(skimage.__path__[0])')/data
    python docs/images/sheet.py runs/demo_detection data/scenes/images/validation/scene_validation_0000[0-4].jpg \
        $photographs/text.png --output docs/images/detection.jpg
"""

import argparse
import tempfile
from pathlib import Path

from PIL import Image

from swinv2_scale.drawing import MARGIN
from swinv2_scale.predict import predict


def sheet(pictures: list[Image.Image], columns: int) -> Image.Image:
    """Pictures in rows of `columns`, each as high as its highest, on white."""
    rows = [pictures[begin : begin + columns] for begin in range(0, len(pictures), columns)]
    heights = [max(picture.height for picture in row) for row in rows]
    width = max(sum(picture.width + 2 * MARGIN for picture in row) for row in rows)
    whole = Image.new("RGB", (width, sum(heights) + 2 * MARGIN * len(rows)), "white")
    top = MARGIN
    for row, height in zip(rows, heights, strict=True):
        left = MARGIN
        for picture in row:
            whole.paste(picture, (left, top))
            left += picture.width + 2 * MARGIN
        top += height + 2 * MARGIN
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--columns", type=int, default=2)
    parser.add_argument("--set", nargs="+", default=[], dest="settings")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        lines = predict(
            arguments.checkpoint,
            arguments.images,
            Path(directory),
            settings=[*arguments.settings, "precision=fp32"],
        )
        pictures = []
        for line in lines:
            print(line)
            with Image.open(line.rpartition(" -> ")[2]) as picture:
                pictures.append(picture.convert("RGB"))
    sheet(pictures, arguments.columns).save(arguments.output, quality=85)


if __name__ == "__main__":
    main()
