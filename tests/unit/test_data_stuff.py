"""Maps of COCO-Stuff, packed beside COCO's images, are what a detector's semantic branch learns."""

import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from swinv2_scale.cli import main
from swinv2_scale.data.boxes import IGNORED, DetectionTransform, collate_boxes, with_record
from swinv2_scale.data.manifest import Manifest, open_manifest
from swinv2_scale.data.shards import read_sample, verify
from swinv2_scale.models.detection.cascade import semantic_loss

ROWS, COLUMNS = 24, 40
PLAIN: dict[str, Any] = {"scale": (1.0, 1.0), "flip": 0.0, "masks": True, "object_jitter": 0.0}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three images, of which the first two have maps with classes 0 to 181 and 255 for none."""
    random = np.random.default_rng(0)
    for name in ("annotations", "val2017", "stuffthingmaps/val2017"):
        (tmp_path / name).mkdir(parents=True)
    images = []
    for number in range(3):
        pixels = random.integers(0, 256, (ROWS, COLUMNS, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"val2017/{number:012d}.png")
        images.append({"id": number, "file_name": f"{number:012d}.png", "width": COLUMNS, "height": ROWS})
        if number < 2:
            values = random.choice(np.array([0, 1, 181, 255], np.uint8), (ROWS, COLUMNS))
            Image.fromarray(values).save(tmp_path / f"stuffthingmaps/val2017/{number:012d}.png")
    content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "person"}]}
    (tmp_path / "annotations/instances_val2017.json").write_text(json.dumps(content))
    return tmp_path


def packed(source: Path, name: str = "shards", *options: str, stuff: str = "stuffthingmaps/val2017") -> Manifest:
    file, target = str(source / "annotations/instances_val2017.json"), str(source / name)
    chosen = ["--stuff", str(source / stuff)] if stuff else []
    assert main(["data", "pack", file, target, "--format", "coco", *chosen, *options]) == 0
    return open_manifest(target)


def test_classes_count_from_one_and_none_is_zero(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    manifest = packed(source, "shards", "--jobs", "2", "--shard-size", "2")
    assert "1 of 3 images have no map, such as 000000000002.png" in caplog.text
    assert verify(manifest) == []
    samples = dict(read_sample(manifest, index) for index in range(3))
    assert {key: "seg.png" in members for key, members in samples.items()} == {
        f"{number:012d}": number < 2 for number in range(3)
    }
    for key, members in samples.items():
        sample = {
            **with_record(members, manifest.classes),
            "key": key,
            "draw": 0,
            "chance": 0.5,
            "corrupt": [],
            "reads": [],
        }
        example = DetectionTransform(image_size=COLUMNS, **PLAIN)(sample)
        if "seg.png" not in members:
            assert "semantic" not in example["target"]
            continue
        with (
            Image.open(source / f"stuffthingmaps/val2017/{key}.png") as published,
            Image.open(io.BytesIO(members["seg.png"])) as stored,
        ):
            wanted, written = np.array(published), np.array(stored)
        assert np.array_equal(written, np.where(wanted == 255, 0, wanted.astype(int) + 1))
        assert np.array_equal(example["target"]["semantic"], np.where(wanted == 255, IGNORED, wanted))
        batch = collate_boxes([example])
        right = torch.full((1, 182, 4, 8), -20.0)  # logits at stride 8 of 32 x 64 pixels
        label = batch["target"][0]["semantic"][4::8, 4::8]
        known = label != IGNORED
        rows, columns = torch.where(known)
        right[0, label[known], rows, columns] = 20.0
        assert known.any() and semantic_loss(right, batch["target"]) < 1e-6
        assert semantic_loss(-right, batch["target"]) > 1


def test_maps_are_part_of_what_a_directory_was_packed_from(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = packed(source)
    assert manifest.origin["stuff"] == str(source / "stuffthingmaps/val2017")
    packed(source)  # the same again
    file = str(source / "annotations/instances_val2017.json")
    assert main(["data", "pack", file, str(source / "shards"), "--format", "coco"]) == 2
    assert "was packed with" in capsys.readouterr().err
    assert "stuff" not in packed(source, "plain", stuff="").origin


def test_maps_that_cannot_be_used(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, target = str(source / "annotations/instances_val2017.json"), str(source / "new")

    def refused(*options: str) -> str:
        assert main(["data", "pack", file, target, *options, "--stuff", str(source / "stuffthingmaps/val2017")]) == 2
        return capsys.readouterr().err

    assert "belong to --format coco, not to imagefolder" in refused("--format", "imagefolder")
    one = source / "stuffthingmaps/val2017/000000000000.png"
    Image.new("RGB", (COLUMNS, ROWS)).save(one)
    assert "000000000000.png: map of classes does not decode (mode RGB" in refused("--format", "coco")
    Image.new("L", (COLUMNS, ROWS + 1)).save(one)
    (problem,) = verify(packed(source))
    assert "000000000000: its map of classes is of another size than its image" in problem
    for path in (source / "stuffthingmaps/val2017").iterdir():
        path.unlink()
    assert "holds no map of these images, such as 000000000000.png; give stuffthingmaps/val2017" in refused(
        "--format", "coco"
    )
