"""The task of segmentation: its numbers are those of pixels, windows cover, views are averaged, weights go on."""

import copy
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from swinv2_scale import config
from swinv2_scale.data.segmentation import (
    IGNORED,
    collate_whole,
)
from swinv2_scale.drawing import LEGIBLE
from swinv2_scale.models import create_model
from swinv2_scale.models.convert import describe, load_checkpoint
from swinv2_scale.models.upernet import UPerNet
from swinv2_scale.tasks.segmentation import Segmentation, sliding
from swinv2_scale.train import evaluate


@functools.cache
def segmentation_task(*settings: str) -> Segmentation:
    words = ["data.validation=x", "task=segmentation", "model=debug", "model.num_classes=4", "model.image_size=64"]
    words += ["task.channels=8", "task.auxiliary_channels=4", "task.train_transform.long_side=256", *settings]
    cfg = config.compose("evaluate", words)
    task = config.instantiate(cfg.task)
    task.model = cfg.model
    return task


def variant(**changes: Any) -> Segmentation:
    """The same task with other ways of inference."""
    task = copy.copy(segmentation_task())
    vars(task).update(changes)
    return task


@pytest.fixture(scope="module")
def net() -> UPerNet:
    torch.manual_seed(0)
    task = segmentation_task()
    model = task.build(task.model).eval()
    with torch.no_grad():  # block norms of a fresh model are zero, and its logits nearly equal
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.fill_(1.0)
        model.decoder.classifier.weight.normal_()
    return model


class Brightness(nn.Module):
    """Says of each pixel what its brightness is, not always the truth: stands for a model where sums are checked."""

    def segment(self, images: Tensor) -> Tensor:
        return torch.stack([-(images.mean(1) - level).square() for level in (-1.5, -0.5, 0.5, 1.5)], dim=1)


def brightness_task(monkeypatch: pytest.MonkeyPatch) -> tuple[Segmentation, nn.Module]:
    monkeypatch.setattr("swinv2_scale.tasks.segmentation.UPerNet", Brightness)
    return segmentation_task(), Brightness()


def held_out() -> list[dict[str, Any]]:
    """10 images of various sizes; class 3 is nowhere in the truth."""
    made = []
    generator = torch.Generator().manual_seed(0)
    for number in range(10):
        rows, columns = 20 + number, 40 - 2 * number
        truth = torch.randint(0, 3, (rows, columns), generator=generator).to(torch.uint8)
        truth[torch.rand(rows, columns, generator=generator) < 0.2] = IGNORED
        image = torch.randn(3, rows, columns, generator=generator)
        made.append({"image": [image], "map": truth, "label": -1, "key": str(number), "corrupt": [], "draw": 0})
    return made


def slow_metrics(images: list[Tensor], truths: list[Tensor]) -> dict[str, float]:
    """Pixel by pixel, and sets of pixels for each class."""
    predicted: dict[int, set] = {c: set() for c in range(4)}
    true: dict[int, set] = {c: set() for c in range(4)}
    losses = []
    for number, (image, truth) in enumerate(zip(images, truths, strict=True)):
        p = torch.softmax(Brightness().segment(image[None])[0], dim=0)
        for y in range(truth.shape[0]):
            for x in range(truth.shape[1]):
                if truth[y, x] != IGNORED:
                    predicted[int(p[:, y, x].argmax())].add((number, y, x))
                    true[int(truth[y, x])].add((number, y, x))
                    losses.append(-float(torch.log(p[truth[y, x].long(), y, x])))
    ious = [len(predicted[c] & true[c]) / len(predicted[c] | true[c]) for c in range(4) if predicted[c] | true[c]]
    accuracies = [len(predicted[c] & true[c]) / len(true[c]) for c in range(4) if true[c]]
    hits = sum(len(predicted[c] & true[c]) for c in range(4))
    return {
        "loss": sum(losses) / len(losses),
        "miou": sum(ious) / len(ious),
        "pixel_accuracy": hits / len(losses),
        "mean_accuracy": sum(accuracies) / len(accuracies),
    }


