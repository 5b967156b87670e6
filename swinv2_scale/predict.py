"""What a trained model says of pictures: `swinv2-scale predict`.

DIR/NAME.png            the picture with what was found in it; NAME is the picture's, with ~ if it is taken
DIR/predictions.json    on request: for each picture its file, its size and the numbers, see docs/predict.md
DIR/NAME.seg.png        with it, of segmentations: 0 for no class, v for class v - 1, as packed data has it
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

import torch
from torchvision.io import write_png

from swinv2_scale import config
from swinv2_scale.checkpoint import weights_file
from swinv2_scale.data.folder import IMAGE_EXTENSIONS, MASK_EXTENSION, sample_key
from swinv2_scale.data.images import CorruptSampleError, EncodedImage
from swinv2_scale.evaluation import trained

RUN_CONFIGURATION = "config.yaml"  # beside the weights of a checkpoint


def predict(
    checkpoint: str | Path, images: Sequence[Path], output: Path, *, settings: Sequence[str] = (), as_json: bool = False
) -> Iterator[str]:
    """Draw what the weights of `checkpoint` say of each picture, and yield a line of it as soon as it is written.

    checkpoint  a run directory, a checkpoint, or a file of weights. The task and its settings are those of the run
    settings    of conf/evaluate.yaml, which win; of weights without a run's configuration they say the task, which
                is otherwise classification
    Raises ValueError for pictures that are not there or do not decode, and for a model that says nothing of pictures.
    """
    files = pictures(images)
    weights = weights_file(checkpoint)
    copy = weights.parent / RUN_CONFIGURATION
    chosen = any(setting.startswith(("task=", "experiment=")) for setting in settings)
    own = config.saved_task(copy) if copy.exists() and not chosen else []
    _, task, model, classes = trained(weights, [*own, *settings])
    model.eval()
    found: list[dict[str, Any]] = []
    taken: set[str] = set()
    for file in files:
        image = EncodedImage(_bytes(file))
        try:
            with torch.inference_mode():
                said = task.predict(model, image, classes)
        except CorruptSampleError as error:
            raise ValueError(f"{file} is no picture that can be read ({error}): convert it, or leave it out") from error
        output.mkdir(parents=True, exist_ok=True)
        target = output / f"{sample_key(PurePath(file.name), taken)}.png"
        write_png(said.picture, str(target))
        found.append({"file": str(file), "size": list(image.pixels().shape[1:]), **said.numbers})
        if as_json and said.map is not None:
            write_png(said.map[None], str(target.with_suffix(f".{MASK_EXTENSION}")))
        yield f"{file}: {said.line} -> {target}"
    if as_json:
        path = output / "predictions.json"
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        yield f"{len(found)} picture(s): {path}"


def pictures(sources: Sequence[Path]) -> list[Path]:
    """Files, and the pictures of folders by their sorted names. Raises ValueError for what does not exist."""
    files: list[Path] = []
    for source in sources:
        inside = [source]
        if source.is_dir():
            inside = sorted(path for path in source.iterdir() if path.suffix[1:].lower() in IMAGE_EXTENSIONS)
        if not inside or not source.exists():
            what = "holds no pictures" if source.is_dir() else "does not exist"
            raise ValueError(f"{source} {what}: give pictures ({', '.join(IMAGE_EXTENSIONS)}) or a folder of them")
        files += inside
    return files


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}): correct its permissions") from error
