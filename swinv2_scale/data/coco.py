"""COCO's files: annotations, results, and their evaluation by COCO's own code, pycocotools.

A *record* is all that a file says of one image, as `swinv2-scale data pack` puts it beside the image:

    image_id, file_name, width, height   as published, pixels
    annotations                          as published, each with one more key, `label`: its category's place among the
                                         sorted category ids, which may have gaps

A *result* is one detection in COCO's format: image_id, category_id, bbox (x, y, width, height), score, and with masks
`segmentation`, compressed RLE. An annotation's segmentation is a list of polygons, RLE, or nothing.
"""

import contextlib
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

Record = dict[str, Any]
Result = dict[str, Any]

_KINDS = {"box": "bbox", "mask": "segm"}
# What COCOeval.summarize prints, in its order.
_STATISTICS = (
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"),
)
_SHORTEST_POLYGON = 6  # numbers: three points. pycocotools would take four numbers for a box


class Annotations(NamedTuple):
    """A COCO annotation file: names and category ids of its classes, sorted by id, and a record for each image."""

    classes: list[str]
    category_ids: list[int]
    records: list[Record]


def read_annotations(path: Path) -> Annotations:
    """A COCO annotation file, checked. Images without objects have no annotations.

    Raises ValueError, naming the file and what is wrong in it: what is no such file, an annotation of an unknown image
    or category, a box that is not four finite numbers, and a segmentation that does not fit its image.
    """
    try:
        content = json.loads(path.read_bytes())
        categories = sorted(content["categories"], key=lambda category: category["id"])
        ids = [category["id"] for category in categories]
        records = _records(content, {number: place for place, number in enumerate(ids)}, path)
        return Annotations([category["name"] for category in categories], ids, records)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): give a COCO annotation file") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no COCO annotation file ({type(error).__name__}: {error}); get it again, or convert it"
        ) from error


def _records(content: dict[str, Any], labels: dict[int, int], path: Path) -> list[Record]:
    """The records of a parsed file; `labels` are by category id."""
    records = {}
    for image in content["images"]:
        if image["id"] in records:
            raise ValueError(f"{path}: two images have the id {image['id']}; give each its own")
        facts = {key: image[key] for key in ("file_name", "width", "height")}
        records[image["id"]] = {"image_id": image["id"], **facts, "annotations": []}
    for annotation in content.get("annotations", ()):
        if annotation["image_id"] not in records or annotation["category_id"] not in labels:
            raise ValueError(
                f"{path}: annotation {annotation['id']} is of image {annotation['image_id']} and category "
                f"{annotation['category_id']}, which are not both in the file; it is damaged, get it again"
            )
        record = records[annotation["image_id"]]
        check_annotation(annotation, record["height"], record["width"], str(path))
        record["annotations"].append({**annotation, "label": labels[annotation["category_id"]]})
    return list(records.values())


