"""What can be packed: the layouts in which data sets are published, as classes and samples.

    imagefolder   SOURCE/class/name.jpg, as ImageNet-1K and -22K
    csv           SOURCE is a table with a column `path` (absolute, or relative to the table), and `label` (numbers),
                  or `class` (names), or neither for images without labels
    coco          SOURCE is ROOT/annotations/instances_SPLIT.json, the images are in ROOT/SPLIT; maybe with maps of
                  COCO-Stuff, stuffthingmaps/SPLIT/name.png: the value c is class c, 255 is no class
    ade20k        SOURCE is ADEChallengeData2016/images/SPLIT, the masks are in ADEChallengeData2016/annotations/SPLIT
    kinetics      SOURCE/class/name.mp4; or SOURCE is the published table SPLIT.csv, with the videos anywhere below it,
                  or a list of lines "path label" without a header
    demo          images that ship inside Python packages, see demo.py

Members of a sample, beside `cls` where it has one label:

    imagefolder, csv, demo   the image, under its file's extension
    coco                     the image, and `json`: image_id, file_name, width, height, and `annotations` as published,
                             each with one more key, `label`: the position of its category in the manifest's classes;
                             and `seg.png` where there is a map of COCO-Stuff, as ade20k's
    ade20k                   the image, and `seg.png`: 0 is no class, the value v is classes[v - 1]
    kinetics                 the video, under its file's extension
"""

import csv
import io
import json
import logging
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PosixPath, PurePath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from swinv2_scale.data import demo
from swinv2_scale.data.coco import read_annotations
from swinv2_scale.data.folder import (
    IMAGE_EXTENSIONS,
    MASK_EXTENSION,
    VIDEO_EXTENSIONS,
    Item,
    class_folders,
    image_folder,
    one_file,
    sample_key,
)
from swinv2_scale.data.images import CorruptSampleError, EncodedMap
from swinv2_scale.data.videos import EncodedVideo

log = logging.getLogger(__name__)

FORMATS = ("imagefolder", "csv", "coco", "ade20k", "kinetics", "demo")


class Source(NamedTuple):
    """Class names ([]: nobody named them), samples, and what the manifest's origin must remember of the source."""

    classes: list[str]
    items: list[Item]
    facts: dict[str, Any] = {}  # noqa: RUF012  # never changed


class StuffMap(PosixPath):
    """The file of a map of COCO-Stuff, which is read as packed data has maps: the value c as c + 1, 255, none, as 0."""

    def read_bytes(self) -> bytes:
        """A PNG. Raises ValueError for what is no image of one value of 8 bits per pixel."""
        try:
            values = EncodedMap(super().read_bytes()).values().numpy()
        except CorruptSampleError as error:
            raise ValueError(f"{self}: {error}; get the map again, or remove it") from error
        buffer = io.BytesIO()
        Image.fromarray(values + np.uint8(1)).save(buffer, "PNG")  # in eight bits 255 + 1 is 0
        return buffer.getvalue()


def read_source(source: str, format: str, stuff: Path | None = None) -> Source:
    """What `source` holds, read as `format`, one of FORMATS; for coco, with the maps in the directory `stuff`.

    Raises ValueError for what is missing or malformed.
    """
    if stuff is not None and format != "coco":
        raise ValueError(f"maps of COCO-Stuff ({stuff}) belong to --format coco, not to {format}: leave them out")
    path = Path(source)
    if format == "imagefolder":
        return Source(*image_folder(path))
    if format == "csv":
        return image_table(path)
    if format == "coco":
        return coco(path, stuff)
    if format == "ade20k":
        return ade20k(path)
    if format == "kinetics":
        return kinetics(path)
    if format == "demo":
        return Source(*demo.samples(source))
    raise ValueError(f"there is no source format {format!r}; choose one of {', '.join(FORMATS)}")


