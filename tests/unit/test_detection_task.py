"""The detection task: COCO's numbers whatever the ranks, and what a run needs of it."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from test_coco import IDS, directly, guesses, scenes

from swinv2_scale import config, distributed
from swinv2_scale.data import coco
from swinv2_scale.data.boxes import DetectionTransform
from swinv2_scale.models.convert import describe, load_checkpoint
from swinv2_scale.models.detection.cascade import Detections
from swinv2_scale.tasks.detection import Detection, as_results, merged_numbers
from swinv2_scale.train import evaluate

SMALL = ["channels=8", "box_convolutions=1", "box_features=16", "mask_convolutions=1", "proposals=20", "detections=10"]


def compose(*settings: str) -> Any:
    small = [f"task.detector.{setting}" for setting in SMALL]
    base = [
        "data.train=x",
        "data.validation=x",
        "name=x",
        "epochs=1",
        "global_batch=2",
        "task=detection",
        "model=debug",
    ]
    return config.compose("finetune", [*base, "model.num_classes=3", "model.image_size=64", *small, *settings])


def task(*settings: str) -> Detection:
    made = config.instantiate(compose(*settings).task)
    assert isinstance(made, Detection)
    return made


@pytest.fixture
def seen(tmp_path) -> tuple[dict[str, Any], list[coco.Result], dict[Any, Any]]:
    """A file of objects, results, and both by image as a rank keeps them, with numbers of classes for categories."""
    random = np.random.default_rng(1)
    truth = scenes(random, 9, masks=True)
    found = guesses(random, truth, perfect=False)
    (tmp_path / "a.json").write_text(json.dumps(truth))
    by_image = {}
    for record in coco.read_annotations(tmp_path / "a.json").records:
        own = [one for one in found if one["image_id"] == record["image_id"]]
        own = [{**one, "category_id": IDS.index(one["category_id"])} for one in own]
        by_image[record["image_id"]] = (record, own)
    return truth, found, by_image


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 12])
def test_numbers_are_the_same_on_any_number_of_ranks(tmp_path, seen, ranks):
    truth, found, by_image = seen
    images = list(by_image)
    parts = [{image: by_image[image] for image in images[rank::ranks]} for rank in range(ranks)]
    parts[0] |= {image: by_image[image] for image in images[-2:]}  # padding: two images more, seen twice
    numbers = merged_numbers(parts, 3, masks=True, file=tmp_path / "run/results.json")
    expected = directly(tmp_path, truth, found, "box") | directly(tmp_path, truth, found, "mask")
    assert numbers == pytest.approx({**expected, "images": 9}, abs=1e-12)
    written = json.loads((tmp_path / "run/results.json").read_text())
    in_order = [json.dumps(one) for one in sorted(written, key=json.dumps)]
    assert in_order == [json.dumps(one) for one in sorted(found, key=json.dumps)]


def test_results_of_a_test_set_need_the_ids_of_the_classes(tmp_path, seen, caplog):
    _, found, by_image = seen
    bare = {image: ({**record, "annotations": []}, own) for image, (record, own) in by_image.items()}
    merged_numbers([bare], 3, masks=False, file=tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text()) == []
    assert f"lacks {len(found):,} of {len(found):,} detections" in caplog.text and "task.category_ids" in caplog.text
    merged_numbers([bare], 3, masks=False, file=tmp_path / "results.json", category_ids=IDS)
    assert len(json.loads((tmp_path / "results.json").read_text())) == len(found)


def test_images_that_are_left_out_are_not_judged(tmp_path, seen):
    truth, found, by_image = seen
    gone = next(image for image in by_image if by_image[image][0]["annotations"])
    numbers = merged_numbers([{image: pair for image, pair in by_image.items() if image != gone}], 3, masks=False)
    truth["images"] = [image for image in truth["images"] if image["id"] != gone]
    truth["annotations"] = [one for one in truth["annotations"] if one["image_id"] != gone]
    expected = directly(tmp_path, truth, [one for one in found if one["image_id"] != gone], "box")
    assert numbers == pytest.approx({**expected, "images": 8}, abs=1e-12)


def test_results_are_those_of_the_published_image():
    """An image of 40 x 60 pixels that was seen at 20 x 30."""
    record = {"image_id": 5, "file_name": "5.jpg", "width": 60, "height": 40, "annotations": []}
    masks = torch.zeros(1, 1, 28, 28)
    masks[..., :14] = 1.0  # the left half
    found = Detections(torch.tensor([[5.0, 2, 15, 18]]), torch.tensor([0.7]), torch.tensor([2]), masks)
    (result,) = as_results(found, (20, 30), record)
    assert (result["image_id"], result["category_id"], result["score"]) == (5, 2, pytest.approx(0.7))
    assert result["bbox"] == [10.0, 4.0, 20.0, 32.0]
    code = result["segmentation"]
    assert code["size"] == [40, 60]
    annotation = {"id": 1, "bbox": result["bbox"], "label": 2, "segmentation": code}
    mask = coco.target({**record, "annotations": [annotation]}, "here", masks=True)["masks"][0]
    rows, columns = torch.where(mask > 0)
    box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert [float(value) for value in box] == pytest.approx([10, 4, 20, 36], abs=1)
    nothing = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), masks[:0])
    assert as_results(nothing, (20, 30), record) == []


def batch(images: list[int]) -> dict[str, Any]:
    """Grey images with an object each."""
    annotation = {"id": 1, "bbox": [8.0, 8.0, 20.0, 30.0], "label": 1, "category_id": 5, "iscrowd": 0}
    size = {"file_name": "x.jpg", "width": 64, "height": 64}
    return {
        "image": torch.randn(len(images), 3, 64, 64, generator=torch.Generator().manual_seed(images[0])),
        "size": [(64, 64)] * len(images),
        "record": [{"image_id": image, **size, "annotations": [annotation]} for image in images],
        "target": [{}] * len(images),
        "label": torch.full((len(images),), -1),
        "key": [str(image) for image in images],
    }


@pytest.mark.usefixtures("one_rank")
def test_an_evaluation_of_a_model_counts_every_image_once(tmp_path):
    made = task("task.detector.masks=false", "task.detector.mask_information_flow=false", "task.flip=true")
    torch.manual_seed(0)
    model = made.build(compose().model)
    outcome = evaluate(model, made, [batch([1, 2]), batch([3, 1])], 4)
    assert outcome.means["images"] == 3 and 0 <= outcome.means["box_ap"] <= 1
    assert "mask_ap" not in outcome.means
    assert evaluate(model, made, [batch([4])], 1).means["images"] == 1  # nothing is left from before
    with pytest.raises(RuntimeError, match="2 samples were evaluated of 3"):
        evaluate(model, made, [batch([1, 2])], 3)
    name, pictures = made.pictures(model, batch([1, 2]), ["a", "b", "c"])
    assert name == "detections" and len(pictures) == 2
    for picture in pictures:  # of 64 pixels, enlarged; prediction | truth
        assert picture.image.shape == (3, 384, 2 * 384 + 8)
        assert picture.wrong > 0 and picture.good is False and picture.caption.startswith("x.jpg: 1 of 1 missed, ")
    assert made.settings == {"image_size": 64, "scales": [1.0], "flip": True}


def test_rank_0_evaluates_for_all(monkeypatch, seen):
    made = task()
    _, _, by_image = seen
    images = list(by_image)
    made._seen = {image: by_image[image] for image in images[:4]}
    other = {image: by_image[image] for image in images[3:]}
    monkeypatch.setattr(distributed, "gathered", lambda own: [own, other])
    monkeypatch.setattr(distributed, "from_rank_0", lambda value: value)
    assert made.derived({})["images"] == 9 and made._seen == {}
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert made.derived({}) == {}  # where nobody sends rank 0's


@pytest.mark.usefixtures("one_rank")
def test_the_loss_is_the_sum_of_the_detectors():
    def model(images: torch.Tensor, sizes: Any, targets: Any) -> dict[str, torch.Tensor]:
        assert sizes == [(64, 64)] * 2 and len(targets) == 2
        return {"a": torch.tensor(1.5, dtype=torch.float64), "b": torch.tensor(2.0, dtype=torch.bfloat16)}

    loss = task().loss(model, batch([1, 2]))
    assert loss == 3.5 and loss.dtype == torch.float32


def test_weights_come_from_classifiers_and_other_detectors_and_go_on_to_them(tmp_path):
    small = config.compose_model("debug", num_classes=5, image_size=64)
    classifier = config.instantiate(small)
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    made = task()
    torch.manual_seed(0)
    detector = made.build(compose().model)
    fresh = {name: value.clone() for name, value in detector.state_dict().items()}
    report = load_checkpoint(detector, tmp_path / "classifier.pth", pretrained_windows=[[8, 8]] * 3 + [[4, 4]])
    assert set(report.dropped) == {"encoder.head.weight", "encoder.head.bias"}
    assert all(name.startswith("decoder.") for name in report.missing)
    for name, value in detector.state_dict().items():
        assert torch.equal(value, classifier.state_dict().get(name.removeprefix("encoder."), fresh[name]))
    # a detector of other classes, without masks, as after Objects365
    torch.save(detector.state_dict(), tmp_path / "detector.pth")
    assert describe(tmp_path / "detector.pth")[0].map_classes == 3
    other = task("model.num_classes=2", "task.detector.masks=false", "task.detector.mask_information_flow=false")
    torch.manual_seed(1)
    model = other.build(compose().model)
    report = load_checkpoint(model, tmp_path / "detector.pth", pretrained_windows=[[8, 8]] * 4)
    assert all("mask_heads" in name or ".classes." in name for name in report.dropped)
    assert set(report.missing) == {
        f"decoder.box_heads.{n}.classes.{part}" for n in range(3) for part in ("weight", "bias")
    }
    assert torch.equal(model.decoder.box_heads[1].deltas.weight, detector.decoder.box_heads[1].deltas.weight)
    report = load_checkpoint(classifier, tmp_path / "detector.pth", pretrained_windows=[[8, 8]] * 4)
    assert all(name.startswith("decoder.") for name in report.dropped) and "norm.weight" in report.loaded


def refused(message: str) -> Any:
    return pytest.raises(ValueError, match=message)


def test_classes_that_do_not_fit():
    made = task()
    made.check_classes(["a", "b", "c"], ["a", "b", "c"], [])
    with refused(r"the data has 2 classes and the model 3: set model\.num_classes=2"):
        made.check_classes(["a", "b"])
    with refused("different categories"):
        made.check_classes(["a", "b", "c"], ["a", "c", "b"])
    with refused("pack it with --format coco"):
        made.check_classes([], highest_label=3)
    with refused("num_classes of 1 or more, got 0"):
        task("model.num_classes=0")
    with refused("category_ids has 2 entries; give one for each of 3"):
        task("task.category_ids=[1,2]")


def test_the_configuration_builds_htc_with_what_the_recipe_says():
    made = task("task.detector.semantic_classes=183")
    with torch.device("meta"):
        model = made.build(compose().model)
    assert (model.iou_thresholds, model.stage_weights) == ([0.5, 0.6, 0.7], [1.0, 0.5, 0.25])
    deviations = [tuple(round(1 / weight, 3) for weight in coder.weights) for coder in model.coders]
    assert deviations == [(0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.066, 0.066)]
    assert (model.semantic_weight, model.num_classes, model.suppression) == (0.2, 3, "linear")
    assert model.decoder.attention is not None and model.decoder.semantic_head is not None
    assert model.decoder.mask_heads[2].previous is not None
    assert isinstance(made.train_transform, DetectionTransform)
    assert (made.train_transform.scale, made.train_transform.image_size) == ((0.1, 2.0), 64)