def check_annotation(annotation: dict[str, Any], rows: int, columns: int, place: str) -> None:
    """Raises ValueError, naming `place` and the annotation's id, for a box or a segmentation that cannot be one."""
    where = f"{place}: annotation {annotation.get('id')}"
    box = annotation.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(_is_finite(value) for value in box)):
        raise ValueError(f"{where} has bbox {box!r}, which is not [x, y, width, height]; correct or remove it")
    segmentation = annotation.get("segmentation") or []
    if isinstance(segmentation, list):
        for polygon in segmentation:
            if not isinstance(polygon, list) or len(polygon) % 2 or not all(_is_finite(value) for value in polygon):
                raise ValueError(f"{where} has a polygon that is not [x, y, x, y, …]; correct or remove it")
        return
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        raise ValueError(
            f"{where} has a segmentation that is neither polygons nor RLE with size and counts; correct it"
        )
    if list(segmentation["size"]) != [rows, columns]:
        raise ValueError(
            f"{where} has RLE of size {segmentation['size']} and its image has {rows} rows and {columns} columns; "
            "masks must be drawn at the size of the image: convert them, or correct the image's width and height"
        )
    try:
        runs = segmentation["counts"]
        runs = _runs(runs) if isinstance(runs, str) else [int(run) for run in runs]
    except (IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{where} has RLE whose counts do not decode ({error}); they are damaged") from error
    if sum(runs) != rows * columns or min(runs, default=0) < 0:
        raise ValueError(
            f"{where} has RLE of {sum(runs)} pixels and its image has {rows * columns}; the counts are damaged"
        )


def _runs(counts: str) -> list[int]:
    """The runs that a string of COCO's compressed RLE stands for.

    A number is written in groups of 5 bits, the lowest first, each plus 48 as a character, plus 32 if another follows;
    bit 16 of the last is the sign. From the third run on it is the difference to the last run but one.
    """
    runs: list[int] = []
    place = 0
    while place < len(counts):
        value, shift, more = 0, 0, True
        while more:
            group = ord(counts[place]) - 48
            value |= (group & 31) << shift
            place, shift, more = place + 1, shift + 5, bool(group & 32)
        if group & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    return runs


def run_lengths(annotation: dict[str, Any], rows: int, columns: int, place: str) -> dict[str, Any] | None:
    """An annotation's segmentation as compressed RLE of its image, or None where it has none.

    Polygons of fewer than three points enclose nothing and are left out. Raises ValueError as check_annotation does.
    """
    check_annotation(annotation, rows, columns, place)
    segmentation = annotation.get("segmentation") or []
    rle_code = _pycocotools().mask
    if isinstance(segmentation, list):
        polygons = [polygon for polygon in segmentation if len(polygon) >= _SHORTEST_POLYGON]
        return rle_code.merge(rle_code.frPyObjects(polygons, rows, columns)) if polygons else None
    if isinstance(segmentation["counts"], list):
        return rle_code.frPyObjects(segmentation, rows, columns)
    return segmentation


def target(record: Record, place: str, *, masks: bool) -> dict[str, torch.Tensor]:
    """What a detector learns from an image: boxes (N, 4), labels, crowd (C, 4); with `masks`, masks and has_mask.

    Boxes are x1, y1, x2, y2 in pixels, inside the image; those without extent there are left out. masks: uint8
    (N, Y, X), left out too where no object of the image has one, unless the image has no objects; a mask without
    pixels counts as none. `place` names the record in errors, which are ValueError as of run_lengths.
    """
    rows, columns = record["height"], record["width"]
    boxes: list[list[float]] = []
    labels: list[int] = []
    crowd: list[list[float]] = []
    drawn: list[np.ndarray | None] = []
    for annotation in record["annotations"]:
        check_annotation(annotation, rows, columns, place)
        x, y, width, height = (float(value) for value in annotation["bbox"])
        box = [max(x, 0.0), max(y, 0.0), min(x + width, float(columns)), min(y + height, float(rows))]
        if box[2] <= box[0] or box[3] <= box[1]:
            continue
        if annotation.get("iscrowd", 0):
            crowd.append(box)
            continue
        boxes.append(box)
        labels.append(annotation["label"])
        code = run_lengths(annotation, rows, columns, place) if masks else None
        mask = _pycocotools().mask.decode(code) if code is not None else None
        drawn.append(mask if mask is not None and mask.any() else None)
    found: dict[str, torch.Tensor] = {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "crowd": torch.tensor(crowd, dtype=torch.float32).reshape(-1, 4),
    }
    if masks and (not drawn or any(mask is not None for mask in drawn)):
        empty = np.zeros((rows, columns), dtype=np.uint8)
        stack = [empty if mask is None else mask for mask in drawn]
        found["masks"] = (
            torch.from_numpy(np.stack(stack)) if stack else torch.zeros(0, rows, columns, dtype=torch.uint8)
        )
        found["has_mask"] = torch.tensor([mask is not None for mask in drawn], dtype=torch.bool)
    return found


def results(
    image_id: int,
    boxes: torch.Tensor,
    scores: torch.Tensor,
    labels: torch.Tensor,
    masks: torch.Tensor | None,
    category_ids: Sequence[int],
) -> list[Result]:
    """The detections of an image in COCO's format.

    boxes (R, 4) x1, y1, x2, y2 and masks (R, Y, X), 0 or 1, of the image as published; labels (R,) are places among
    `category_ids`.
    """
    corners = boxes.double().cpu()
    sides = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1).tolist()
    found = [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": side, "score": score}
        for side, score, label in zip(sides, scores.double().tolist(), labels.tolist(), strict=True)
    ]
    if masks is not None:
        for result, mask in zip(found, masks.to("cpu", torch.uint8), strict=True):
            code = _pycocotools().mask.encode(np.asfortranarray(mask.numpy()))
            result["segmentation"] = {"size": list(code["size"]), "counts": code["counts"].decode("ascii")}
    return found


