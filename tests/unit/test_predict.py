"""`swinv2-scale predict`: what is drawn and written is what the model says, and what cannot be done is said."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from swinv2_scale import config
from swinv2_scale.cli import main
from swinv2_scale.data.boxes import collate_boxes
from swinv2_scale.data.images import EncodedImage
from swinv2_scale.run import worst
from swinv2_scale.tasks.detection import as_results, mistakes
from swinv2_scale.telemetry import Picture

SMALL = {
    "classification": [],
    "segmentation": ["task.channels=8", "task.auxiliary_channels=8", "task.flip=true", "task.inference=sliding"],
    "detection": [
        *(f"task.detector.{name}" for name in ("channels=8", "box_convolutions=1", "box_features=16", "proposals=20")),
        *("task.detector.mask_convolutions=1", "task.detector.detections=6", "task.scales=[0.5,1.0]"),
    ],
    "simmim": ["task.norm_target_window=0"],
}
CLASSES = ["cat", "dog", "cow"]


def trained(directory: Path, kind: str) -> tuple[Path, Any, nn.Module]:
    """A checkpoint of an untrained model, as a run saves it, with its task and model."""
    base = ["model=debug", "name=x", "data.train=x", "epochs=1", "global_batch=2", "model.image_size=64"]
    classes = "model.num_classes=3" if kind != "simmim" else "model.num_classes=0"
    cfg = config.compose("finetune" if kind != "simmim" else "pretrain", [*base, f"task={kind}", classes, *SMALL[kind]])
    task = config.instantiate(cfg.task)
    torch.manual_seed(0)
    model = task.build(cfg.model).eval()
    windows = task.backbone(model).pretrained_windows
    header = {"model": config.plain(cfg.model), "pretrained_windows": windows, "classes": CLASSES}
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()},
        directory / "model.safetensors",
        {name: json.dumps(value) for name, value in header.items()},
    )
    config.write_copy(cfg, directory)
    return directory, task, model


def picture(path: Path, rows: int, columns: int) -> Path:
    noise = np.random.default_rng(rows).integers(0, 256, (rows // 8 + 1, columns // 8 + 1, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((columns, rows)).save(path)
    return path


def predictions(run: Path, *images: Path, options: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    output = run / "said"
    assert main(["predict", str(run), *map(str, images), "--output", str(output), "--json", *options]) == 0
    found: list[dict[str, Any]] = json.loads((output / "predictions.json").read_text())
    return found


def test_objects_are_those_of_an_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, task, model = trained(tmp_path, "detection")
    file = picture(tmp_path / "a.png", 90, 120)
    (said,) = predictions(run, file, options=("--score", "0"))
    assert (said["file"], said["size"]) == (str(file), [90, 120]) and len(said["objects"]) == 6
    record = {"image_id": 0, "file_name": "a.png", "width": 120, "height": 90, "annotations": []}
    sample = {"image": EncodedImage(file.read_bytes()), "record": record, "key": "a", "label": -1}
    batch = collate_boxes([task.evaluation_transform(sample)])
    (found,) = model.detect(batch["image"], batch["size"], scales=[0.5, 1.0])  # type: ignore[operator]
    expected = as_results(found, batch["size"][0], record)
    for one, other in zip(said["objects"], expected, strict=True):
        assert one["class"] == CLASSES[other["category_id"]] and one["label"] == other["category_id"]
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)
        assert one["bbox"] == pytest.approx(other["bbox"], abs=1e-3)
        assert one["segmentation"]["size"] == [90, 120]
    with Image.open(tmp_path / "said/a.png") as drawn:
        assert drawn.size == (480, 360)  # enlarged, so that its texts can be read
    assert f"{file}: {CLASSES[said['objects'][0]['label']]}" in capsys.readouterr().out
    (said,) = predictions(run, file, options=("--score", "0.99"))
    assert said["objects"] == [] and f"{file}: nothing ->" in capsys.readouterr().out


def test_segments_are_drawn_counted_and_mapped(tmp_path: Path) -> None:
    run, task, model = trained(tmp_path, "segmentation")
    file = picture(tmp_path / "a.jpg", 70, 100)
    (said,) = predictions(run, file)
    pixels = EncodedImage(file.read_bytes()).pixels()
    with torch.no_grad():
        found = task.log_probabilities(model, task.evaluation_transform.views(pixels), (70, 100)).argmax(dim=0)
    with Image.open(tmp_path / "said/a.seg.png") as written:
        assert np.array_equal(np.array(written), found.numpy() + 1)
    assert sum(part["share"] for part in said["segments"]) == pytest.approx(1)
    for part in said["segments"]:
        assert part["class"] == CLASSES[part["label"]]
        assert part["share"] == pytest.approx(float((found == part["label"]).float().mean()))
    with Image.open(tmp_path / "said/a.png") as drawn:
        assert drawn.width == 400 and drawn.height > 280  # a legend below the picture


def test_classes_of_files_and_folders(tmp_path: Path) -> None:
    run, task, model = trained(tmp_path, "classification")
    (tmp_path / "more").mkdir()
    files = [picture(tmp_path / "a.png", 64, 64), picture(tmp_path / "more/a.JPG", 80, 64)]
    (tmp_path / "more/notes.txt").write_text("no picture")
    said = predictions(run, files[0], tmp_path / "more")
    assert [one["file"] for one in said] == list(map(str, files))
    assert {"a.png", "a~.png"} < {path.name for path in (tmp_path / "said").iterdir()}
    for one, file in zip(said, files, strict=True):
        image = task.evaluation_transform({"image": EncodedImage(file.read_bytes())})["image"]
        with torch.no_grad():
            expected = torch.softmax(model(image[None])[0], dim=0)
        assert [entry["label"] for entry in one["classes"]] == expected.argsort(descending=True).tolist()
        for entry in one["classes"]:
            assert entry["probability"] == pytest.approx(float(expected[entry["label"]]), abs=1e-5)
            assert entry["class"] == CLASSES[entry["label"]]


def test_what_cannot_be_done_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _, _ = trained(tmp_path, "classification")
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty").mkdir()

    def refused(*arguments: str) -> str:
        assert main(["predict", *arguments, "--output", str(tmp_path / "out")]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    good = str(picture(tmp_path / "good.png", 64, 64))
    assert "text.jpg is no picture that can be read" in refused(str(run), str(tmp_path / "text.jpg"))
    assert "gone.png does not exist: give pictures (jpg" in refused(str(run), good, str(tmp_path / "gone.png"))
    assert "empty holds no pictures" in refused(str(run), str(tmp_path / "empty"))
    assert "nowhere" in refused(str(tmp_path / "nowhere"), good)
    assert "'task.flip' in 'task.flip=true' is not a setting" in refused(str(run), good, "--set", "task.flip=true")
    (tmp_path / "simmim").mkdir()
    trained(tmp_path / "simmim", "simmim")
    assert "train it for some first, with launch/finetune.py checkpoint=" in refused(str(tmp_path / "simmim"), good)


def test_a_run_says_its_task_but_not_what_is_called(tmp_path: Path) -> None:
    trained(tmp_path, "detection")
    copy = tmp_path / "config.yaml"
    overrides = config.saved_task(copy)
    assert overrides[0] == "task=detection" and "task.scales=[0.5, 1.0]" in overrides
    assert not any("_target_" in one or "train_" in one for one in overrides)
    again = config.compose("finetune", ["data.train=x", "name=x", "epochs=1", "global_batch=2", *overrides]).task
    saved = yaml.safe_load(copy.read_text())
    for part in ("detector", "evaluation_transform", "scales", "flip"):
        assert config.plain(again)[part] == saved["task"][part]
    saved["task"]["evaluation_transform"]["_target_"] = "os.system"
    copy.write_text(yaml.safe_dump(saved, sort_keys=False))
    assert config.saved_task(copy) == overrides
    saved["task"]["_target_"] = "os.system"
    copy.write_text(yaml.safe_dump(saved, sort_keys=False))
    with pytest.raises(ValueError, match=r"no run's configuration with a task of conf/task.*os\.system"):
        config.saved_task(copy)


def test_mistakes_in_a_picture() -> None:
    truth = {
        "boxes": torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [22, 20, 32, 30]]),
        "labels": torch.tensor([0, 1, 1]),
        "crowd": torch.tensor([[50.0, 50, 80, 80]]),
    }

    def count(*boxes: tuple[list[float], int]) -> tuple[int, int]:
        places = torch.tensor([box for box, _ in boxes]).reshape(-1, 4)
        return mistakes(places, torch.tensor([label for _, label in boxes], dtype=torch.int64), truth)

    assert count() == (3, 0)
    assert count(([0.0, 0, 10, 10], 0), ([20.0, 20, 30, 30], 1), ([22.0, 20, 32, 30], 1)) == (0, 0)
    assert count(([0.0, 0, 10, 10], 1)) == (3, 1)  # another class
    assert count(([0.0, 0, 10, 10], 0), ([0.0, 0, 10, 10], 0)) == (2, 1)  # once is enough
    assert count(([21.0, 20, 31, 30], 1), ([21.0, 20, 31, 30], 1)) == (1, 0)  # the second finds the other object
    assert count(([0.0, 0, 10, 4], 0)) == (3, 1)
    assert count(([55.0, 55, 60, 60], 2)) == (3, 0)  # on a crowd region
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "crowd": torch.zeros(0, 4)}
    assert mistakes(torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([0]), nothing) == (0, 1)


def test_the_worst_of_the_first_are_shown() -> None:
    class Task:
        shown = 3

        def pictures(self, model: Any, batch: dict[str, Any], classes: Any) -> tuple[str, list[Picture]]:
            nothing = torch.zeros(3, 1, 1, dtype=torch.uint8)
            return "x", [Picture(nothing, key, wrong=wrong) for key, wrong in zip(*batch.values(), strict=True)]

    def batches(*wrong: float) -> list[dict[str, Any]]:
        return [{"key": [str(i)] * 16, "wrong": [value] * 16} for i, value in enumerate(wrong)]

    model: Any = nn.Identity()
    name, shown = worst(model, Task(), batches(0.1, 0.7, 0.9), [])  # type: ignore[arg-type]
    assert (
        name == "x" and [(one.caption, one.wrong) for one in shown] == [("1", 0.7)] * 3
    )  # the third was not looked at
    _, shown = worst(model, Task(), batches(0.5, 0.5), [])  # type: ignore[arg-type]
    assert [one.caption for one in shown] == ["0"] * 3


def test_wrong_classes_come_first(tmp_path: Path) -> None:
    _, task, _ = trained(tmp_path, "classification")
    shares = torch.tensor([[0.8, 0.1, 0.1], [0.5, 0.4, 0.1], [0.5, 0.4, 0.1], [0.1, 0.1, 0.8]])

    def model(images: Tensor) -> Tensor:
        return shares.log()

    batch = {"image": torch.zeros(4, 3, 8, 8), "label": torch.tensor([0, 0, 1, 0])}
    _, shown = task.pictures(model, batch, CLASSES)
    assert [one.wrong for one in shown] == pytest.approx([-0.7, -0.1, 0.1, 0.7], abs=1e-6)
    assert [one.good for one in shown] == [True, True, False, False]
    assert shown[3].caption == "cow (80%), is cat"
