"""Semantic segmentation: maps stay with their images, sums are exact, windows cover, and bad maps are found."""

import copy
import functools
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import tv_tensors

from swinv2_scale import config
from swinv2_scale.data import segmentation
from swinv2_scale.data.images import CorruptSampleError, EncodedImage, EncodedMap
from swinv2_scale.data.manifest import Manifest
from swinv2_scale.data.mixture import Mixture
from swinv2_scale.data.pack import pack
from swinv2_scale.data.scenes import BACKGROUND, CLASSES, scenes, write_tree
from swinv2_scale.data.segmentation import (
    IGNORED,
    ClassCrop,
    PhotometricDistortion,
    SegmentationEvaluationTransform,
    SegmentationTransform,
    collate_whole,
    fitted_size,
)
from swinv2_scale.data.shards import verify, with_map
from swinv2_scale.data.stream import evaluation_stream, training_stream
from swinv2_scale.data.transforms import collate, to_uint8
from swinv2_scale.drawing import LEGIBLE
from swinv2_scale.models import create_model
from swinv2_scale.models.convert import describe, load_checkpoint
from swinv2_scale.models.upernet import UPerNet
from swinv2_scale.tasks.segmentation import Segmentation, sliding
from swinv2_scale.train import evaluate

TRAINING = {
    "image_size": 64,
    "ratio": [0.5, 2.0],
    "long_side": 256,
    "largest_share": 0.75,
    "flip": 0.5,
    "photometric": False,
    "num_classes": 4,
}
EVALUATION = {"image_size": 64, "long_side": 256, "ratios": [1.0], "num_classes": 4}
# A colour for each value of a map, so that a transformed image tells what its map must be.
COLOURS = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]], np.uint8)


def png(array: np.ndarray, **palette: Any) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(array)
    if palette:
        image.putpalette(palette["palette"])
    image.save(buffer, "PNG")
    return buffer.getvalue()


