"""Plain folders of pictures, root/CLASS/…/picture.jpg: which samples they hold, and with which labels."""

import logging
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger(__name__)

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "ppm", "pgm")


class Item(NamedTuple):
    """A sample: `content` is the encoded image, or the file that holds it."""

    key: str
    extension: str
    label: int
    content: Path | bytes


def image_folder(root: Path) -> tuple[list[str], list[Item]]:
    """Classes and samples of a tree `root/class/…/name.jpg`, by sorted names; hidden files are not looked at.

    A class's label is its position among the sorted names. Where all names are numbers, as in ImageNet-V2, the label is
    the number, and the classes, of which some may be missing, are returned as nameless: [].

    Raises ValueError when there is no image, and for a class whose files all have other extensions than images.
    """
    if not root.is_dir():
        raise ValueError(f"{root} is no directory; an image folder is SOURCE/class/name.jpg")
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise ValueError(f"{root} holds no class directories; an image folder is SOURCE/class/name.jpg")
    numbered = all(name.isascii() and name.isdigit() for name in classes)
    labels = {name: int(name) if numbered else position for position, name in enumerate(classes)}
    if len(set(labels.values())) < len(classes):
        twice = [name for name in classes if str(int(name)) != name]
        raise ValueError(f"{root} has two directories of the same number, one of them {twice[0]}: remove one")
    items: list[Item] = []
    taken: set[str] = set()
    others = [entry for entry in root.iterdir() if not entry.is_dir() and not entry.name.startswith(".")]
    for name in classes:
        images, strange = _files(root, name)
        if strange and not images:
            raise ValueError(
                f"{root / name} holds {len(strange)} files, the first {strange[0].name}, but no images "
                f"({', '.join(IMAGE_EXTENSIONS)}); convert them, or give the directory above the classes"
            )
        others += strange
        for path in images:
            # A key ends at the first dot of its last component, and a.jpg beside a.png must not become one sample.
            key = f"{path.relative_to(root).parent.as_posix()}/{path.stem.replace('.', '_')}"
            while key in taken:
                key += "~"
            taken.add(key)
            items.append(Item(key, path.suffix[1:].lower(), labels[name], path))
    if not items:
        raise ValueError(
            f"{root} holds {len(classes)} class directories but no images ({', '.join(IMAGE_EXTENSIONS)}); "
            "an image folder is SOURCE/class/name.jpg"
        )
    _warn(root, others, [name for name in classes if labels[name] not in {item.label for item in items}])
    return [] if numbered else classes, items


def _files(root: Path, name: str) -> tuple[list[Path], list[Path]]:
    """The images of a class, and what else lies between them."""
    files = [path for path in sorted((root / name).rglob("*")) if path.is_file()]
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    images = [path for path in files if path.suffix[1:].lower() in IMAGE_EXTENSIONS]
    return images, [path for path in files if path.suffix[1:].lower() not in IMAGE_EXTENSIONS]


def _warn(root: Path, others: list[Path], empty: list[str]) -> None:
    """Say what was left out: a folder that was not unpacked to its end would otherwise pass for a whole one."""
    if others:
        log.warning("%s: left out %d file(s) that are no images of a class, such as %s", root, len(others), others[0])
    if empty:
        log.warning("%s: %d class directories are empty, such as %s", root, len(empty), empty[0])
