"""What a directory of shards holds, or a plain folder of pictures.

A shard is an ordinary webdataset tar: members `key.jpg`, `key.cls`, … that share a key and follow one another are one
sample. Two files beside the shards turn them into a data set with random access:

    manifest.json   format version; per shard its name, bytes, sha256 and samples; the classes and how many samples
                    each of them has; what it was packed from
    offsets.npy     int64 (samples,): byte offset of the first tar header of each sample, in the order of the shards

A sample is then one positioned read (shard, offset, size). The offsets are an array and not JSON because a data set of
70 million samples has 560 MB of them: every process of a host maps the same pages of the file.

A plain folder CLASS/picture.jpg is read as it is: each picture is a shard of one sample. It is listed at every start
and has no hashes of contents, so large data is better packed.
"""

import difflib
import glob
import hashlib
import io
import json
import logging
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from swinv2_scale.data.folder import image_folder
from swinv2_scale.data.sources import Reader, is_url, join

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
OFFSETS_NAME = "offsets.npy"
HIGHEST_LABEL = "highest_label"  # in a manifest's origin, when the classes have numbers but no names

# The rule by which webdataset finds key and extension of a member: the first dot of the last path component separates
# them. Members without a dot, and `__meta__` entries, belong to no sample; nor do hidden files, which macOS leaves in
# tars and webdataset takes for samples without a name.
_MEMBER = re.compile(r"^((?:.*/|)[^./][^./]*)[.]([^/]*)$")
_META = re.compile(r"__[^/]*__($|/)")


@dataclass(frozen=True)
class Shard:
    """A tar file or a picture: `name` under the manifest's directory, `bytes` on disk, `sha256` ("": never hashed)."""

    name: str
    bytes: int
    sha256: str
    samples: int