def image_table(table: Path) -> Source:
    """The images of a CSV table with a header; of its columns, `path` and `label` or `class` are looked at.

    Class names get labels by their sorted order, so tables of several splits must name the same classes. Raises
    ValueError, with the line, for a missing column or file, an extension that is no image's, and a malformed label.
    """
    columns, rows = _read_table(table, ["path"])
    if {"label", "class"} <= set(columns):
        raise ValueError(f"{table} has a column `label` and a column `class`; rename the one that is not to be used")
    column = next((name for name in ("label", "class") if name in columns), None)
    samples: list[tuple[str, Path, str]] = []  # key, file, label or class
    taken: set[str] = set()
    for place, row in rows:
        relative = PurePath(row["path"])
        path = table.parent / relative
        if path.suffix[1:].lower() not in IMAGE_EXTENSIONS:
            raise ValueError(f"{place}: {row['path']!r} is no image ({', '.join(IMAGE_EXTENSIONS)}); convert it")
        if not path.is_file():
            raise ValueError(f"{place}: there is no file {path}; paths are absolute, or relative to the table")
        text = row[column] if column else ""
        if column == "label" and not (text.isascii() and text.isdigit()):
            raise ValueError(f"{place}: label {text!r} is no number from 0 on; names belong into a column `class`")
        if column == "class" and not text:
            raise ValueError(f"{place}: the class is empty; name it, or remove the line")
        below = PurePath(*(part for part in relative.parts if part not in (relative.anchor, "..")))
        samples.append((sample_key(below, taken), path, text))
    classes = sorted({text for _, _, text in samples}) if column == "class" else []
    number = {name: position for position, name in enumerate(classes)}
    return Source(
        classes,
        [
            one_file(key, path.suffix[1:].lower(), (number[text] if classes else int(text)) if column else None, path)
            for key, path, text in samples
        ],
    )


def coco(annotations: Path, stuff: Path | None = None) -> Source:
    """The images of a COCO annotation file, with or without annotations; classes are its categories in order of id.

    The categories' published ids, in the order of the classes, become `category_ids` of the origin. Images are looked
    for in the directory named like the file's last word (instances_train2017.json: train2017), beside the file or
    beside its directory. Of a directory `stuff` the maps are taken, NAME.png for NAME.jpg, and the origin has its path;
    images without a map are counted in a warning. Raises ValueError when an image is missing, when no image has a map
    in `stuff`, and as read_annotations does.
    """
    if annotations.suffix != ".json" or not annotations.is_file():
        raise ValueError(f"{annotations} is no COCO annotation file; give ROOT/annotations/instances_SPLIT.json")
    split = annotations.stem.rpartition("_")[2]
    places = [parent / split for parent in annotations.parents[:2]]
    root = next((place for place in places if place.is_dir()), None)
    if root is None:
        raise ValueError(
            f"the images of {annotations} are neither in {places[0]} nor in {places[1]}; move or link them there"
        )
    read = read_annotations(annotations)
    facts: dict[str, Any] = {"category_ids": read.category_ids}
    items = _coco_items(read.records, root, annotations)
    if stuff is None:
        return Source(read.classes, items, facts)
    stuff = stuff.expanduser().resolve()
    maps = [stuff / PurePath(record["file_name"]).with_suffix(".png") for record in read.records]
    missing = [path for path in maps if not path.is_file()]
    if len(missing) == len(maps):
        raise ValueError(
            f"{stuff} holds no map of these images, such as {missing[0].name}; give stuffthingmaps/{split}"
        )
    if missing:
        log.warning("%s: %d of %d images have no map, such as %s", stuff, len(missing), len(maps), missing[0].name)
    without = set(missing)
    items = [
        item if path in without else item._replace(members={**item.members, MASK_EXTENSION: StuffMap(path)})
        for item, path in zip(items, maps, strict=True)
    ]
    return Source(read.classes, items, {**facts, "stuff": str(stuff)})


