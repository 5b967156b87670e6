"""Shards: reading one sample, checking all of them."""

import hashlib
import io
import json
import os
import tarfile
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import track

from swinv2_scale.data.folder import IMAGE_EXTENSIONS, MASK_EXTENSION, VIDEO_EXTENSIONS
from swinv2_scale.data.images import CorruptSampleError, EncodedImage, EncodedMap
from swinv2_scale.data.manifest import Manifest, Shard, sha256_of, split_member
from swinv2_scale.data.order import OPEN_SHARDS, mixing
from swinv2_scale.data.videos import EncodedVideo

_OPEN_SHARDS = 128  # open files per process; hosts commonly allow 1,024

T = TypeVar("T")


_descriptors: OrderedDict[tuple[Path, str], int] = OrderedDict()


def read_sample(manifest: Manifest, index: int) -> tuple[str, dict[str, bytes]]:
    """Key of sample `index`, and its members' bytes by extension ("jpg", "cls", …), with one read at an offset.

    A picture of a plain folder reads as the sample that it would be packed to.

    Raises OSError when the shard cannot be read or ends too early, CorruptSampleError when the bytes are no members.
    """
    place, offset, size = manifest.locate(index)
    if isinstance(place, str):
        assert manifest.reader is not None, place
        shard = manifest.shard_of(index)
        content = manifest.reader.read(place, offset, offset + size, size=shard.bytes, sha256=shard.sha256)
    else:
        content = place.read_bytes() if manifest.pictures else os.pread(_descriptor(place, manifest.hash), size, offset)
    if len(content) < size:
        raise OSError(f"shard {place} ends within sample {index} (bytes {offset} to {offset + size}): it was truncated")
    if manifest.pictures:
        name, label = manifest.pictures[index]
        return name, {Path(place).suffix[1:].lower(): content, "cls": str(label).encode()}
    key = None
    members: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for member in tar:
                split = split_member(member.name) if member.isreg() else None
                if split is None:
                    continue
                if key not in (None, split[0]):
                    raise CorruptSampleError(
                        f"two keys in one sample, {key!r} and {split[0]!r}: the index is not the shard's"
                    )
                key = split[0]
                if split[1] in members:
                    raise CorruptSampleError(f"two members {split[1]} of one key: give each sample a key of its own")
                members[split[1]] = tar.extractfile(member).read()  # type: ignore[union-attr]  # a regular file has bytes
    except (tarfile.TarError, EOFError) as error:
        raise CorruptSampleError(f"no tar members at byte {offset} ({error})") from error
    if key is None:
        raise CorruptSampleError(f"no tar members at byte {offset}")
    return key, members


def open_sample(members: dict[str, bytes], classes: Sequence[str]) -> tuple[EncodedImage, int]:
    """The image and the label of a sample's members; raises CorruptSampleError.

    Without `classes` a label is optional, -1 stands for none; with them it must be one of 0 … len(classes) - 1.
    """
    extension = next((extension for extension in IMAGE_EXTENSIONS if extension in members), None)
    if extension is None:
        raise CorruptSampleError(f"no image among its members {sorted(members)}")
    label = decode_label(members, classes)
    return EncodedImage(members[extension]), label


def labelled(members: dict[str, bytes], classes: Sequence[str]) -> dict[str, Any]:
    """A sample of a picture and a class, as transforms take it: "image" and "label", as in open_sample."""
    image, label = open_sample(members, classes)
    return {"image": image, "label": label}


def filmed(members: dict[str, bytes], classes: Sequence[str]) -> dict[str, Any]:
    """As `labelled`, of a video: "image" is an EncodedVideo. Raises CorruptSampleError."""
    extension = next((extension for extension in VIDEO_EXTENSIONS if extension in members), None)
    if extension is None:
        raise CorruptSampleError(f"no video among its members {sorted(members)}")
    return {"image": EncodedVideo(members[extension]), "label": decode_label(members, classes)}


def with_map(members: dict[str, bytes], classes: Sequence[str]) -> dict[str, Any]:
    """A sample of a picture and the class of each of its pixels: "image", "map" (an EncodedMap), and "label", -1.

    Raises CorruptSampleError for one without a map, and EncodedMap.values for a map that is no such thing.
    """
    image, _ = open_sample(members, ())
    if MASK_EXTENSION not in members:
        raise CorruptSampleError(
            f"no map of classes among its members {sorted(members)}: it is called {MASK_EXTENSION}"
        )
    return {"image": image, "map": EncodedMap(members[MASK_EXTENSION]), "label": -1}


def decode_label(members: dict[str, bytes], classes: Sequence[str]) -> int:
    """The label of a sample's members, as in open_sample."""
    text = members.get("cls", b"" if classes else b"-1").decode("ascii", "replace").strip()
    try:
        label = int(text)
    except ValueError:
        raise CorruptSampleError(
            f"class {text!r} is no integer" if "cls" in members else "no class among its members"
        ) from None
    if classes and not 0 <= label < len(classes):
        raise CorruptSampleError(f"class {label} is not one of 0 to {len(classes) - 1}")
    return label


def _descriptor(path: Path, identity: str) -> int:
    """Open file of a shard, least recently used ones closed; pread shares no position, so forked workers may use it."""
    descriptor = _descriptors.pop((path, identity), None)
    if descriptor is None:
        if len(_descriptors) >= _OPEN_SHARDS:
            os.close(_descriptors.popitem(last=False)[1])
        descriptor = os.open(path, os.O_RDONLY)
    _descriptors[path, identity] = descriptor
    return descriptor


