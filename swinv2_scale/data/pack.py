"""Packing: images of a source into webdataset shards with a manifest.

Packing shuffles once, so that a plain sequential reader (any program that uses `webdataset`) sees mixed classes, and
writes near-equal shards whose bytes depend on the samples, the seed and the shard size only.
"""

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from webdataset import TarWriter

from swinv2_scale.data import demo
from swinv2_scale.data.folder import Item, image_folder
from swinv2_scale.data.manifest import (
    HIGHEST_LABEL,
    MANIFEST_NAME,
    Manifest,
    Shard,
    index_shards,
    open_manifest,
    sha256_of,
    write_manifest,
)
from swinv2_scale.data.order import shuffled
from swinv2_scale.data.shards import progress_bar

log = logging.getLogger(__name__)

FORMATS = ("imagefolder", "demo")
_TAR_BLOCK = 512


def pack(source: str, destination: Path, *, format: str, shard_size: int | str, seed: int) -> Manifest:
    """Packs `source` into shards in the directory `destination`.

    `format` is "imagefolder" (source is a directory, see `image_folder`) or "demo" (see demo.samples). `shard_size` is
    a number of samples, or bytes such as "256MB". A destination that was packed from the same source, format, seed and
    shard size is left alone. Everything is written to a temporary directory beside the destination, then renamed.

    Raises ValueError when the destination holds something else, or the source holds no images.
    """
    if format not in FORMATS:
        raise ValueError(f"there is no source format {format!r}; choose one of {', '.join(FORMATS)}")
    if seed < 0:
        raise ValueError(f"seed {seed} is negative; choose 0 or more")
    if format == "imagefolder":
        source = str(Path(source).expanduser().resolve())
    destination = Path(destination).expanduser().absolute()
    classes, items = image_folder(Path(source)) if format == "imagefolder" else demo.samples(source)
    origin = {"source": source, "format": format, "seed": seed, "shard_size": str(shard_size)}
    origin["files"] = _fingerprint(items)
    if not classes:
        origin[HIGHEST_LABEL] = max(item.label for item in items)
    if _is_packed(destination, origin):
        log.info("already packed: %s", destination)
        return open_manifest(destination)
    partial = destination.parent / f".{destination.name}.partial-{os.getpid()}"
    partial.mkdir(parents=True)
    try:
        write_shards(items, partial, classes=classes, shard_size=shard_size, seed=seed, origin=origin)
        partial.rename(destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return open_manifest(destination)


def write_shards(
    items: Sequence[Item],
    directory: Path,
    *,
    classes: Sequence[str],
    shard_size: int | str,
    seed: int,
    origin: dict[str, Any],
) -> Manifest:
    """Shuffles `items` by `seed` and writes them with their manifest into `directory`, which must exist."""
    size, in_bytes = parse_shard_size(shard_size)
    order = shuffled(len(items), seed)
    weights = np.array([_packed_bytes(items[i]) for i in order] if in_bytes else [1] * len(items), dtype=np.int64)
    ends = np.cumsum(weights)
    count = -(-int(ends[-1]) // size)
    # Cutting at equal fractions of the total keeps shards near-equal; a remainder in the last one would not be.
    cuts = np.searchsorted(ends, np.arange(1, count) * (ends[-1] / count), side="right")
    groups = [group for group in np.split(order, cuts) if len(group)]
    progress = iter(progress_bar(np.concatenate(groups), "packing"))
    shards: list[Shard] = []
    offsets: list[int] = []
    for number, group in enumerate(groups):
        path = directory / f"shard-{number:06d}.tar"
        # PAX is plain ustar until a name is longer than 100 characters. Fixed times and owners: equal bytes.
        with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as writer:
            for _ in range(len(group)):
                item = items[next(progress)]
                offsets.append(writer.tarstream.offset)
                content = item.content if isinstance(item.content, bytes) else item.content.read_bytes()
                writer.write({"__key__": item.key, item.extension: content, "cls": str(item.label).encode()})
        shards.append(Shard(path.name, path.stat().st_size, sha256_of(path), len(group)))
    next(progress, None)  # lets the progress bar finish
    return write_manifest(directory, shards, np.array(offsets), classes=classes, origin=origin)


def parse_shard_size(text: int | str) -> tuple[int, bool]:
    """A shard size as (number, whether it counts bytes): 1000 and "1000" count samples, "256MB" counts bytes."""
    match = re.fullmatch(r"\s*(\d+)\s*(|[KMG]B)\s*", str(text), re.IGNORECASE)
    if not match or int(match[1]) == 0:
        raise ValueError(f"shard size {text!r} is neither a number of samples such as 1000 nor bytes such as 256MB")
    factor = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}[match[2].upper()]
    return int(match[1]) * factor, match[2] != ""


def index(directory: Path) -> Manifest:
    """Writes a manifest beside shards that somebody else packed. Raises ValueError if there is one, or no shard."""
    paths = sorted(directory.glob("*.tar"))
    if not paths:
        raise ValueError(f"{directory} holds no .tar files; give the directory of the shards")
    if (directory / MANIFEST_NAME).exists():
        raise ValueError(f"{directory} already has a {MANIFEST_NAME}; remove it first if the shards have changed")
    root, shards, offsets = index_shards(paths, hashes=True)
    return write_manifest(root, shards, offsets, classes=(), origin={})


def _fingerprint(items: Sequence[Item]) -> str:
    """Tells whether a source is what it was: names, and sizes and times of files (contents of what is in memory)."""
    digest = hashlib.sha256()
    for key, _, label, content in items:
        state = (
            content if isinstance(content, bytes) else f"{content.stat().st_size} {content.stat().st_mtime_ns}".encode()
        )
        digest.update(f"{key} {label} ".encode("utf-8", "surrogateescape") + state)
    return digest.hexdigest()[:16]


def _packed_bytes(item: Item) -> int:
    content = len(item.content) if isinstance(item.content, bytes) else item.content.stat().st_size
    return 4 * _TAR_BLOCK + content  # headers of image and class, the class, and what rounding adds on average


def _is_packed(destination: Path, origin: dict[str, Any]) -> bool:
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return False
    if not (destination / MANIFEST_NAME).exists():
        raise ValueError(f"{destination} exists and holds no packed data; choose another directory, or remove it")
    packed = open_manifest(destination).origin
    if packed != origin:
        differences = [
            f"{key} {packed.get(key)!r}, not {origin[key]!r}" for key in origin if packed.get(key) != origin[key]
        ]
        raise ValueError(
            f"{destination} was packed with {'; '.join(differences)}; choose another directory, or remove it"
        )
    return True