def blocks(rows: int, columns: int, seed: int = 0, size: int = 24) -> np.ndarray:
    """A map (rows, columns) of 0 … 4 in large blocks."""
    small = np.random.default_rng(seed).integers(0, 5, (-(-rows // size), -(-columns // size)), dtype=np.uint8)
    return small.repeat(size, 0).repeat(size, 1)[:rows, :columns]


def sample(values: np.ndarray) -> dict[str, Any]:
    image, classes = EncodedImage(png(COLOURS[values])), EncodedMap(png(values))
    return {"image": image, "map": classes, "label": -1, "key": "k", "draw": 0, "corrupt": []}


def colours_of(image: Tensor) -> Tensor:
    """Which of COLOURS is nearest at each pixel of a normalised image: (Y, X); and how far, 0 … 1."""
    pixels = to_uint8(image).permute(1, 2, 0)[:, :, None].float()
    return (pixels - torch.tensor(COLOURS).float()).abs().sum(3).argmin(2)


@pytest.mark.parametrize(("rows", "columns"), [(150, 200), (300, 90), (40, 50)])
def test_map_and_image_stay_aligned(rows: int, columns: int) -> None:
    transform = SegmentationTransform(**TRAINING)
    padded = agreeing = inside = 0
    for seed in range(30):
        torch.manual_seed(seed)
        made = transform(sample(blocks(rows, columns, seed)))
        image, classes = made["image"], made["map"]
        assert image.shape == (3, 64, 64) and image.dtype == torch.float32 and type(image) is Tensor
        assert classes.shape == (64, 64) and classes.dtype == torch.uint8 and type(classes) is Tensor
        # What was completed has the mean colour, and no class; black pixels have none either.
        complete = (image == 0).all(0)
        assert (classes[complete] == IGNORED).all()
        padded += int(complete.sum())
        # Away from edges, where bilinear colours are between two, the colour is the class's.
        shown = colours_of(image).to(torch.uint8) - 1
        known = ~complete
        agreeing += int((shown == classes)[known].sum())
        inside += int(known.sum())
    assert agreeing > 0.97 * inside
    assert padded > 0, "at ratio 0.5 the short side has 32 pixels"


def test_resized_maps_are_not_shifted() -> None:
    """Of three pixels the middle one is taken, as for the image; torch's "nearest" takes the first."""
    values = np.ones((63, 63), np.uint8)
    values[1::3, 1::3] = 2
    transform = SegmentationTransform(**{**TRAINING, "ratio": [21 / 64] * 2, "flip": 0.0, "largest_share": 1.0})
    made = transform(sample(values))["map"]
    assert (made[:21, :21] == 1).all() and (made[21:] == IGNORED).all()


def test_the_same_seed_gives_the_same_example_and_other_generators_are_not_asked() -> None:
    transform = SegmentationTransform(**{**TRAINING, "photometric": True})

    def made(seed: int) -> Tensor:
        torch.manual_seed(seed)
        np.random.seed(np.random.randint(2**31))
        return transform(sample(blocks(150, 200)))["image"]

    assert torch.equal(made(3), made(3))
    assert not torch.equal(made(3), made(4))


def test_no_class_covers_too_much_of_a_crop_if_another_is_there() -> None:
    values = np.zeros((1, 100, 100), np.uint8)  # class 0 nearly everywhere, class 1 in a corner
    values[:, :20, :20] = 1
    pair = (tv_tensors.Image(torch.zeros(3, 100, 100, dtype=torch.uint8)), tv_tensors.Mask(torch.from_numpy(values)))

    def largest(share: float) -> list[float]:
        found = []
        for seed in range(100):
            torch.manual_seed(seed)
            _, crop = ClassCrop(20, share)(*pair)
            counts = crop.flatten().long().bincount()
            found.append(float(counts.max() / counts.sum()))
        return found

    free, held = largest(1.0), largest(0.75)
    assert sum(share == 1.0 for share in free) > 90
    assert sum(share <= 0.75 for share in held) > 3 * max(1, sum(share <= 0.75 for share in free))
    # Pixels without a class are nobody's share: on the left there are none and class 0, on the right classes 0 and 1.
    fine = np.indices((100, 100)).sum(0) % 2
    mixed = tv_tensors.Mask(torch.from_numpy(np.where(fine, 0, np.where(np.arange(100) < 50, IGNORED, 1)))[None].byte())
    for seed in range(50):
        torch.manual_seed(seed)
        assert (ClassCrop(20, 0.75)(pair[0], mixed)[1] == 1).any()
    ignored = tv_tensors.Mask(torch.full((1, 100, 100), IGNORED, dtype=torch.uint8))
    assert ClassCrop(20, 0.75)(pair[0], ignored)[1].shape == (1, 20, 20), "nothing to choose between"


def test_photometric_distortion_changes_no_map_and_exchanges_no_colours() -> None:
    torch.manual_seed(0)
    parameters = [PhotometricDistortion().make_params([torch.zeros(3, 4, 4)]) for _ in range(20)]
    assert {made["channel_permutation"] for made in parameters} == {None}
    assert any(made["hue_factor"] for made in parameters)
    image = tv_tensors.Image(torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8))
    classes = tv_tensors.Mask(torch.randint(0, 4, (1, 8, 8), dtype=torch.uint8))
    changed = 0
    for _ in range(10):
        other, same = PhotometricDistortion()(image, classes)
        assert torch.equal(same, classes)
        changed += not torch.equal(other, image)
    assert changed >= 8


def test_evaluation_keeps_the_aspect_and_the_map_as_it_was() -> None:
    values = blocks(100, 150)
    made = SegmentationEvaluationTransform(**{**EVALUATION, "ratios": [0.5, 1.0]})(sample(values))
    assert [tuple(image.shape) for image in made["image"]] == [(3, 32, 48), (3, 64, 96)]
    assert torch.equal(made["map"], torch.from_numpy(values) - 1) and made["map"].dtype == torch.uint8
    assert fitted_size((100, 1000), 64, 256, 1.0) == [26, 256], "the long side is the limit"
    assert fitted_size((1, 4000), 64, 256, 1.0) == [1, 256]
    batch = collate_whole([made, SegmentationEvaluationTransform(**EVALUATION)(sample(blocks(40, 30)))])
    assert [len(views) for views in batch["image"]] == [2, 1] and batch["label"].tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (SegmentationTransform, {"ratio": [2.0, 0.5]}, r"ratio=\[2.0, 0.5\]"),
        (SegmentationTransform, {"largest_share": 0.0}, "largest_share=0.0"),
        (SegmentationTransform, {"long_side": 63}, "image_size=64 must be .* long_side=63 no less"),
        (SegmentationTransform, {"image_size": [64, 32]}, r"image_size=\[64, 32\] must be an integer"),
        (SegmentationEvaluationTransform, {"ratios": []}, r"ratios=\[\]"),
        (SegmentationEvaluationTransform, {"ratios": [0.0]}, r"ratios=\[0.0\]"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(kind: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**{**(TRAINING if kind is SegmentationTransform else EVALUATION), **changes})


# Maps


def test_values_of_maps() -> None:
    values = np.array([[0, 1], [4, 255]], np.uint8)
    grey, palette = png(values), png(values, palette=list(range(255, -1, -1)) * 3)
    assert Image.open(io.BytesIO(palette)).mode == "P"
    for content in (grey, palette):
        assert EncodedMap(content).values(4).tolist() == values.tolist()
    made = segmentation.decoded({"image": EncodedImage(png(COLOURS[values % 5])), "map": EncodedMap(grey)}, 4)
    assert made[1][0].tolist() == [[IGNORED, 0], [3, IGNORED]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "map of classes does not decode"),
        (png(np.zeros((8, 8), np.uint8))[:40], "map of classes does not decode"),
        (png(np.zeros((8, 8, 3), np.uint8)), "mode RGB; a map has one value of 8 bits"),
        (png(np.zeros((8, 8), np.uint16)), "mode I;16"),
        (png(np.full((8, 8), 5, np.uint8)), "has the value 5, and there are 4 classes"),
        (png(np.zeros((8, 9), np.uint8)), "image has 8 x 8 pixels, its map 8 x 9"),
    ],
)
def test_bad_maps(content: bytes, message: str) -> None:
    bad = {**sample(np.zeros((8, 8), np.uint8)), "map": EncodedMap(content)}
    for transform in (SegmentationTransform(**TRAINING), SegmentationEvaluationTransform(**EVALUATION)):
        with pytest.raises(CorruptSampleError, match=message):
            transform(bad)


# Scenes, packing, streams


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes") / "tree"
    write_tree(root, {"training": 8, "validation": 4})
    return root


def test_scenes_are_exact() -> None:
    found = [*scenes("training", 4), *scenes("validation", 4)]
    for scene in found:
        assert scene.image.shape[:2] == scene.masks.shape[1:] and scene.image.dtype == np.uint8
        assert scene.masks.sum(0).max() <= 1, "a pixel belongs to one digit"
        assert len(scene.labels) == len(scene.boxes) == len(scene.masks) > 0
        for label, mask, (left, top, right, bottom) in zip(scene.labels, scene.masks, scene.boxes, strict=True):
            inside = np.zeros_like(mask)
            inside[int(top) : int(bottom), int(left) : int(right)] = True
            assert mask.any() and not mask[~inside].any()
            assert mask[int(top)].any() and mask[int(bottom) - 1].any()
            assert mask[:, int(left)].any() and mask[:, int(right) - 1].any()
            assert (scene.semantic()[mask] == label + 1).all()
        assert (scene.semantic()[~scene.masks.any(0)] == 11).all()
    again = next(scenes("training", 1))
    assert all(np.array_equal(a, b) for a, b in zip(again, found[0], strict=True))
    assert not np.array_equal(found[0].image[:90, :90], found[4].image[:90, :90])
    with pytest.raises(ValueError, match="no part 'test'; choose one of training, validation"):
        next(scenes("test"))


def test_a_tree_is_written_once_and_packed(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds images already"):
        write_tree(tree)
    manifest = pack(str(tree / "images/training"), tmp_path / "shards", format="ade20k", shard_size=3, seed=0, jobs=1)
    assert manifest.classes == (*CLASSES, BACKGROUND) and len(manifest) == 8
    assert verify(manifest) == []
    expected = next(scenes("training", 1))
    assert np.array_equal(
        np.array(Image.open(tree / "annotations/training/scene_training_00000.png")), expected.semantic()
    )


def loaded(manifest: Manifest, **changes: Any) -> list[dict[str, Any]]:
    data = Mixture((manifest,))
    settings = {"rank": 0, "world_size": 1, "workers": 0, "start_step": 0, "stop_step": 3, "max_corrupt_share": 1.0}
    transform = SegmentationTransform(**{**TRAINING, "num_classes": 11, "photometric": True})
    order = data.order(seed=0, global_batch=4)
    stream = training_stream(
        data, order, transform, collate, micro_batch=2, open_sample=with_map, **{**settings, **changes}
    )
    return list(stream)


def test_streams_have_one_order_and_resume(tree: Path, tmp_path: Path) -> None:
    manifest = pack(str(tree / "images/training"), tmp_path / "shards", format="ade20k", shard_size=3, seed=0, jobs=1)
    whole = loaded(manifest)
    assert len(whole) == 6 and whole[0]["image"].shape == (2, 3, 64, 64) and whole[0]["map"].shape == (2, 64, 64)
    resumed, parted = loaded(manifest, start_step=2), [loaded(manifest, world_size=2, rank=rank) for rank in (0, 1)]
    for name in ("image", "map"):
        for a, b in zip(whole[4:], resumed, strict=True):
            assert torch.equal(a[name], b[name])
    keys = [key for batch in whole for key in batch["key"]]
    assert sorted(keys[:4] + keys[4:8]) == sorted({key for batch in parted[0] + parted[1] for key in batch["key"]})
    pictures = {key: image for batch in whole[:4] for key, image in zip(batch["key"], batch["map"], strict=True)}
    for batch in [*parted[0][:2], *parted[1][:2]]:
        for key, image in zip(batch["key"], batch["map"], strict=True):
            assert torch.equal(pictures[key], image)


def test_a_sample_with_a_broken_map_is_replaced(tree: Path, tmp_path: Path) -> None:
    broken = tmp_path / "tree"
    shutil.copytree(tree, broken)
    names = sorted(path.stem for path in (broken / "images/training").iterdir())
    maps = [broken / f"annotations/training/{name}.png" for name in names]
    maps[1].write_bytes(maps[1].read_bytes()[:60])
    Image.new("L", (7, 7)).save(maps[2])
    Image.fromarray(np.full_like(np.array(Image.open(maps[3])), 12)).save(maps[3])
    manifest = pack(str(broken / "images/training"), tmp_path / "shards", format="ade20k", shard_size=3, seed=0, jobs=1)
    found = verify(manifest)
    assert len(found) == 3 and all(any(name in line for line in found) for name in names[1:4])
    stream = evaluation_stream(
        manifest,
        SegmentationEvaluationTransform(**{**EVALUATION, "num_classes": 11}),
        collate_whole,
        seed=0,
        batch=3,
        rank=0,
        world_size=1,
        workers=0,
        max_corrupt_share=1.0,
        open_sample=with_map,
    )
    batches = list(stream)
    assert sum(len(batch["key"]) for batch in batches) == 8
    assert len(stream.corrupt.names) == 3
    for reason in ("does not decode", "its map 7 x 7", "has the value 12, and there are 11 classes"):
        assert any(reason in name for name in stream.corrupt.names)
    with pytest.raises(CorruptSampleError, match=r"no map of classes among its members \['jpg'\]"):
        with_map({"jpg": b""}, ())


# The task


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
