"""Packing and reading: deterministic bytes, readable by plain webdataset, nothing lost, errors that name the remedy."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from webdataset import TarWriter

from swinv2_scale.data import demo, idx
from swinv2_scale.data.folder import image_folder, one_file
from swinv2_scale.data.images import CorruptSampleError, decode
from swinv2_scale.data.manifest import open_manifest, split_member
from swinv2_scale.data.mixture import Mixture
from swinv2_scale.data.pack import pack, parse_shard_size, write_shards
from swinv2_scale.data.shards import open_sample, read_sample, stats, verify


def encode(pixels: np.ndarray, file_format: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, file_format)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """30 images in 3 classes, with the names that break naive keys."""
    random = np.random.default_rng(0)
    names = [
        "a.jpg",
        "a.png",
        "b.c.jpg",
        "b_c.jpg",
        "UPPER.JPG",
        "ünï.png",
        "x" * 120 + ".png",
        "p.bmp",
        "q.tif",
        "r.webp",
    ]
    for label in ("cat", "dog", "zebra"):
        (tmp_path / "folder" / label).mkdir(parents=True)
        for name in names:
            extension = Path(name).suffix[1:].lower()
            file_format = {"jpg": "JPEG", "tif": "TIFF"}.get(extension, extension.upper())
            pixels = random.integers(0, 256, (9, 11, 3), dtype=np.uint8)
            (tmp_path / "folder" / label / name).write_bytes(encode(pixels, file_format))
    (tmp_path / "folder" / "dog" / "notes.txt").write_text("no image")
    (tmp_path / "folder" / "dog" / ".thumbnails").mkdir()
    (tmp_path / "folder" / "dog" / ".thumbnails" / "a.jpg").write_bytes(b"hidden")
    return tmp_path / "folder"


def test_plain_webdataset_reads_the_bytes_and_labels_of_the_sources(folder, tmp_path):
    manifest = pack(str(folder), tmp_path / "out", format="imagefolder", shard_size=7, seed=1)
    urls = [str(manifest.root / shard.name) for shard in manifest.shards]
    found = []
    for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False):
        (extension,) = {name for name in sample if not name.startswith("__")} - {"cls"}
        found.append((manifest.classes[int(sample["cls"])], extension, sample[extension]))
    sources = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".txt" and ".thumbnails" not in p.parts]
    assert len(sources) == 30
    assert sorted(found) == sorted((p.parent.name, p.suffix[1:].lower(), p.read_bytes()) for p in sources)


def test_random_access_finds_the_same_samples_as_webdataset(folder, tmp_path):
    manifest = pack(str(folder), tmp_path / "out", format="imagefolder", shard_size=7, seed=1)
    urls = [str(manifest.root / shard.name) for shard in manifest.shards]
    plain = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert len(plain) == len(manifest) == len({sample["__key__"] for sample in plain}) == 30
    for index, sample in enumerate(plain):
        key, members = read_sample(manifest, index)
        assert key == sample["__key__"]
        assert members == {name: content for name, content in sample.items() if not name.startswith("__")}


def test_keys_are_split_as_webdataset_splits_them():
    from webdataset.tariterators import base_plus_ext

    for name in ("a.jpg", "d/e.f/a.b.jpg", "d/noext", "./x.png", "d.e/noext", "a."):
        key, extension = base_plus_ext(name)
        assert split_member(name) == (None if key is None else (key, extension)), name
    assert split_member("d/.hidden.jpg") is None
    assert split_member("__meta__/a.json") is None


def test_packing_is_deterministic_and_shuffled_by_the_seed(folder, tmp_path):
    def contents(name: str, seed: int) -> list[bytes]:
        manifest = pack(str(folder), tmp_path / name, format="imagefolder", shard_size=8, seed=seed)
        return [(manifest.root / shard.name).read_bytes() for shard in manifest.shards]

    first = contents("first", 0)
    assert first == contents("again", 0)
    assert first != contents("other", 1)
    assert open_manifest(tmp_path / "first").hash == open_manifest(tmp_path / "again").hash
    assert open_manifest(tmp_path / "first").hash != open_manifest(tmp_path / "other").hash
    keys = [read_sample(open_manifest(tmp_path / "first"), index)[0] for index in range(30)]
    assert keys != sorted(keys)


def test_shards_are_near_equal(tmp_path):
    items = [one_file(f"k{i}", "png", 0, bytes(3000)) for i in range(103)]
    for number, shard_size in enumerate((25, "120KB")):
        root = tmp_path / str(number)
        root.mkdir()
        manifest = write_shards(items, root, classes=["c"], shard_size=shard_size, seed=0, origin={})
        counts = [shard.samples for shard in manifest.shards]
        assert sum(counts) == 103 and len(counts) == 5
        assert max(counts) - min(counts) <= 1, counts


def test_shard_sizes():
    assert parse_shard_size(1000) == (1000, False)
    assert parse_shard_size("256MB") == (256_000_000, True)
    for wrong in ("256XB", "0", "", "-3"):
        with pytest.raises(ValueError, match="256MB"):
            parse_shard_size(wrong)


def test_second_packing_is_left_alone_and_another_one_refused(folder, tmp_path, caplog):
    caplog.set_level("INFO")
    arguments = {"format": "imagefolder", "shard_size": 8, "seed": 0}
    pack(str(folder), tmp_path / "out", **arguments)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert "already packed" not in caplog.text
    pack(str(folder), tmp_path / "out", **arguments)
    assert "already packed" in caplog.text
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    with pytest.raises(ValueError, match=r"seed 0, not 5.*another directory"):
        pack(str(folder), tmp_path / "out", **{**arguments, "seed": 5})
    next(folder.rglob("*.png")).unlink()  # a source that has changed is not what was packed
    with pytest.raises(ValueError, match=r"was packed with files .*remove it"):
        pack(str(folder), tmp_path / "out", **arguments)
    with pytest.raises(ValueError, match="seed -1 is negative"):
        pack(str(folder), tmp_path / "other", **{**arguments, "seed": -1})
    with pytest.raises(ValueError, match="holds no packed data"):
        pack(str(folder), folder, **arguments)


def test_an_interrupted_packing_leaves_no_destination(folder, tmp_path, monkeypatch):
    def fail(self: Path) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(KeyboardInterrupt):
        pack(str(folder), tmp_path / "out", format="imagefolder", shard_size=8, seed=0, jobs=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "folder"]
    assert [path.name for path in tmp_path.glob(".out.partial/shards/*.tar")] == []


def test_image_folder_errors(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is no directory.*SOURCE/class"):
        image_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no class directories"):
        image_folder(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(ValueError, match="1 class directories but no images"):
        image_folder(tmp_path)


@pytest.mark.parametrize("name", ["photographs", "digits"])
def test_demo_data_decode_and_share_no_key(name, tmp_path):
    keys = {}
    for split in demo.SPLITS:
        manifest = pack(f"{name}/{split}", tmp_path / split, format="demo", shard_size="256MB", seed=0)
        samples = [read_sample(manifest, index) for index in range(len(manifest))]
        keys[split] = {key for key, _ in samples}
        labels = {open_sample(members, manifest.classes)[1] for _, members in samples}
        assert len(keys[split]) == len(manifest)
        assert labels == set(range(len(manifest.classes)))
    assert not keys["train"] & keys["validation"]
    if name == "digits":
        assert (len(keys["train"]), len(keys["validation"])) == (1438, 359)


def test_no_pixel_of_a_photograph_is_in_both_splits():
    for path in demo.photograph_files().values():
        with Image.open(path) as image:
            width, height = image.size
        uses = np.zeros((2, height, width), dtype=np.int64)
        for number, split in enumerate(demo.SPLITS):
            for left, top in demo.tile_corners(width, height, split):
                assert 0 <= left <= width - demo.TILE and 0 <= top <= height - demo.TILE
                uses[number, top : top + demo.TILE, left : left + demo.TILE] += 1
        assert uses.sum(0).max() == 1
        assert uses[0].any() and uses[1].any()


def test_tiles_are_the_photographs_pixels():
    _, items = demo.photographs("validation")
    item = next(item for item in items if item.key.startswith("astronaut/"))
    top, left = map(int, item.key.split("/")[1].split("-"))
    with Image.open(demo.photograph_files()["astronaut"]) as image:
        tile = np.asarray(image.convert("RGB"))[top : top + demo.TILE, left : left + demo.TILE]
    difference = np.abs(decode(item.members["jpg"]).permute(1, 2, 0).numpy().astype(int) - tile)
    assert difference.mean() < 2


def test_digits_keep_their_values():
    from sklearn.datasets import load_digits

    _, items = demo.digits("train")
    item = items[17]
    index = int(item.key.split("-")[1])
    assert np.array_equal(decode(item.members["png"])[0].numpy(), np.round(load_digits().images[index] * 255 / 16))


def test_unknown_demo_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'digits/test'.*digits/validation"):
        demo.samples("digits/test")


def test_four_photographs_are_a_batch_of_held_out_ones() -> None:
    classes, four = demo.samples("photographs/four")
    everything, held_out = demo.samples("photographs/validation")
    assert classes == everything and len(four) == 4 and len({item.label for item in four}) == 4
    assert all(item in held_out for item in four)


def test_every_format_becomes_eight_bit_rgb():
    grey = (np.arange(48 * 48) % 256).astype(np.uint8).reshape(48, 48)
    for mode in ("L", "LA", "RGB", "RGBA", "P", "CMYK"):
        for file_format in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"):
            buffer = io.BytesIO()
            try:
                Image.fromarray(grey).convert(mode).save(buffer, file_format)
            except (OSError, ValueError):
                continue  # the format does not store that mode
            image = decode(buffer.getvalue())
            assert image.shape == (3, 48, 48) and str(image.dtype) == "torch.uint8", (mode, file_format)
            assert np.abs(image.numpy().astype(int) - grey).max() <= 10, (mode, file_format)
    wide = grey.astype(np.uint16) * 256 + 77
    for file_format in ("PNG", "TIFF"):
        assert np.array_equal(decode(encode(wide, file_format))[0].numpy(), grey), file_format
    buffer = io.BytesIO()
    frames = [Image.fromarray(grey), Image.fromarray(grey.T)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    assert np.array_equal(decode(buffer.getvalue())[0].numpy(), grey)
    with pytest.raises(CorruptSampleError, match="no known range"):
        decode(encode(grey.astype(np.float32), "TIFF"))


def test_unusable_samples_are_named():
    good = encode(np.zeros((8, 8, 3), np.uint8), "JPEG")
    for content in (b"not an image", b"", good[: len(good) // 2]):
        with pytest.raises(CorruptSampleError, match="does not decode"):
            decode(content)
    with pytest.raises(CorruptSampleError, match=r"no image among its members \['cls'\]"):
        open_sample({"cls": b"0"}, ["c"])
    with pytest.raises(CorruptSampleError, match="no class among its members"):
        open_sample({"jpg": good}, ["c"])
    with pytest.raises(CorruptSampleError, match="class 1 is not one of 0 to 0"):
        open_sample({"jpg": good, "cls": b"1"}, ["c"])
    with pytest.raises(CorruptSampleError, match="'x' is no integer"):
        open_sample({"jpg": good, "cls": b"x"}, [])
    assert open_sample({"jpg": good}, [])[1] == -1


def test_verify_finds_changed_bytes_and_undecodable_images(tmp_path):
    good = encode(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8), "PNG")
    items = [one_file(f"k{i}", "png", 0, good if i != 3 else b"broken") for i in range(6)]
    manifest = write_shards(items, tmp_path, classes=["c"], shard_size=10, seed=0, origin={})
    assert [problem.split(": ")[0] for problem in verify(manifest)] == ["shard-000000.tar:k3"]
    path = tmp_path / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # in the padding: every sample still reads
    path.write_bytes(content)
    assert "sha256" in verify(open_manifest(tmp_path))[0]


def test_stats_count(tmp_path):
    items = [one_file(f"k{i}", "png", i % 2, encode(np.zeros((8 + i, 16, 3), np.uint8), "PNG")) for i in range(6)]
    numbers = stats(write_shards(items, tmp_path, classes=["a", "b"], shard_size=3, seed=0, origin={}))
    assert (numbers["samples"], numbers["shards"], numbers["labels"]) == (6, 2, {"a": 3, "b": 3})
    assert numbers["height"] == {"min": 8, "median": 11, "max": 13}
    assert numbers["mixing"]["open_shards"] == 64 and numbers["mixing"]["stored"] == pytest.approx(4 / 5)


def test_keys_that_occur_twice(tmp_path):
    """In two shards, `verify` names both; within a sample, which of two members is meant cannot be told."""
    image = encode(np.zeros((8, 8, 3), np.uint8), "PNG")
    for name, keys in (("a", ["k0", "k1"]), ("b", ["k2", "k1"])):
        with TarWriter(str(tmp_path / f"{name}.tar")) as writer:
            for key in keys:
                writer.write({"__key__": key, "png": image, "cls": "0"})
    assert verify(open_manifest(tmp_path)) == ["b.tar:k1: its key is also that of sample 1 in a.tar"]
    with tarfile.open(tmp_path / "c.tar", "w") as tar:
        for name in ("k3.png", "k3.cls", "k3.png"):
            info = tarfile.TarInfo(name)
            info.size = len(image)
            tar.addfile(info, io.BytesIO(image))
    (problem,) = [line for line in verify(open_manifest(tmp_path)) if line.startswith("c.tar")]
    assert "two members png of one key: give each sample a key of its own" in problem


def test_a_shard_without_samples_among_others(tmp_path):
    image = encode(np.zeros((8, 8, 3), np.uint8), "PNG")
    TarWriter(str(tmp_path / "a.tar")).close()
    with TarWriter(str(tmp_path / "b.tar")) as writer:
        writer.write({"__key__": "k", "png": image, "cls": "0"})
    TarWriter(str(tmp_path / "c.tar")).close()
    manifest = idx.index(tmp_path)
    assert [shard.samples for shard in manifest.shards] == [0, 1, 0]
    assert read_sample(manifest, 0)[0] == "k" and verify(manifest) == []
    order = Mixture((manifest,), open_shards=1).order(seed=0, global_batch=1)
    assert [order.global_batch_of(step)[1].tolist() for step in range(3)] == [[0]] * 3
    (tmp_path / "d.tar").touch()
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"d.tar (is no uncompressed tar file|lacks the end marker)"):
        idx.index(tmp_path)