def verify(manifest: Manifest) -> list[str]:
    """Hashes every shard and decodes every sample; returns one line for each thing that is wrong.

    Two samples of one key are wrong too: nobody could tell them apart, and they would be augmented alike.
    """
    problems = []
    first: dict[bytes, int] = {}  # of each key, by a short hash of it
    for shard in progress_bar(manifest.shards, "hashing"):
        if shard.sha256 and _sha256_of(manifest, shard) != shard.sha256:
            problems.append(f"{shard.name}: contents differ from the manifest's sha256; copy or pack the shard again")
    for number in progress_bar(range(len(manifest)), "decoding"):
        key = f"sample {number}"
        try:
            key, members = read_sample(manifest, number)
            digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=10).digest()
            same = first.setdefault(digest, number)
            if same != number:
                raise CorruptSampleError(f"its key is also that of sample {same} in {manifest.shard_of(same).name}")
            _check_sample(members, manifest)
        except (CorruptSampleError, OSError) as error:
            problems.append(f"{manifest.shard_of(number).name}:{key}: {error}")
    return problems


def pixel_size(image: EncodedImage) -> tuple[int, int]:
    """(Y, X) of an image that decodes to its end."""
    _, height, width = image.pixels().shape
    return height, width


def _check_sample(members: dict[str, bytes], manifest: Manifest) -> tuple[tuple[int, int], int]:
    """Size (Y, X) of a sample's image or video, and its label, -1 for none.

    What a sample must have depends on the format that it was packed from. Raises CorruptSampleError.
    """
    layout = manifest.origin.get("format")
    if layout == "kinetics":
        video = filmed(members, manifest.classes)
        return video["image"].check(), video["label"]
    if layout not in ("coco", "ade20k"):
        image, label = open_sample(members, manifest.classes)
        return pixel_size(image), label
    image, _ = open_sample(members, ())
    size = pixel_size(image)
    try:
        if layout == "coco":
            facts = json.loads(members["json"])
            height, width = facts["height"], facts["width"]
            labels = [annotation["label"] for annotation in facts["annotations"]]
            if MASK_EXTENSION in members and EncodedMap(members[MASK_EXTENSION]).values().shape != (height, width):
                raise CorruptSampleError("its map of classes is of another size than its image")
        else:
            values = EncodedMap(members[MASK_EXTENSION]).values(len(manifest.classes))
            (height, width), labels = values.shape, []
    except CorruptSampleError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptSampleError(
            f"annotation is missing or does not decode ({type(error).__name__}: {error})"
        ) from error
    if size != (height, width):
        raise CorruptSampleError(f"image has {size[0]} x {size[1]} pixels, its annotation {height} x {width}")
    if not all(0 <= label < len(manifest.classes) for label in labels):
        raise CorruptSampleError(f"labels {labels} are not all one of 0 to {len(manifest.classes) - 1}")
    return size, -1


def _sha256_of(manifest: Manifest, shard: Shard) -> str:
    place = manifest.place(shard)
    if isinstance(place, Path):
        return sha256_of(place)
    assert manifest.reader is not None, place
    digest = hashlib.sha256()
    for block in manifest.reader.blocks(place, 0, shard.bytes, size=shard.bytes):
        digest.update(block)
    return digest.hexdigest()


def stats(manifest: Manifest, *, open_shards: int = OPEN_SHARDS, looked_at: int = 1000) -> dict[str, Any]:
    """Counts and sizes (bytes); image sizes (Y x X, pixels) and labels of `looked_at` evenly spaced samples.

    "mixing" is order.mixing: how often a sample follows one of its own shard.
    """
    sizes = [shard.bytes for shard in manifest.shards]
    extensions: Counter[str] = Counter()
    labels: Counter[str] = Counter()
    shapes = []
    corrupt = 0
    indices = np.unique(np.linspace(0, len(manifest) - 1, min(looked_at, len(manifest))).astype(np.int64))
    for number in indices.tolist():
        try:
            _, members = read_sample(manifest, number)
            shape, label = _check_sample(members, manifest)
        except CorruptSampleError:
            corrupt += 1
            continue
        extensions.update(members.keys())
        labels[manifest.classes[label] if manifest.classes and label >= 0 else str(label)] += 1
        shapes.append(shape)
    return {
        "samples": len(manifest),
        "shards": len(sizes),
        "bytes": sum(sizes),
        "shard_bytes": {"min": min(sizes), "max": max(sizes)},
        "bytes_per_sample": round(sum(sizes) / len(manifest)),
        "classes": len(manifest.classes),
        "hash": manifest.hash,
        "mixing": {"open_shards": open_shards, **mixing(manifest.samples_of_shards, open_shards=open_shards)},
        "looked_at": len(indices),
        "corrupt": corrupt,
        "members": dict(extensions),
        "labels": dict(sorted(labels.items())),
        "samples_per_class": manifest.samples_per_class,
        "height": _range(shape[0] for shape in shapes),
        "width": _range(shape[1] for shape in shapes),
    }


def _range(values: Iterable[int]) -> dict[str, int]:
    ordered = sorted(values)
    return {"min": ordered[0], "median": ordered[len(ordered) // 2], "max": ordered[-1]} if ordered else {}


def progress_bar(items: Sequence[T] | np.ndarray, description: str) -> Iterable[Any]:
    return track(items, description=description, console=Console(stderr=True), total=len(items))
