"""Manifests for shards that somebody else packed, from their tar headers or from the index files of NVIDIA DALI.

`wds2idx` writes `shard.idx` beside `shard.tar`: a line "v1.2 SAMPLES", then a line of each sample with four words per
member: extension, offset and size in bytes of its data, name ("v1.1": without the name).
"""

import logging
import tarfile
from pathlib import Path, PurePosixPath

import numpy as np

from swinv2_scale.data.manifest import MANIFEST_NAME, Manifest, Shard, index_shards, write_manifest

log = logging.getLogger(__name__)

_TAR_BLOCK = 512
_WORDS = {"v1.1": 3, "v1.2": 4}  # of each member


def index(directory: Path) -> Manifest:
    """Writes a manifest beside shards that somebody else packed; shards with an .idx file are not read.

    Raises ValueError if there is a manifest, no shard, a shard that is no whole tar, or an .idx that is not its
    shard's.
    """
    paths = sorted(directory.glob("*.tar"))
    if not paths:
        raise ValueError(f"{directory} holds no .tar files; give the directory of the shards")
    if (directory / MANIFEST_NAME).exists():
        raise ValueError(f"{directory} already has a {MANIFEST_NAME}; remove it first if the shards have changed")
    shards: list[Shard] = []
    offsets: list[np.ndarray] = []
    for path in paths:
        table = path.with_suffix(".idx")
        if table.exists():
            begins = read_idx(path, table)
            shards.append(Shard(path.name, path.stat().st_size, "", len(begins)))
        else:
            _, (shard,), begins = index_shards([path], hashes=True)
            shards.append(Shard(path.name, shard.bytes, shard.sha256, shard.samples))
        offsets.append(begins)
    unread = [shard.name for shard in shards if not shard.sha256]
    if unread:
        log.warning(
            "%d of %d shard(s) are indexed by their .idx files, without being read: their sha256 is unknown, so "
            "`swinv2-scale data verify` decodes them but cannot notice other changes. Without the .idx files they are "
            "read and hashed.",
            *(len(unread), len(shards)),
        )
    return write_manifest(directory, shards, np.concatenate(offsets), classes=(), origin={}, samples_per_class={})


def read_idx(shard: Path, table: Path) -> np.ndarray:
    """int64 (samples,): where each sample's part of a shard begins, from the shard's .idx.

    An .idx tells where data begin, and headers before them may be of any length (PAX). So a sample begins where the
    data of the one before it end; what else lies between them is skipped when the sample is read. Files without an
    extension (README) are no samples; a v1.1 table does not name them. Of the shard, the headers of each sample's first
    and last member are read, to see whether the .idx is this shard's.

    Raises ValueError for a table that is malformed or not this shard's.
    """
    remedy = (
        f"remove it, then the tar headers of {shard.name} are read. To write it again does not help where GNU tar finds"
        " the offsets and the shard has PAX headers, as webdataset writes them: they are wrong there"
    )
    head, *lines = table.read_text(encoding="utf-8").splitlines() or [""]
    version, _, samples = head.partition(" ")
    if version not in _WORDS or samples.strip() != str(len(lines)):
        known = " or ".join(_WORDS)
        raise ValueError(f"{table} begins with {head!r}, not with {known} and its {len(lines)} lines; {remedy}")
    begins = [0]  # and where the last sample ends
    members: list[tuple[int, int]] = []  # the first and the last of each sample: offset and size of their data
    for number, line in enumerate(lines, start=2):
        words = line.split()
        step = _WORDS[version]
        try:
            if not words or len(words) % step:
                raise ValueError(f"{len(words)} words are no multiple of {step}; a name with a blank?")
            spans = [(int(words[i + 1]), int(words[i + 2])) for i in range(0, len(words), step)]
            for offset, size in spans:
                if offset % _TAR_BLOCK or offset < begins[-1] + _TAR_BLOCK or size < 0:
                    raise ValueError(f"no member can be at byte {offset}")
        except ValueError as error:
            raise ValueError(f"{table}, line {number}: {error}; {remedy}") from None
        end = max(offset + -(-size // _TAR_BLOCK) * _TAR_BLOCK for offset, size in spans)
        if step == 4 and all("." not in PurePosixPath(name).name for name in words[3::4]):
            begins[-1] = end
            continue
        members += [spans[0], spans[-1]]
        begins.append(end)
    with shard.open("rb") as file:
        for offset, size in members:
            file.seek(offset - _TAR_BLOCK)
            try:
                found = tarfile.TarInfo.frombuf(file.read(_TAR_BLOCK), "utf-8", "surrogateescape").size
            except tarfile.HeaderError:
                found = None
            if found != size or begins[-1] > shard.stat().st_size:
                raise ValueError(f"{table} is not of {shard.name}, which has no {size} bytes at {offset}; {remedy}")
    return np.array(begins[:-1], dtype=np.int64)
