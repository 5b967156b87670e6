"""Packing: the samples of a source into webdataset shards with a manifest.

Packing shuffles once, so that a plain sequential reader (any program that uses `webdataset`) sees mixed classes, and
writes near-equal shards whose bytes depend on the samples, the seed and the shard size only.

Until a packing into DESTINATION is finished, its work lies beside it, and another one goes on from there:

    .DESTINATION.partial/
        lock        held by the processes that pack
        plan.json   the origin that the manifest will have; partial work is of use as long as it stays the same
        shards/     what becomes DESTINATION by being renamed; see writer.py
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from swinv2_scale.data.folder import Item
from swinv2_scale.data.layouts import read_source
from swinv2_scale.data.manifest import HIGHEST_LABEL, MANIFEST_NAME, Manifest, open_manifest, write_manifest
from swinv2_scale.data.order import shuffled
from swinv2_scale.data.writer import WRITTEN, read_note, write_all

log = logging.getLogger(__name__)

_TAR_BLOCK = 512
_OF_THE_SOURCE = ("files", HIGHEST_LABEL, "category_ids")  # what changes in an origin when the source's contents do


def pack(
    source: str,
    destination: Path,
    *,
    format: str,
    shard_size: int | str,
    seed: int,
    jobs: int | None = None,
    stuff: Path | None = None,
) -> Manifest:
    """Packs `source` into shards in the directory `destination`, in `jobs` processes (default: one per usable CPU).

    `format` is one of layouts.FORMATS, which says there what `source` and `stuff` are. `shard_size` is a number of
    samples, or bytes such as "256MB". A destination that was packed from the same source, format, seed and shard size
    is left alone. An interrupted packing goes on from its finished shards, unless the source has changed.

    Raises ValueError when the destination holds something else, the source is not as the format says, somebody else
    packs into the destination, or something cannot be read or written.
    """
    if seed < 0:
        raise ValueError(f"seed {seed} is negative; choose 0 or more")
    if jobs is not None and jobs < 1:
        raise ValueError(f"{jobs} jobs cannot pack anything; choose 1 or more")
    parse_shard_size(shard_size)
    if format != "demo":
        source = str(Path(source).expanduser().resolve())
    destination = Path(destination).expanduser().absolute()
    classes, items, facts = read_source(source, format, stuff)
    if not items:
        raise ValueError(f"{source} lists no sample: there is nothing to pack; give a source that has some")
    origin = {"source": source, "format": format, "seed": seed, "shard_size": str(shard_size), **facts}
    origin["files"] = _fingerprint(classes, items)
    labels = [item.label for item in items if item.label is not None]
    if labels and not classes:
        origin[HIGHEST_LABEL] = max(labels)
    if _is_packed(destination, origin):
        log.info("already packed: %s", destination)
        return open_manifest(destination)
    partial = destination.parent / f".{destination.name}.partial"
    partial.mkdir(parents=True, exist_ok=True)
    with _locked(partial / "lock", destination):
        shards = _resume(partial, origin)
        settings: dict[str, Any] = {"classes": classes, "shard_size": shard_size, "seed": seed, "origin": origin}
        try:
            write_shards(items, shards, **settings, jobs=jobs or len(os.sched_getaffinity(0)))
            shards.rename(destination)
        except (OSError, ValueError) as error:
            raise ValueError(f"{error}. The same command goes on from the shards that are finished") from error
        shutil.rmtree(partial)
    return open_manifest(destination)


def write_shards(
    items: Sequence[Item],
    directory: Path,
    *,
    classes: Sequence[str],
    shard_size: int | str,
    seed: int,
    origin: dict[str, Any],
    jobs: int = 1,
) -> Manifest:
    """Shuffles `items` by `seed` and writes them with their manifest into `directory`, which must exist.

    Shards that an interrupted call with the same arguments has finished are kept. Raises ValueError as write_all does.
    """
    if not (directory / MANIFEST_NAME).exists():
        groups = {f"shard-{number:06d}.tar": group for number, group in enumerate(_groups(items, shard_size, seed))}
        write_all(directory, items, groups, jobs)
        notes = [read_note(directory, name) for name in groups]
        labels = sorted(Counter(item.label for item in items if item.label is not None).items())
        write_manifest(
            directory,
            [shard for shard, _ in notes],
            np.concatenate([offsets for _, offsets in notes]),
            classes=classes,
            origin=origin,
            samples_per_class={classes[label] if classes else str(label): count for label, count in labels},
        )
    shutil.rmtree(directory / WRITTEN, ignore_errors=True)
    return open_manifest(directory)


def _groups(items: Sequence[Item], shard_size: int | str, seed: int) -> list[np.ndarray]:
    """The shuffled indices of `items`, cut into shards."""
    size, in_bytes = parse_shard_size(shard_size)
    order = shuffled(len(items), seed)
    weights = np.array([_packed_bytes(items[i]) for i in order] if in_bytes else [1] * len(items), dtype=np.int64)
    ends = np.cumsum(weights)
    count = -(-int(ends[-1]) // size)
    # Cutting at equal fractions of the total keeps shards near-equal; a remainder in the last one would not be.
    cuts = np.searchsorted(ends, np.arange(1, count) * (ends[-1] / count), side="right")
    return [group for group in np.split(order, cuts) if len(group)]


def parse_shard_size(text: int | str) -> tuple[int, bool]:
    """A shard size as (number, whether it counts bytes): 1000 and "1000" count samples, "256MB" counts bytes."""
    match = re.fullmatch(r"\s*(\d+)\s*(|[KMG]B)\s*", str(text), re.IGNORECASE)
    if not match or int(match[1]) == 0:
        raise ValueError(f"shard size {text!r} is neither a number of samples such as 1000 nor bytes such as 256MB")
    factor = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}[match[2].upper()]
    return int(match[1]) * factor, match[2] != ""


def _size_and_state(content: Path | bytes) -> tuple[int, bytes]:
    """Bytes of a member, and what tells whether it has changed: size and time of a file, or the contents."""
    if isinstance(content, bytes):
        return len(content), content
    try:
        status = content.stat()
    except OSError as error:
        raise ValueError(f"cannot read {content} ({error.strerror}); repair it, or remove it") from error
    return status.st_size, f"{status.st_size} {status.st_mtime_ns}".encode()


def _fingerprint(classes: Sequence[str], items: Sequence[Item]) -> str:
    """Tells whether a source is what it was: names, and sizes and times of files (contents of what is in memory)."""
    digest = hashlib.sha256("\n".join(classes).encode("utf-8", "surrogateescape"))
    for item in items:
        for extension, content in item.members.items():
            name = f"{item.key}.{extension} ".encode("utf-8", "surrogateescape")
            digest.update(name + _size_and_state(content)[1])
    return digest.hexdigest()[:16]


def _packed_bytes(item: Item) -> int:
    """What a sample takes in a shard: each member has a header, and is rounded up to whole blocks."""
    return sum(2 * _TAR_BLOCK + _size_and_state(content)[0] for content in item.members.values())


@contextmanager
def _locked(path: Path, destination: Path) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is packing into {destination}; wait for it, or end it") from None
        except OSError as error:  # a Lustre that is mounted without flock
            log.warning("%s cannot be locked (%s): make sure that nobody else packs there", destination, error.strerror)
        yield


def _resume(partial: Path, origin: dict[str, Any]) -> Path:
    """The directory of the shards of an interrupted packing, or a new one if there was none or its source changed."""
    shards, plan = partial / "shards", partial / "plan.json"
    if shards.exists():
        planned = json.loads(plan.read_bytes())
        changes = _differences(planned, origin, skip=_OF_THE_SOURCE)
        if changes:
            raise ValueError(f"{partial} holds an interrupted packing with {changes}; finish that one, or remove it")
        if planned == origin:
            log.info("going on from %d finished shard(s) in %s", len([*shards.glob("*.tar")]), shards)
            return shards
        log.warning("%s has changed since it was packed in part: the finished shards are discarded", origin["source"])
        shutil.rmtree(shards)
    temporary = plan.with_suffix(".new")
    temporary.write_text(json.dumps(origin, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(plan)
    shards.mkdir()
    return shards


def _differences(found: dict[str, Any], wanted: dict[str, Any], skip: Sequence[str] = ()) -> str:
    keys = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key) and key not in skip]
    return "; ".join(f"{key} {found.get(key)!r}, not {wanted.get(key)!r}" for key in keys)


def _is_packed(destination: Path, origin: dict[str, Any]) -> bool:
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return False
    if not (destination / MANIFEST_NAME).exists():
        raise ValueError(f"{destination} exists and holds no packed data; choose another directory, or remove it")
    packed = open_manifest(destination).origin
    if packed != origin:
        raise ValueError(
            f"{destination} was packed with {_differences(packed, origin)}; choose another directory, or remove it"
        )
    return True