@dataclass(frozen=True, eq=False)
class Manifest:
    """A data set: `len(manifest)` samples with indices 0 … len - 1, in the order of the shards.

    `classes` is empty when nobody named them; `origin` is what the shards were packed from (source, format, seed,
    shard_size, …), empty for shards that somebody else wrote. `pictures` are key and label of each sample of a plain
    folder, whose shards are its pictures. Where `root` is a URL, `reader` reads the shards. `samples_per_class` counts
    by the class's name, or its number where classes have no names; it is empty where nobody counted.
    """

    root: Path | str
    shards: tuple[Shard, ...]
    classes: tuple[str, ...]
    origin: dict[str, Any]
    offsets: np.ndarray = field(repr=False)  # int64 (samples,)
    pictures: tuple[tuple[str, int], ...] = field(default=(), repr=False)
    reader: Reader | None = field(default=None, repr=False)
    samples_per_class: dict[str, int] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.offsets)

    @cached_property
    def hash(self) -> str:
        """Hexadecimal digest of the shards' names, sizes, hashes (where they are known) and counts."""
        lines = (f"{shard.name} {shard.bytes} {shard.sha256} {shard.samples}\n" for shard in self.shards)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def highest_label(self) -> int | None:
        """The highest number of a class, where classes are numbers without names; None where that is not known."""
        return self.origin.get(HIGHEST_LABEL)

    @cached_property
    def first_samples(self) -> np.ndarray:
        """int64 (shards + 1,): index of each shard's first sample, and the number of samples."""
        return np.cumsum([0, *(shard.samples for shard in self.shards)], dtype=np.int64)

    @property
    def samples_of_shards(self) -> list[int]:
        """Samples of each file that is kept open to read them: a plain folder counts as one."""
        return [len(self)] if self.pictures else [shard.samples for shard in self.shards]

    def shard_of(self, index: int) -> Shard:
        """The shard that holds sample `index`."""
        return self.shards[self._shard_number(index)]

    def place(self, shard: Shard) -> Path | str:
        """Path or URL of a shard."""
        return join(self.root, shard.name) if isinstance(self.root, str) else self.root / shard.name

    def locate(self, index: int) -> tuple[Path | str, int, int]:
        """Path or URL of the shard of sample `index`; offset and size in bytes of the sample's tar members in it."""
        number = self._shard_number(index)
        shard = self.shards[number]
        begin = int(self.offsets[index])
        last = index + 1 == self.first_samples[number + 1]
        end = shard.bytes if last else int(self.offsets[index + 1])
        return self.place(shard), begin, end - begin

    def _shard_number(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return int(np.searchsorted(self.first_samples, index, side="right")) - 1

    # Loader workers that are not forked (the default from Python 3.14 on) receive the manifest pickled. A mapped array
    # would be copied into the pickle as a whole, so its file's name is sent instead.
    def __getstate__(self) -> dict[str, Any]:
        offsets = self.offsets
        return {**self.__dict__, "offsets": Path(str(offsets.filename)) if isinstance(offsets, np.memmap) else offsets}

    def __setstate__(self, state: dict[str, Any]) -> None:
        offsets = state["offsets"]
        self.__dict__.update(state, offsets=np.load(offsets, mmap_mode="r") if isinstance(offsets, Path) else offsets)


def open_manifest(source: str | os.PathLike[str], reader: Reader | None = None) -> Manifest:
    """The manifest of `source`: a manifest.json or its directory, a directory or glob of tars, or a plain folder.

    A URL of a directory with a manifest.json is read by `reader`, and so will be its shards, then for the first time.

    Shards without a manifest are indexed by reading their tar headers, which the log mentions. Sizes are compared with
    the manifest, contents are not (`swinv2-scale data verify` does).

    Raises ValueError when the path or a listed shard is missing, a shard's size is not the manifest's, a file is no
    tar, or there is no sample; and as `image_folder` does. Raises ReadError for a URL that cannot be read.
    """
    if is_url(source):
        assert reader is not None, source
        return _read_remote(str(source), reader)
    path = Path(source).expanduser()
    if not path.exists():
        # Path.glob wants the part without wildcards separated from the pattern.
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207
        if not matches:
            raise ValueError(f"{path} does not exist. {_what_exists_near(path)}")
        return _index_unlisted(matches, path)
    if path.suffix == ".json":
        return _read_manifest(path)
    if (path / MANIFEST_NAME).exists():
        return _read_manifest(path / MANIFEST_NAME)
    tars = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    packed_below = any(path.glob(f"*/{MANIFEST_NAME}"))
    if not tars and not packed_below and any(entry.is_dir() for entry in path.iterdir()):
        return _list_folder(path)
    return _index_unlisted(tars, path)


def write_manifest(
    root: Path,
    shards: Sequence[Shard],
    offsets: np.ndarray,
    *,
    classes: Sequence[str],
    origin: dict[str, Any],
    samples_per_class: Mapping[str, int],
) -> Manifest:
    """Writes manifest.json and offsets.npy into `root`, each under a temporary name that is then renamed."""
    temporary = root / f".{OFFSETS_NAME}.{os.getpid()}"
    with temporary.open("wb") as file:
        np.save(file, offsets.astype(np.int64))
    temporary.replace(root / OFFSETS_NAME)
    content = {
        "version": FORMAT_VERSION,
        "origin": origin,
        "classes": list(classes),
        "samples_per_class": dict(samples_per_class),
        "shards": [asdict(shard) for shard in shards],
    }
    # Last, because the presence of manifest.json is what says that a directory is finished.
    temporary = root / f".{MANIFEST_NAME}.{os.getpid()}"
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(root / MANIFEST_NAME)
    return _read_manifest(root / MANIFEST_NAME)


def index_shards(paths: Sequence[Path], *, hashes: bool) -> tuple[Path, list[Shard], np.ndarray]:
    """Reads the tar headers of `paths`; returns their common directory, the shards, and int64 (samples,) offsets.

    With `hashes`, every byte is read for its sha256; otherwise only the headers are. Raises ValueError for a file that
    is no tar, or is cut short.
    """
    root = Path(os.path.commonpath([path.resolve().parent for path in paths]))
    shards: list[Shard] = []
    offsets: list[np.ndarray] = []
    for path in paths:
        begins = _sample_offsets(path)
        digest = sha256_of(path) if hashes else ""
        name = path.resolve().relative_to(root).as_posix()
        shards.append(Shard(name, path.stat().st_size, digest, len(begins)))
        offsets.append(np.asarray(begins, dtype=np.int64))
    return root, shards, np.concatenate(offsets)


def split_member(name: str) -> tuple[str, str] | None:
    """Key and lower-case extension of a tar member's name by webdataset's rule; None if it belongs to no sample."""
    match = _MEMBER.match(name)
    return (match[1], match[2].lower()) if match and not _META.match(name) else None


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


_REMEDY = "pack the data again, or write a new manifest with `swinv2-scale data index`"


def _read_remote(root: str, reader: Reader) -> Manifest:
    url = join(root, MANIFEST_NAME)
    shards, classes, origin, samples_per_class = _parse(reader.read_all(url), url)
    offsets = np.load(io.BytesIO(reader.read_all(join(root, OFFSETS_NAME))))
    _check_samples(shards, offsets, url)
    reader.take_counters()  # workers would inherit, and count again, what was not read for samples
    return Manifest(root, shards, classes, origin, offsets, reader=reader, samples_per_class=samples_per_class)


def _read_manifest(path: Path) -> Manifest:
    shards, classes, origin, samples_per_class = _parse(path.read_bytes(), path)
    for shard in shards:
        _check_size(path.parent / shard.name, shard, path)
    offsets_path = path.parent / OFFSETS_NAME
    if shards and not offsets_path.exists():
        raise ValueError(f"{offsets_path} is missing beside {path.name}; copy it too, or {_REMEDY}")
    offsets = np.load(offsets_path, mmap_mode="r")
    _check_samples(shards, offsets, path)
    return Manifest(path.parent.resolve(), shards, classes, origin, offsets, samples_per_class=samples_per_class)


def _parse(text: bytes, path: Path | str) -> tuple[tuple[Shard, ...], tuple[str, ...], dict[str, Any], dict[str, int]]:
    """Shards, classes, origin and samples per class of a manifest.json."""
    try:
        content = json.loads(text)
        version = content["version"]
        if version != FORMAT_VERSION:
            raise ValueError(f"{path} has format version {version}, this program reads {FORMAT_VERSION}; {_REMEDY}")
        shards = tuple(Shard(**entry) for entry in content["shards"])
        return shards, tuple(content["classes"]), content["origin"], content.get("samples_per_class", {})
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no manifest of shards ({type(error).__name__}: {error}); {_REMEDY}") from error


def _check_samples(shards: Sequence[Shard], offsets: np.ndarray, manifest: Path | str) -> None:
    samples = sum(shard.samples for shard in shards)
    if samples == 0:
        raise ValueError(f"{manifest} lists no sample: the data set is empty; pack a source that holds images")
    if offsets.shape != (samples,):
        raise ValueError(f"{OFFSETS_NAME} has shape {offsets.shape}, {manifest} lists {samples} samples; {_REMEDY}")


def _check_size(path: Path, shard: Shard, manifest: Path) -> None:
    if not path.exists():
        raise ValueError(f"shard {path} is listed in {manifest} but does not exist; copy it again, or pack again")
    size = path.stat().st_size
    if size != shard.bytes:
        raise ValueError(
            f"shard {path} has {size} bytes but its manifest says {shard.bytes}: it was changed or truncated; "
            "copy it again, or pack again"
        )


def _index_unlisted(paths: list[Path], source: Path) -> Manifest:
    if not paths:
        raise ValueError(
            f"{source} holds neither a {MANIFEST_NAME} nor .tar files nor CLASS/picture.jpg. "
            f"{_what_exists_near(source / MANIFEST_NAME)}, or "
            "make shards of images with `swinv2-scale data pack SOURCE DEST --format imagefolder`"
        )
    log.warning(
        "%s has no %s: indexing %d shard(s) by their tar headers; contents are not verifiable and every start repeats "
        "this. `swinv2-scale data index DIRECTORY` writes the manifest once.",
        *(source, MANIFEST_NAME, len(paths)),
    )
    root, shards, offsets = index_shards(paths, hashes=False)
    if len(offsets) == 0:
        raise ValueError(f"{source} holds tar files without a single sample: the data set is empty; pack it again")
    return Manifest(root, tuple(shards), (), {}, offsets)


def _list_folder(root: Path) -> Manifest:
    classes, items = image_folder(root)
    # The fixed order of a hash: any stretch of it has mixed classes, as in packed shards.
    items.sort(key=lambda item: hashlib.sha256(item.key.encode("utf-8", "surrogateescape")).digest())
    paths = [content for item in items for content in item.members.values() if isinstance(content, Path)]
    shards = tuple(Shard(path.relative_to(root).as_posix(), path.stat().st_size, "", 1) for path in paths)
    pictures = tuple((item.key, item.label) for item in items if item.label is not None)
    origin: dict[str, Any] = {"source": str(root.resolve()), "format": "imagefolder"}
    if not classes:
        origin[HIGHEST_LABEL] = max(label for _, label in pictures)
    return Manifest(root.resolve(), shards, tuple(classes), origin, np.zeros(len(items), np.int64), pictures)


def _sample_offsets(path: Path) -> list[int]:
    offsets: list[int] = []
    previous = None
    try:
        with tarfile.open(path, mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # otherwise it keeps each member it met
                split = split_member(member.name) if member.isreg() else None
                if split is not None and split[0] != previous:
                    previous = split[0]
                    offsets.append(member.offset)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(
            f"{path} is no uncompressed tar file, or is truncated ({error}); copy or pack it again, or move it away"
        ) from error
    # A tar cut exactly between two members reads without an error: only the missing end marker tells.
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 1024))
        if file.read().strip(b"\0"):
            raise ValueError(f"{path} lacks the end marker of a tar file: it is truncated; copy or pack it again")
    return offsets


def _what_exists_near(path: Path) -> str:
    """What the closest existing ancestor of `path` holds, most similar names first."""
    path = path.absolute()
    parent = next(ancestor for ancestor in path.parents if ancestor.is_dir())
    names = [child.name + "/" * child.is_dir() for child in parent.iterdir() if not child.name.startswith(".")]
    wanted = path.relative_to(parent).parts[0]
    nearest = difflib.get_close_matches(wanted, names, n=8, cutoff=0)
    shown = ", ".join(nearest) + (", …" if len(names) > len(nearest) else "")
    return f"{parent} holds {shown or 'nothing'}: correct the path"
