"""Maps of classes: they stay with their images, are streamed in one order, and bad ones are found; the scenes."""

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

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
            painted = scene.image[mask].astype(int)
            assert ((painted >= 200).all(1) | (painted < 64).all(1)).all(), "light ink, dark rim"
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
