"""COCO's files: what is read out of annotations, what is written, and that the numbers are COCO's own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as rle_code
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from swinv2_scale.data import coco

ROWS, COLUMNS = 40, 60
IDS = [3, 5, 90]  # of categories, with gaps
STATISTICS = ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"]
STATISTICS += ["ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"]


def rectangle(x: int, y: int, width: int, height: int, *, scale: int = 1) -> np.ndarray:
    mask = np.zeros((ROWS * scale, COLUMNS * scale), dtype=np.uint8, order="F")
    mask[y : y + height, x : x + width] = 1
    return mask


def uncompressed(mask: np.ndarray) -> dict[str, Any]:
    """RLE of a mask, run by run down its columns, beginning with zeros."""
    counts, value, run = [], 0, 0
    for pixel in mask.flatten(order="F").tolist():
        if pixel != value:
            counts.append(run)
            value, run = pixel, 0
        run += 1
    return {"size": list(mask.shape), "counts": [*counts, run]}


def compressed(mask: np.ndarray) -> dict[str, Any]:
    code = rle_code.encode(mask)
    return {"size": list(code["size"]), "counts": code["counts"].decode()}


def annotation(number: int, box: list[float], segmentation: Any, **more: Any) -> dict[str, Any]:
    facts = {"id": number, "image_id": 7, "category_id": 5, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
    return {**facts, "segmentation": segmentation, **more}


def content(annotations: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "images": [{"id": n, "file_name": f"{n}.jpg", "width": COLUMNS, "height": ROWS} for n in (7, 8)],
        "annotations": annotations,
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 3, "name": "car"}, {"id": 5, "name": "dög"}],
    }


def read(path: Path, annotations: list[dict[str, Any]]) -> coco.Annotations:
    path.write_text(json.dumps(content(annotations)))
    return coco.read_annotations(path)


def target(path: Path, annotations: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return coco.target(read(path, annotations).records[0], "here", masks=True)


def test_classes_are_categories_in_order_of_id(tmp_path):
    found = read(tmp_path / "a.json", [annotation(1, [1, 2, 3, 4], [], category_id=90)])
    assert (found.classes, found.category_ids) == (["car", "dög", "toothbrush"], IDS)
    assert [record["image_id"] for record in found.records] == [7, 8]
    assert found.records[0]["annotations"][0]["label"] == 2
    assert found.records[1]["annotations"] == []


def test_masks_of_every_kind(tmp_path):
    mask = rectangle(10, 5, 20, 8)
    polygon = [[10, 5, 30, 5, 30, 13, 10, 13]]
    kinds = [
        polygon,
        uncompressed(mask),
        compressed(mask),
        [[10, 5, 20, 5, 20, 13, 10, 13], [20, 5, 30, 5, 30, 13, 20, 13]],
    ]
    found = target(tmp_path / "a.json", [annotation(n, [10, 5, 20, 8], kind) for n, kind in enumerate(kinds, 1)])
    assert found["boxes"].tolist() == [[10, 5, 30, 13]] * 4
    assert found["labels"].tolist() == [1] * 4
    assert found["has_mask"].tolist() == [True] * 4
    for one in found["masks"]:
        assert np.array_equal(one.numpy(), mask)


def test_crowds_are_no_objects_and_boxes_without_extent_are_left_out(tmp_path):
    mask = rectangle(0, 0, 9, 9)
    found = target(
        tmp_path / "a.json",
        [
            annotation(1, [0, 0, 9, 9], uncompressed(mask), iscrowd=1),
            annotation(2, [5, 5, 0, 10], []),
            annotation(3, [5, 5, 10, -1], []),
            annotation(4, [70, 5, 10, 10], []),  # beside the image
            annotation(5, [50, 30, 20, 20], compressed(rectangle(50, 30, 10, 10))),  # half beside it
        ],
    )
    assert found["crowd"].tolist() == [[0, 0, 9, 9]]
    assert found["boxes"].tolist() == [[50, 30, 60, 40]]
    assert found["has_mask"].tolist() == [True]


def test_objects_without_masks(tmp_path):
    empty = compressed(np.zeros((ROWS, COLUMNS), dtype=np.uint8, order="F"))
    nothing = [[], None, empty, [[1, 1, 5, 5]], uncompressed(rectangle(0, 0, 0, 0))]  # the fourth has two points
    without = [annotation(n, [1, 1, 5, 5], kind) for n, kind in enumerate(nothing, 1)]
    del without[1]["segmentation"]
    assert "masks" not in target(tmp_path / "a.json", without)
    found = target(tmp_path / "a.json", [*without, annotation(6, [1, 1, 5, 5], compressed(rectangle(1, 1, 5, 5)))])
    assert found["has_mask"].tolist() == [False] * 5 + [True]
    assert found["masks"].sum(dim=(1, 2)).tolist() == [0, 0, 0, 0, 0, 25]


def test_an_image_without_objects(tmp_path):
    found = target(tmp_path / "a.json", [])
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    assert shapes == {"boxes": (0, 4), "labels": (0,), "crowd": (0, 4), "masks": (0, ROWS, COLUMNS), "has_mask": (0,)}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"segmentation": compressed(np.zeros((5, 6), dtype=np.uint8, order="F"))},
            r"RLE of size \[5, 6\].* 40 rows and 60",
        ),
        ({"segmentation": {"size": [COLUMNS, ROWS], "counts": [ROWS * COLUMNS]}}, r"RLE of size \[60, 40\]"),
        ({"segmentation": {"size": [ROWS, COLUMNS], "counts": [5, 5]}}, "RLE of 10 pixels and its image has 2400"),
        ({"segmentation": {"size": [ROWS, COLUMNS], "counts": "0000"}}, "RLE of 0 pixels and its image has 2400"),
        ({"segmentation": {"size": [ROWS, COLUMNS], "counts": "P"}}, "counts do not decode"),
        ({"segmentation": {"size": [ROWS, COLUMNS], "counts": [2410, -10]}}, "RLE of 2400 pixels"),
        ({"segmentation": {"size": [ROWS, COLUMNS]}}, "neither polygons nor RLE"),
        ({"segmentation": "a string"}, "neither polygons nor RLE"),
        ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "polygon that is not"),
        ({"segmentation": [[1, 2, 3, 4, 5, None]]}, "polygon that is not"),
        ({"bbox": [1, 2, 3]}, "which is not"),
        ({"bbox": [1, 2, 3, float("nan")]}, "which is not"),
        ({"bbox": None}, "which is not"),
        ({"image_id": 9}, "annotation 12 is of image 9 and category 5"),
        ({"category_id": 4}, "annotation 12 is of image 7 and category 4"),
    ],
)
def test_what_is_wrong_is_named_with_its_file(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=rf"a\.json: annotation 12 .*{message.removeprefix('annotation 12 ')}"):
        read(tmp_path / "a.json", [annotation(12, [1, 1, 5, 5], []) | wrong])


@pytest.mark.parametrize("seed", range(5))
def test_compressed_runs(seed):
    random = np.random.default_rng(seed)
    mask = np.asfortranarray(random.random((ROWS, COLUMNS)) < 0.1 + 0.2 * seed).astype(np.uint8, order="F")
    runs = coco._runs(compressed(mask)["counts"])
    assert runs == uncompressed(mask)["counts"]


@pytest.mark.parametrize("text", ["[", "[]", "{}", '{"images": 3, "categories": []}'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json is no COCO annotation file"):
        coco.read_annotations(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"b\.json cannot be read"):
        coco.read_annotations(tmp_path / "b.json")


# ----------------------------------------------------------------------------------------------------------- results


def scenes(random: np.random.Generator, images: int, *, masks: bool) -> dict[str, Any]:
    """An annotation file of random objects, some of them crowds, in images some of which have none.

    Each fills the left half of its box, so that many are small as masks and medium as boxes.
    """
    annotations = []
    for image in range(images):
        for _ in range(random.integers(0, 6)):
            x, y = int(random.integers(0, 3 * COLUMNS - 60)), int(random.integers(0, 3 * ROWS - 60))
            width, height = (int(value) for value in random.integers(20, 60, 2))
            one = annotation(len(annotations) + 1, [x, y, width, height], [], image_id=10 + image)
            one |= {"category_id": IDS[random.integers(3)], "iscrowd": int(random.random() < 0.15)}
            if masks:
                mask = rectangle(x, y, width // 2, height, scale=3)
                kind = compressed if one["iscrowd"] or random.random() < 0.5 else polygon_of
                one |= {"segmentation": kind(mask), "area": width // 2 * height}
            annotations.append(one)
    size = {"width": 3 * COLUMNS, "height": 3 * ROWS}
    pictures = [{"id": 10 + n, "file_name": f"{n}.jpg", **size} for n in range(images)]
    return {**content(annotations), "images": pictures}


def polygon_of(mask: np.ndarray) -> list[list[float]]:
    x, y, width, height = rle_code.toBbox(rle_code.encode(mask)).tolist()
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def guesses(random: np.random.Generator, truth: dict[str, Any], *, perfect: bool) -> list[coco.Result]:
    """Results near the objects, and others anywhere; or exactly the objects."""
    found: list[coco.Result] = []
    for image in truth["images"]:
        objects = [
            one for one in truth["annotations"] if one["image_id"] == image["id"] and not (perfect and one["iscrowd"])
        ]
        shifts = random.normal(0, 0.0 if perfect else 4.0, (len(objects), 4))
        sides = [np.array(one["bbox"]) + shift for one, shift in zip(objects, shifts, strict=True)]
        labels = [IDS.index(one["category_id"]) for one in objects]
        if not perfect:
            sides += [np.array([random.integers(0, 100), random.integers(0, 60), 40, 40]) for _ in range(3)]
            labels += random.integers(0, 3, 3).tolist()
        corners = torch.tensor(np.array(sides).reshape(-1, 4))
        corners[:, 2:] = corners[:, :2] + corners[:, 2:].clamp(min=1)
        masks = torch.zeros(len(sides), image["height"], image["width"], dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, corners.round().int().tolist(), strict=True):
            mask[max(0, y1) : y2, max(0, x1) : max(0, x1) + (x2 - x1) // 2] = 1
        scores = torch.from_numpy(random.random(len(sides)))
        found += coco.results(image["id"], corners, scores, torch.tensor(labels, dtype=torch.int64), masks, IDS)
    return found


def directly(directory: Path, truth: dict[str, Any], found: list[coco.Result], kind: str) -> dict[str, float]:
    """The numbers as anybody computes them from two files."""
    (directory / "truth.json").write_text(json.dumps(truth))
    shown = [{k: v for k, v in one.items() if k != ("bbox" if kind == "mask" else "segmentation")} for one in found]
    coco.write_results(directory / "results.json", shown)
    published = COCO(str(directory / "truth.json"))
    evaluation = COCOeval(
        published, published.loadRes(str(directory / "results.json")), {"box": "bbox", "mask": "segm"}[kind]
    )
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return {f"{kind}_{name}": float(value) for name, value in zip(STATISTICS, evaluation.stats, strict=True)}


@pytest.mark.parametrize("perfect", [False, True])
def test_numbers_are_those_of_pycocotools_itself(tmp_path, perfect):
    random = np.random.default_rng(3)
    truth = scenes(random, 12, masks=True)
    found = guesses(random, truth, perfect=perfect)
    (tmp_path / "read.json").write_text(json.dumps(truth))
    records = coco.read_annotations(tmp_path / "read.json").records
    before = json.dumps([records, found])
    numbers = coco.evaluate(records, found, IDS, kinds=["box", "mask"])
    expected = directly(tmp_path, truth, found, "box") | directly(tmp_path, truth, found, "mask")
    assert numbers == expected
    assert json.dumps([records, found]) == before  # nothing was changed in passing
    if perfect:
        assert numbers["box_ap"] == numbers["mask_ap"] == pytest.approx(1.0)
    else:
        assert 0.05 < numbers["mask_ap"] < numbers["box_ap50"] < 0.95
    # in whatever order ranks bring their parts
    order = random.permutation(len(found)).tolist()
    shuffled = [records[n] for n in random.permutation(len(records))]
    again = coco.evaluate(shuffled, [found[n] for n in order], IDS, kinds=["box", "mask"])
    assert again == pytest.approx(numbers, abs=1e-12)


def test_nothing_found_and_nothing_there(tmp_path):
    truth = scenes(np.random.default_rng(3), 4, masks=False)
    (tmp_path / "read.json").write_text(json.dumps(truth))
    records = coco.read_annotations(tmp_path / "read.json").records
    numbers = coco.evaluate(records, [], IDS, kinds=["box"])
    assert (numbers["box_ap"], numbers["box_ar100"], numbers["box_ap_large"]) == (0.0, 0.0, -1.0)
    assert len(numbers) == 12
    empty = [{**record, "annotations": []} for record in records]
    assert set(coco.evaluate(empty, [], IDS, kinds=["box", "mask"]).values()) == {-1.0}
    stray = coco.results(99, torch.tensor([[1.0, 2, 3, 4]]), torch.ones(1), torch.tensor([0]), None, IDS)
    with pytest.raises(ValueError, match="results of image 99, which is not among the 4"):
        coco.evaluate(records, stray, IDS, kinds=["box"])


def test_a_results_file_is_read_by_cocos_tools(tmp_path):
    truth = scenes(np.random.default_rng(3), 4, masks=True)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    mask = rectangle(4, 5, 6, 7, scale=3)
    boxes, scores = torch.tensor([[4.0, 5.0, 10.0, 12.0]]), torch.tensor([0.5])
    found = coco.results(11, boxes, scores, torch.tensor([2]), torch.from_numpy(mask)[None], IDS)
    assert found[0] | {"segmentation": None} == {
        **{"image_id": 11, "category_id": 90, "bbox": [4.0, 5.0, 6.0, 7.0], "score": 0.5},
        "segmentation": None,
    }
    coco.write_results(tmp_path / "results.json", found)
    published = COCO(str(tmp_path / "truth.json"))
    loaded = published.loadRes(str(tmp_path / "results.json"))
    assert np.array_equal(loaded.annToMask(loaded.loadAnns([1])[0]), mask)