def _coco_items(records: list[dict[str, Any]], root: Path, place: Path) -> list[Item]:
    """The images of an annotation file `place`, each with its record."""
    items: list[Item] = []
    taken: set[str] = set()
    missing: list[Path] = []
    for record in records:
        path = root / record["file_name"]
        if not path.is_file():
            missing.append(path)
        text = json.dumps(record, ensure_ascii=False)
        members: dict[str, Path | bytes] = {path.suffix[1:].lower(): path, "json": text.encode()}
        items.append(Item(sample_key(PurePath(record["file_name"]), taken), members))
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(items)} images of {place} are missing, the first {missing[0]}; "
            "unpack the images there"
        )
    return items


def ade20k(images: Path) -> Source:
    """The images of a directory ADEChallengeData2016/images/SPLIT with their masks, annotations/SPLIT/name.png.

    Class names are the last column of ADEChallengeData2016/objectInfo150.txt; without that file there are none.
    """
    root = images.parent.parent
    masks = root / "annotations" / images.name
    if images.parent.name != "images" or not images.is_dir():
        raise ValueError(f"{images} is no directory of ADE20K images; give ADEChallengeData2016/images/SPLIT")
    paths = [path for path in sorted(images.iterdir()) if path.suffix[1:].lower() in IMAGE_EXTENSIONS]
    missing = [path for path in paths if not (masks / f"{path.stem}.png").is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(paths)} images have no mask, the first of them {missing[0].name}: "
            f"there is no {masks / missing[0].stem}.png; unpack the annotations there"
        )
    taken: set[str] = set()
    items = []
    for path in paths:
        members: dict[str, Path | bytes] = {path.suffix[1:].lower(): path, MASK_EXTENSION: masks / f"{path.stem}.png"}
        items.append(Item(sample_key(PurePath(path.name), taken), members))
    table = root / "objectInfo150.txt"
    lines = table.read_text(encoding="utf-8").splitlines()[1:] if table.is_file() else []
    return Source([line.rpartition("\t")[2].strip() for line in lines if line.strip()], items)


def kinetics(source: Path) -> Source:
    """The videos of a tree `source/class/name.mp4` (see class_folders), of a published Kinetics table, or of a list.

    A table has the columns label, youtube_id, time_start, time_end (seconds). Its videos are called
    ID_START_END.mp4, numbers with six digits, in any directory below the table's, or, where that is called
    annotations, below the one above. Classes are all labels of the table, sorted. A list has lines "path label" or
    "path,label", paths absolute or relative to the list's directory, labels numbers.

    Videos that are not there are counted in a warning, as many have left the network since the tables were published,
    and so are those whose first frame does not decode; both are left out.
    """
    if not source.is_file() and source.suffix.lower() != ".csv":
        layout = "Kinetics is SOURCE/class/name.mp4, or a table of label,youtube_id,time_start,time_end, or a list"
        classes, items = class_folders(source, VIDEO_EXTENSIONS, "videos", layout)
        return Source(classes, _sound(items, source))
    if source.is_file() and "youtube_id" not in source.read_text("utf-8-sig", "replace").partition("\n")[0]:
        classes, wanted = [], _listed_videos(source)
    else:
        classes, wanted = _tabled_videos(source)
    items, missing = [], []
    taken: set[str] = set()
    for name, path, label in wanted:
        if path is None or not path.is_file():
            missing.append(name)
        else:
            below = PurePath(*(part for part in PurePath(name).parts if part not in (PurePath(name).anchor, "..")))
            items.append(one_file(sample_key(below, taken), path.suffix[1:].lower(), label, path))
    if not items:
        raise ValueError(
            f"none of the {len(missing)} videos of {source} is there, the first would be {missing[0]}; "
            "put the table or list above the videos"
            if missing
            else f"{source} lists no video; get it again"
        )
    if missing:
        log.warning(
            "%s: %d of %d videos are missing, such as %s; they are left out",
            *(source, len(missing), len(wanted), missing[0]),
        )
    return Source(classes, _sound(items, source))