@pytest.mark.usefixtures("one_rank")
def test_metrics_are_those_of_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    task, model = brightness_task(monkeypatch)
    images = held_out()
    expected = slow_metrics([one["image"][0] for one in images], [one["map"] for one in images])
    for size in (1, 4):
        batches = [collate_whole(images[i : i + size]) for i in range(0, 10, size)]
        outcome = evaluate(model, task, batches, 10)
        assert outcome.samples == 10 and set(outcome.means) == set(expected)
        for name, value in expected.items():
            assert outcome.means[name] == pytest.approx(value, rel=1e-6), name
    columns = task.per_class(outcome)
    assert list(columns) == ["pixels", "iou", "accuracy"] and columns["pixels"][3] == 0
    assert columns["iou"][3] == 0 and np.isnan(columns["accuracy"][3]), "predicted, but never true"


@pytest.mark.usefixtures("one_rank")
def test_sums_over_ranks_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank's tallies, summed as gloo would, give what one rank finds."""
    task, model = brightness_task(monkeypatch)
    images = held_out()
    whole = evaluate(model, task, [collate_whole(images)], 10)
    for ranks in (2, 3):
        parts = [evaluate(model, task, [collate_whole(images[r::ranks])], len(images[r::ranks])) for r in range(ranks)]
        summed = {name: sum(part.tallies[name] for part in parts) for name in task.tallies}
        assert torch.equal(summed["pixels"], whole.tallies["pixels"])
        found = task.derived(summed)
        assert all(found[name] == whole.means[name] for name in ("miou", "pixel_accuracy", "mean_accuracy"))
        assert found["loss"] == pytest.approx(whole.means["loss"], rel=1e-12)


def test_the_loss_is_the_sum_of_two_cross_entropies(net: UPerNet) -> None:
    task = segmentation_task()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    truth = torch.randint(0, 5, (2, 64, 64), generator=torch.Generator().manual_seed(1))
    truth[truth == 4] = IGNORED
    batch = {"image": images, "map": truth.to(torch.uint8)}
    with torch.no_grad():
        main, auxiliary = (F.cross_entropy(logits, truth, ignore_index=IGNORED) for logits in net(images))
        share = (truth != IGNORED).double().mean()
        assert task.loss(net, batch).item() == pytest.approx(((main + 0.4 * auxiliary) * share).item(), rel=1e-6)
        batch["map"].fill_(IGNORED)
        assert task.loss(net, batch).item() == 0.0, "nothing to learn from is no nan"


def test_sliding_windows_cover_everything_once_or_more() -> None:
    seen: list[Tensor] = []

    def place(images: Tensor) -> Tensor:
        seen.append(images)
        return images[:, :2] * 2

    images = torch.randn(1, 3, 70, 30)
    found = sliding(place, images, 30)
    assert torch.allclose(found, images[:, :2] * 2, atol=1e-6)
    assert [tuple(window.shape[2:]) for window in seen] == [(30, 30)] * 3, "at 0, 20 and 40"
    seen.clear()
    assert torch.equal(sliding(place, images[..., :20, :25], 30), images[:, :2, :20, :25] * 2)
    assert [tuple(window.shape[2:]) for window in seen] == [(20, 25)]
    seen.clear()
    sliding(place, torch.randn(1, 3, 640, 900), 640)
    assert [tuple(window.shape[2:]) for window in seen] == [(640, 640)] * 2


@pytest.mark.usefixtures("one_rank")
def test_sliding_equals_whole_where_one_window_covers_all(net: UPerNet) -> None:
    whole, windows = variant(), variant(inference="sliding")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for size, same in (((64, 64), True), ((50, 64), True), ((64, 100), False)):
            view = [torch.randn(3, *size, generator=generator)]
            a, b = (task.log_probabilities(net, view, size) for task in (whole, windows))
            assert torch.equal(a, b) is same, size


@pytest.mark.usefixtures("one_rank")
def test_views_are_averaged_and_turned_back(net: UPerNet) -> None:
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(3, 64, 80, generator=generator), torch.randn(3, 32, 40, generator=generator)]
    size = (100, 125)
    with torch.no_grad():
        found = variant(flip=True).log_probabilities(net, views, size).exp()
        expected = []
        for view in views:
            for logits in (net.segment(view[None]), net.segment(view[None].flip(3)).flip(3)):
                big = F.interpolate(logits, size, mode="bilinear", align_corners=False)
                expected.append(torch.softmax(big, dim=1)[0])
        assert torch.allclose(found, torch.stack(expected).mean(0), atol=1e-5)
        assert not torch.allclose(expected[0], expected[1], atol=1e-3), "the mirror image is judged otherwise"