def write_results(path: Path, found: Sequence[Result]) -> None:
    """A file of results as COCO's tools and its evaluation server read it."""
    path.write_text(json.dumps(list(found)) + "\n")


def evaluate(
    records: Sequence[Record], found: Sequence[Result], category_ids: Sequence[int], *, kinds: Sequence[str]
) -> dict[str, float]:
    """COCO's numbers for results on the images of `records`: box_ap, box_ap50, …, and mask_ap, … if kinds name them.

    kinds: of "box" and "mask". Numbers that COCO does not define, for want of objects, are -1, as there. Images without
    results count as images where nothing was found. Raises ValueError for a result of another image.
    """
    known = {record["image_id"] for record in records}
    strange = next((result["image_id"] for result in found if result["image_id"] not in known), None)
    if strange is not None:
        raise ValueError(
            f"there are results of image {strange!r}, which is not among the {len(known)} that are evaluated"
        )
    numbers: dict[str, float] = {}
    evaluation_of = _pycocotools().cocoeval.COCOeval
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        for kind in kinds:
            truth = _truth(records, category_ids, masks=kind == "mask")
            evaluation = evaluation_of(truth, _loaded(truth, found, masks=kind == "mask"), _KINDS[kind])
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            named = zip(_STATISTICS, evaluation.stats, strict=True)
            numbers |= {f"{kind}_{name}": float(value) for name, value in named}
    return numbers


def _truth(records: Sequence[Record], category_ids: Sequence[int], *, masks: bool) -> Any:
    """The annotations of all records as COCO's code holds them; ids are numbers from 1 on, which it needs."""
    annotations: list[dict[str, Any]] = []
    for record in records:
        rows, columns = record["height"], record["width"]
        for published in record["annotations"]:
            place = f"image {record['image_id']} ({record['file_name']})"
            annotation = {key: value for key, value in published.items() if key not in ("label", "segmentation")}
            annotation |= {"id": len(annotations) + 1, "image_id": record["image_id"]}
            annotation |= {"iscrowd": published.get("iscrowd", 0)}
            annotation.setdefault("area", published["bbox"][2] * published["bbox"][3])
            if masks:
                code = run_lengths(published, rows, columns, place)
                nothing = np.zeros((rows, columns), dtype=np.uint8, order="F")
                annotation["segmentation"] = _pycocotools().mask.encode(nothing) if code is None else code
            annotations.append(annotation)
    images = [{"id": record["image_id"], **{key: record[key] for key in ("width", "height")}} for record in records]
    return _indexed({"images": images, "annotations": annotations, "categories": [{"id": n} for n in category_ids]})


def _loaded(truth: Any, found: Sequence[Result], *, masks: bool) -> Any:
    """Results as COCO's code holds them. With masks their areas count, for which it must not see the boxes."""
    hidden = "bbox" if masks else "segmentation"
    shown = [{key: value for key, value in result.items() if key != hidden} for result in found]
    if shown:
        return truth.loadRes(shown)
    return _indexed({**truth.dataset, "annotations": []})  # loadRes looks at the first of them


def _indexed(dataset: dict[str, Any]) -> Any:
    coco = _pycocotools().coco.COCO()
    coco.dataset = dataset
    coco.createIndex()
    return coco


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _pycocotools() -> Any:
    """The package, with its modules: data can be packed without it."""
    try:
        import pycocotools.coco
        import pycocotools.cocoeval
        import pycocotools.mask
    except ImportError as error:
        raise ValueError(
            f"COCO's masks and its evaluation need the package pycocotools ({error}); "
            "`pip install 'swinv2-scale[detection]'`"
        ) from error
    return pycocotools