def _tabled_videos(table: Path) -> tuple[list[str], list[tuple[str, Path | None, int]]]:
    """Classes of a published table; of each video class/name, its file, None where there is none, and its label."""
    rows = list(_read_table(table, ["label", "youtube_id", "time_start", "time_end"])[1])
    classes = sorted({row["label"] for _, row in rows})
    number = {name: position for position, name in enumerate(classes)}
    root = table.parent.parent if table.parent.name == "annotations" else table.parent
    found: dict[str, Path] = {}  # of several of one name the first: train/x.mp4 may have a sound copy replacement/x.mp4
    for path in sorted(root.rglob("*")):
        if path.suffix[1:].lower() in VIDEO_EXTENSIONS:
            found.setdefault(path.stem, path)
    videos: list[tuple[str, Path | None, int]] = []
    for place, row in rows:
        try:
            name = f"{row['youtube_id']}_{int(row['time_start']):06d}_{int(row['time_end']):06d}"
        except ValueError:
            raise ValueError(
                f"{place}: time_start {row['time_start']!r} and time_end {row['time_end']!r} must be whole seconds"
            ) from None
        file = found.get(name)
        below = f"{row['label'].replace('/', '_')}/{file.name if file else name + '.mp4'}"
        videos.append((below, file, number[row["label"]]))
    return classes, videos


def _listed_videos(table: Path) -> list[tuple[str, Path | None, int]]:
    """Of each video of a list, the path that it has there, its file, and its label."""
    videos: list[tuple[str, Path | None, int]] = []
    for number, line in enumerate(table.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        match = re.fullmatch(r"(.*?)\s*[,\s]\s*(\d+)", line.strip())
        if not match or PurePath(match[1]).suffix[1:].lower() not in VIDEO_EXTENSIONS:
            known = ", ".join(VIDEO_EXTENSIONS)
            raise ValueError(f'{table}, line {number}: {line!r} is no "path label" of a video ({known}) and a number')
        videos.append((match[1], table.parent / match[1], int(match[2])))
    return videos


def _sound(items: list[Item], source: Path) -> list[Item]:
    """Those whose video opens and has a first frame; a warning counts the others. ValueError if there are none."""

    def problem(item: Item) -> str:
        (path,) = (content for content in item.members.values() if isinstance(content, Path))
        try:
            EncodedVideo(path.read_bytes()).frames([0])
        except CorruptSampleError as error:
            return f"{path} ({error})"
        except OSError:
            return ""  # which packing says better
        return ""

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        problems = list(track(pool.map(problem, items), "opening videos", len(items), console=Console(stderr=True)))
    broken = [text for text in problems if text]
    if broken:
        log.warning(
            "%s: %d of %d videos are broken, such as %s; they are left out",
            *(source, len(broken), len(items), "; ".join(broken[:3])),
        )
    if len(broken) == len(items):
        raise ValueError(f"{source}: none of {len(items)} videos can be read, the first of them {broken[0]}")
    return [item for item, text in zip(items, problems, strict=True) if not text]


def _read_table(table: Path, needed: list[str]) -> tuple[list[str], Iterator[tuple[str, dict[str, str]]]]:
    """Column names of a CSV table, and its rows with their places for messages, "file, line 7"."""
    if not table.is_file():
        raise ValueError(f"{table} is no file; give a CSV table with the columns {', '.join(needed)}")
    try:
        text = table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{table} is not written in UTF-8 ({error}); convert it") from error
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey="")
    columns = list(reader.fieldnames or [])
    for name in needed:
        if name not in columns:
            raise ValueError(f"{table}, line 1: there is no column {name!r} among {columns}; name it in the header")
    return columns, _rows(table, reader)


def _rows(table: Path, reader: "csv.DictReader[str]") -> Iterator[tuple[str, dict[str, str]]]:
    for row in reader:
        place = f"{table}, line {reader.line_num}"
        if None in row.values() or "" in row:
            raise ValueError(f"{place}: it has not the columns of the header; put values with commas into quotes")
        yield place, {name: text.strip() for name, text in row.items()}