@pytest.mark.usefixtures("one_rank")
def test_pictures_show_prediction_and_truth(net: UPerNet) -> None:
    task = segmentation_task()
    batch = collate_whole(held_out())
    with torch.no_grad():
        name, shown = task.pictures(net, batch, ["a", "b", "c", "d"])
    assert name == "segmentations" and len(shown) == len(batch["key"])
    views, own = batch["image"][0], batch["map"][0]
    with torch.no_grad():
        found = task.log_probabilities(net, views, own.shape).argmax(dim=0)
    known = own != IGNORED
    wrong = (found != own)[known].float().mean().item()
    assert shown[0].wrong == pytest.approx(wrong) and shown[0].caption == f"0: {wrong:.1%} of the pixels wrong"
    assert shown[0].image.shape[2] > 2 * LEGIBLE > shown[0].image.shape[1]


def test_weights_come_from_a_classifier_and_go_on(net: UPerNet, tmp_path: Path) -> None:
    classifier = create_model("debug", image_size=64, num_classes=7)
    save_file(classifier.state_dict(), tmp_path / "classifier.safetensors")
    fresh = segmentation_task().build(segmentation_task().model)
    report = load_checkpoint(fresh, tmp_path / "classifier.safetensors")
    assert all(name.startswith("decoder.") for name in report.missing) and "encoder.norm.weight" in report.loaded
    assert sorted(report.dropped) == ["encoder.head.bias", "encoder.head.weight"]
    assert torch.equal(fresh.encoder.layers[2].blocks[1].mlp.fc1.weight, classifier.layers[2].blocks[1].mlp.fc1.weight)
    # A file of ours fills all of a model, running statistics too, and gives its backbone to another task.
    with torch.no_grad():
        net.decoder.fuse.norm.running_mean.normal_()
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    report = load_checkpoint(fresh, tmp_path / "net.safetensors")
    assert report.missing == report.dropped == []
    assert all(torch.equal(tensor, fresh.state_dict()[name]) for name, tensor in net.state_dict().items())
    report = load_checkpoint(classifier, tmp_path / "net.safetensors")
    assert report.missing == ["head.weight", "head.bias"] and all(n.startswith("decoder.") for n in report.dropped)
    assert describe(tmp_path / "net.safetensors")[0].map_classes == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.num_classes=1"], "num_classes of 2 to 254, got 1"),
        (["task.inference=windows"], "task.inference=windows is not one of whole, sliding"),
    ],
)
def test_settings_that_do_not_exist_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segmentation_task(*settings)


def test_classes_must_fit() -> None:
    task = segmentation_task()
    task.check_classes(["a", "b", "c", "d"], [], ["a", "b", "c", "d"])
    with pytest.raises(ValueError, match=r"the data has 3 classes and the model 4: set model.num_classes=3"):
        task.check_classes(["a", "b", "c"])
    with pytest.raises(ValueError, match="classes of images, and segmentation needs maps"):
        task.check_classes(highest_label=3)


def test_conf_of_the_experiments_is_the_papers() -> None:
    """Numbers of the paper's table for ADE20K; windows that the maps hold."""
    for name, lr, batch, steps, warmup, drop in (
        ("ade20k_b", 6e-5, 64, 40_000, 375, 0.3),
        ("ade20k_l", 6e-5, 64, 40_000, 375, 0.3),
        ("ade20k_g", 4e-5, 32, 80_000, 750, 0.4),
    ):
        cfg = config.compose("finetune", [f"experiment={name}", "data.train=x", "checkpoint=y"])
        assert (cfg.optim.lr, cfg.global_batch, cfg.steps, cfg.optim.warmup_steps) == (lr, batch, steps, warmup)
        assert (cfg.model.drop_path_rate, cfg.optim.weight_decay, cfg.optim.schedule) == (drop, 0.05, "linear")
        assert (cfg.model.image_size, cfg.model.num_classes, cfg.optim.lr_batch) == (640, 150, None)
        assert list(cfg.task.pool_scales) == [1, 2, 3, 6] and (cfg.task.channels, cfg.task.dropout) == (512, 0.1)
        assert (cfg.task.auxiliary_channels, cfg.task.auxiliary_weight) == (256, 0.4)
        assert list(cfg.task.train_transform.ratio) == [0.5, 2.0] and cfg.task.train_transform.largest_share == 0.75
