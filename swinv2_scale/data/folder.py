"""Plain folders of files, root/CLASS/…/picture.jpg: which samples they hold, and with which labels."""

import logging
from collections.abc import Collection
from pathlib import Path, PurePath
from typing import NamedTuple

log = logging.getLogger(__name__)

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "ppm", "pgm")
VIDEO_EXTENSIONS = ("mp4", "avi", "mkv", "webm")
MASK_EXTENSION = "seg.png"  # of the member that holds the class of each pixel


class Item(NamedTuple):
    """A sample: its members by extension, each as bytes or as the file that holds them.

    `label` is the number of its class where it has one; then `cls` is among the members.
    """

    key: str
    members: dict[str, Path | bytes]
    label: int | None = None


def one_file(key: str, extension: str, label: int | None, content: Path | bytes) -> Item:
    """A sample of one picture or video, with a member `cls` if it has a label."""
    return Item(key, {extension: content} if label is None else {extension: content, "cls": b"%d" % label}, label)


def sample_key(path: PurePath, taken: set[str]) -> str:
    """A key for the file at the relative `path` that is not among those `taken`, and now is.

    A key ends at the first dot of its last component, and a.jpg beside a.png must not become one sample.
    """
    key = (path.parent / path.stem.replace(".", "_")).as_posix()
    while key in taken:
        key += "~"
    taken.add(key)
    return key


def image_folder(root: Path) -> tuple[list[str], list[Item]]:
    """Classes and samples of a tree of images `root/class/…/name.jpg`; see class_folders."""
    return class_folders(root, IMAGE_EXTENSIONS, "images", "an image folder is SOURCE/class/name.jpg")


def class_folders(root: Path, extensions: Collection[str], kind: str, layout: str) -> tuple[list[str], list[Item]]:
    """Classes and samples of a tree `root/class/…/name.extension`, by sorted names; hidden files are not looked at.

    A class's label is its position among the sorted names. Where all names are numbers, as in ImageNet-V2, the label is
    the number, and the classes, of which some may be missing, are returned as nameless: []. Messages call the files
    `kind` and explain the tree as `layout`.

    Raises ValueError when there is no such file, and for a class whose files all have other extensions.
    """
    if not root.is_dir():
        raise ValueError(f"{root} is no directory; {layout}")
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise ValueError(f"{root} holds no class directories; {layout}")
    numbered = all(name.isascii() and name.isdigit() for name in classes)
    labels = {name: int(name) if numbered else position for position, name in enumerate(classes)}
    if len(set(labels.values())) < len(classes):
        twice = [name for name in classes if str(int(name)) != name]
        raise ValueError(f"{root} has two directories of the same number, one of them {twice[0]}: remove one")
    items: list[Item] = []
    taken: set[str] = set()
    others = [entry for entry in root.iterdir() if not entry.is_dir() and not entry.name.startswith(".")]
    for name in classes:
        wanted, strange = _files(root, name, extensions)
        if strange and not wanted:
            raise ValueError(
                f"{root / name} holds {len(strange)} files, the first {strange[0].name}, but no {kind} "
                f"({', '.join(extensions)}); convert them, or give the directory above the classes"
            )
        others += strange
        for path in wanted:
            key = sample_key(path.relative_to(root), taken)
            items.append(one_file(key, path.suffix[1:].lower(), labels[name], path))
    if not items:
        raise ValueError(
            f"{root} holds {len(classes)} class directories but no {kind} ({', '.join(extensions)}); {layout}"
        )
    _warn(root, kind, others, [name for name in classes if labels[name] not in {item.label for item in items}])
    return [] if numbered else classes, items


def _files(root: Path, name: str, extensions: Collection[str]) -> tuple[list[Path], list[Path]]:
    """The files of a class that have one of the extensions, and what else lies between them."""
    files = [path for path in sorted((root / name).rglob("*")) if path.is_file()]
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    wanted = [path for path in files if path.suffix[1:].lower() in extensions]
    return wanted, [path for path in files if path.suffix[1:].lower() not in extensions]


def _warn(root: Path, kind: str, others: list[Path], empty: list[str]) -> None:
    """Say what was left out: a folder that was not unpacked to its end would otherwise pass for a whole one."""
    if others:
        log.warning("%s: left out %d file(s) that are no %s of a class, such as %s", root, len(others), kind, others[0])
    if empty:
        log.warning("%s: %d class directories are empty, such as %s", root, len(empty), empty[0])
