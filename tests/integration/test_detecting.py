"""A detector trained by the launch scripts on two ranks, evaluated on one and on two."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from real_runs import Run

from swinv2_scale.data.pack import pack

SETTINGS = [
    *(
        "task=detection",
        "model.num_classes=3",
        "precision=fp32",
        "evaluation_batch=2",
        "task.evaluation_transform.image_size=64",
    ),
    *(f"task.detector.{name}" for name in ("channels=16", "box_convolutions=1", "box_features=32", "proposals=20")),
    *(f"task.detector.{name}" for name in ("mask_convolutions=1", "samples=16", "anchor_sizes=[16,24,32,48,64]")),
]


def packed(root: Path, split: str, images: int) -> Path:
    """Shards of grey images with rectangles, in every third of which there is nothing."""
    random = np.random.default_rng(len(split))
    (root / split).mkdir(parents=True)
    pictures: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(images):
        rows, columns = (int(value) for value in random.integers(50, 80, 2))
        pixels = np.full((rows, columns, 3), 120, dtype=np.uint8)
        for _ in range(number % 3):
            width, height = (int(value) for value in random.integers(15, 35, 2))
            x, y, label = (int(random.integers(limit)) for limit in (columns - width, rows - height, 3))
            pixels[y : y + height, x : x + width] = np.eye(3, dtype=np.uint8)[label] * 250
            corners = [x, y, x + width, y, x + width, y + height, x, y + height]
            one = {"id": len(annotations) + 1, "image_id": number, "category_id": [3, 5, 90][label]}
            one |= {"bbox": [x, y, width, height], "area": width * height, "iscrowd": 0, "segmentation": [corners]}
            annotations.append(one)
        Image.fromarray(pixels).save(root / split / f"{number}.png")
        pictures.append({"id": number, "file_name": f"{number}.png", "width": columns, "height": rows})
    categories = [{"id": number, "name": name} for number, name in ((3, "red"), (5, "green"), (90, "blue"))]
    file = root / f"instances_{split}.json"
    file.write_text(json.dumps({"images": pictures, "annotations": annotations, "categories": categories}))
    pack(str(file), root / "shards" / split, format="coco", shard_size=100, seed=0)
    return root / "shards" / split


@pytest.mark.long
def test_a_detector_is_trained_and_evaluated_on_any_number_of_ranks(launch: Callable[..., Run], tmp_path: Path) -> None:
    data = [
        f"data.{name}={packed(tmp_path / 'data', name, count)}" for name, count in (("train", 12), ("validation", 7))
    ]
    training = [*data, *SETTINGS, "steps=3", "epochs=null", "global_batch=4", "micro_batch=2"]
    trained = launch("trained", *training, script="finetune", ranks=2)
    assert trained.returncode == 0, trained.output
    told = trained.events("evaluation")[3]
    assert told["samples"] == told["images"] == 7 and 0 <= told["box_ap"] <= 1 and 0 <= told["mask_ap"] <= 1
    outcomes = []
    for ranks in (1, 2):
        name = f"evaluated_{ranks}"
        file = f"task.results={tmp_path}/{name}.json"
        settings = [data[1], *SETTINGS, f"checkpoint={tmp_path}/trained", file]
        evaluated = launch(name, *settings, script="evaluate", ranks=ranks)
        assert evaluated.returncode == 0, evaluated.output
        outcome = json.loads((tmp_path / name / "evaluation.json").read_text())
        results = json.loads((tmp_path / f"{name}.json").read_text())
        outcomes.append(({key: value for key, value in outcome.items() if key.startswith(("box", "mask"))}, results))
    (one, results), (two, others) = outcomes
    assert one == pytest.approx(two, abs=1e-3) and len(one) == 24  # batches are cut elsewhere, and so padded otherwise
    assert one["box_ap"] == pytest.approx(told["box_ap"], abs=1e-3)
    assert len(results) == pytest.approx(len(others), abs=20) and {result["category_id"] for result in results} <= {
        3,
        5,
        90,
    }


@pytest.mark.long
def test_a_detectors_order_and_faults_do_not_depend_on_ranks(launch: Callable[..., Run], tmp_path: Path) -> None:
    """Stopped after step 4 on two ranks, resumed on one; and steps without finite gradients, which all ranks skip."""
    data = f"data.train={packed(tmp_path / 'data', 'train', 12)}"
    training = [data, *SETTINGS, "steps=8", "epochs=null", "global_batch=4", "micro_batch=2", "checkpoint_every=4"]
    whole = launch("whole", *training, script="finetune", ranks=2)
    assert whole.returncode == 0, whole.output
    shutil.copytree(whole.directory, tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/checkpoints/step_00000008")
    resumed = launch("resumed", *training, script="finetune", ranks=1)
    assert resumed.returncode == 0 and "at step 4" in resumed.output, resumed.output
    assert resumed.losses() == pytest.approx(whole.losses(), rel=1e-3)
    environment = {"INJECT": "2:nan 5:inf", "INJECT_RANK": "1"}
    environment["PYTHONPATH"] = f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"
    faults = ["task._target_=injected.InjectedDetection", "guard.nonfinite=skip"]
    skipping = launch("skipping", *training, *faults, script="finetune", ranks=2, environment=environment)
    assert skipping.returncode == 0, skipping.output
    assert sorted(skipping.events("skipped")) == [3, 6]
    assert skipping.losses()[:2] == whole.losses()[:2]
