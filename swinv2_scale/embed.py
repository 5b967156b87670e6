"""Embeddings of many pictures as a Parquet file, for retrieval, clustering and linear probes.

    key         string         of the sample in its shard, or the picture's path
    label       int64          null where the data has none
    embedding   float32 (C,)   a fixed-size list

Rows stand in the order of the data. The file's metadata, JSON by name: checkpoint, data, layer, image_size, model,
pretrained_windows (see export.py), and classes, the names of the labels.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swinv2_scale import distributed
from swinv2_scale.data.folder import IMAGE_EXTENSIONS
from swinv2_scale.data.manifest import Manifest, Shard, open_manifest
from swinv2_scale.data.shards import progress_bar
from swinv2_scale.data.stream import Batch, evaluation_stream
from swinv2_scale.data.transforms import EvaluationTransform, Sample, collate
from swinv2_scale.export import Loaded, require
from swinv2_scale.models.swin_v2 import SwinTransformerV2
from swinv2_scale.parallel import cast

log = logging.getLogger(__name__)

ROW_GROUP = 8192  # rows that are held back and written as one; 50 MB at 1,536 channels


class Embed:
    """Pools feature maps: images (B, in_channels, Y, X) -> float32 (B, width).

    layer  "pooled": the mean over the map of the last stage after the final norm, which is what the classifier sees,
           and what forward gives with num_classes=0. "stage1", "stage2", …: the mean over that stage's map
    Raises ValueError for other names.
    """

    def __init__(self, model: SwinTransformerV2, layer: str) -> None:
        stages = [f"stage{number}" for number in range(1, len(model.widths) + 1)]
        if layer not in ("pooled", *stages):
            raise ValueError(f"layer {layer!r} is not one of pooled, {', '.join(stages)}")
        self.model, self.norm = model, layer == "pooled"
        self.stage = -1 if self.norm else stages.index(layer)
        self.width = model.widths[self.stage]

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        feature_map = self.model.forward_features(images)[self.stage]
        return (self.model.norm(feature_map) if self.norm else feature_map).float().mean(dim=(1, 2))


def embed(
    loaded: Loaded,
    data: str | Path,
    destination: Path,
    *,
    checkpoint: str | Path,
    layer: str = "pooled",
    image_size: int | None = None,
    batch: int = 32,
    workers: int = 0,
    precision: str = "fp32",
    skip_corrupt: bool = False,
    row_group: int = ROW_GROUP,
) -> int:
    """Write the embeddings of every picture of `data` to `destination`, and return how many there are.

    data        what open_manifest takes, or a flat folder of pictures, see `open_pictures`
    image_size  pixels; None: the model's. Pictures are prepared as for evaluation
    precision   "fp32", or "bf16": weights and activations as in training, embeddings float32
    The file appears when it is complete. Raises ValueError for a picture that does not decode, which skip_corrupt
    leaves out instead and logs; for a destination that exists; and for data and layers that do not.
    """
    require("embed", "pyarrow")
    import pyarrow.parquet

    if destination.exists():
        raise ValueError(f"{destination} exists: remove it or choose another name")
    manifest = open_pictures(data)
    size = _square(loaded.metadata["model"]["image_size"]) if image_size is None else image_size
    model = loaded.model.to(distributed.device())
    if precision == "bf16":
        cast(model, precision)
    compute = Embed(model, layer)
    stream = evaluation_stream(
        manifest,
        _Prepare(EvaluationTransform(image_size=size, crop=None, interpolation="bicubic")),
        collate,
        seed=0,
        batch=batch,
        rank=0,
        world_size=1,
        workers=workers,
        max_corrupt_share=1.0,  # judged here
    )
    origin = {"checkpoint": str(checkpoint), "data": str(data), "layer": layer, "image_size": size}
    known = {**loaded.metadata, "classes": list(manifest.classes), **origin}
    schema = _schema(compute.width, known)
    temporary = destination.with_name(f".{destination.name}.partial")
    rows = 0
    try:
        with pyarrow.parquet.ParquetWriter(temporary, schema) as writer:
            for group in _grouped(_rows(progress_bar(stream, "embedding"), compute, skip_corrupt), row_group):  # type: ignore[arg-type]
                writer.write_table(_table(group, schema))
                rows += len(group)
        temporary.replace(destination)
    finally:
        temporary.unlink(missing_ok=True)
    return rows


def open_pictures(source: str | Path) -> Manifest:
    """As `open_manifest`; a folder with pictures and nothing below it is a data set without labels, by sorted names."""
    root = Path(source).expanduser()
    entries = [entry for entry in root.iterdir() if not entry.name.startswith(".")] if root.is_dir() else []
    pictures = sorted(entry for entry in entries if entry.suffix[1:].lower() in IMAGE_EXTENSIONS)
    if not pictures or any(entry.is_dir() or entry.suffix in (".tar", ".json") for entry in entries):
        return open_manifest(source)
    if len(pictures) < len(entries):
        log.warning("%s: left out %d file(s) that are no pictures", root, len(entries) - len(pictures))
    shards = tuple(Shard(picture.name, picture.stat().st_size, "", 1) for picture in pictures)
    names = tuple((picture.name, -1) for picture in pictures)
    return Manifest(root.resolve(), shards, (), {}, np.zeros(len(pictures), np.int64), names)


class _Prepare:
    """The transform of one sample, which also marks those that stand for a corrupt one."""

    def __init__(self, transform: EvaluationTransform) -> None:
        self.transform = transform

    def __call__(self, sample: Sample) -> Sample:
        return {**self.transform(sample), "substitute": int(bool(sample["corrupt"]))}


Row = tuple[str, int | None, np.ndarray]


def _rows(batches: Iterator[Batch], compute: Embed, skip_corrupt: bool) -> Iterator[Row]:
    """Key, label and embedding of each sample."""
    for batch in batches:
        for name in batch["corrupt"]:
            if not skip_corrupt:
                raise ValueError(f"{name}. Remove it, or leave such pictures out with --skip-corrupt")
            log.warning("left out: %s", name)
        embeddings = compute(batch["image"].to(distributed.device())).cpu().numpy()
        columns = (batch["key"], batch["label"].tolist(), embeddings, batch["substitute"].tolist())
        for key, label, embedding, substitute in zip(*columns, strict=True):
            if not substitute:
                # File names may hold bytes that are no UTF-8, which Parquet's strings must be.
                yield key.encode("utf-8", "backslashreplace").decode(), None if label < 0 else label, embedding


def _grouped(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    group: list[Row] = []
    for row in rows:
        group.append(row)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _schema(width: int, metadata: dict[str, Any]) -> Any:
    import pyarrow as pa

    columns = [("key", pa.string()), ("label", pa.int64()), ("embedding", pa.list_(pa.float32(), width))]
    return pa.schema(columns, {name: json.dumps(value) for name, value in metadata.items()})


def _table(rows: list[Row], schema: Any) -> Any:
    import pyarrow as pa

    keys, labels, embeddings = zip(*rows, strict=True)
    flat = pa.array(np.concatenate(embeddings), pa.float32())
    vectors = pa.FixedSizeListArray.from_arrays(flat, type=schema.field("embedding").type)
    return pa.table([pa.array(keys, pa.string()), pa.array(labels, pa.int64()), vectors], schema=schema)


def _square(size: Any) -> int:
    if isinstance(size, int):
        return size
    if len(set(size)) > 1:
        raise ValueError(f"the model is of images of {size} pixels, and embed makes squares: give --image-size")
    return int(size[0])
