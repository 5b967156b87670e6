"""Plain folders CLASS/picture.jpg: the samples that packing them would give, labels, and what is refused."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from swinv2_scale.data.manifest import open_manifest
from swinv2_scale.data.pack import pack
from swinv2_scale.data.shards import open_sample, read_sample, stats, verify
from swinv2_scale.data.stream import evaluation_stream
from swinv2_scale.data.transforms import EvaluationTransform, collate


def tree(root: Path, names: list[str]) -> Path:
    """Pictures of those names, each of another colour."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((9, 11, 3), number, np.uint8)).save(root / name)
    return root


NAMES = ["cat/a.png", "cat/a.bmp", "cat/more/b.c.PNG", "dog/a.png", "dog/x.png", "zebra/z.png", "zebra/y.png"]


def test_a_folder_reads_as_its_shards_do(tmp_path):
    root = tree(tmp_path / "folder", NAMES)
    folder = open_manifest(root)
    packed = pack(str(root), tmp_path / "packed", format="imagefolder", shard_size=3, seed=0)
    assert len(folder) == 7
    assert folder.classes == packed.classes == ("cat", "dog", "zebra")
    assert sorted(read_sample(folder, i)[0] for i in range(7)) == sorted(read_sample(packed, i)[0] for i in range(7))
    assert {k: m for k, m in (read_sample(folder, i) for i in range(7))} == {
        k: m for k, m in (read_sample(packed, i) for i in range(7))
    }
    assert verify(folder) == []
    assert stats(folder)["labels"] == {"cat": 3, "dog": 2, "zebra": 2}
    copy = pickle.loads(pickle.dumps(folder))  # as a worker that is not forked gets it
    assert [read_sample(copy, i) for i in range(7)] == [read_sample(folder, i) for i in range(7)]


def test_order_is_fixed_and_mixed_and_the_hash_is_of_names_and_sizes(tmp_path):
    root = tree(tmp_path / "folder", [f"{name}/{number}.png" for name in "ab" for number in range(20)])
    first, again = open_manifest(root), open_manifest(root)
    assert [shard.name for shard in first.shards] == [shard.name for shard in again.shards]
    labels = [label for _, label in first.pictures]
    assert labels.count(0) == labels.count(1) == 20
    assert set(labels[:8]) == {0, 1}
    assert first.hash == again.hash
    (root / "a/0.png").write_bytes((root / "a/0.png").read_bytes() + b"more")
    assert open_manifest(root).hash != first.hash
    (root / "a/0.png").rename(root / "a/zero.png")
    assert open_manifest(root).hash not in (first.hash, "")


@pytest.mark.parametrize("packed", [False, True])
def test_directories_that_are_numbers_are_labels(tmp_path, packed):
    root = tree(tmp_path / "v2", ["0/a.png", "2/b.png", "10/c.png", "999/d.png"])  # alphabetically 0, 10, 2, 999
    data = (
        pack(str(root), tmp_path / "p", format="imagefolder", shard_size=2, seed=0) if packed else open_manifest(root)
    )
    found = {}
    for index in range(4):
        key, members = read_sample(data, index)
        image, label = open_sample(members, data.classes)
        assert torch.all(image.pixels() == ["0/a", "2/b", "10/c", "999/d"].index(key))
        found[key] = label
    assert found == {"0/a": 0, "2/b": 2, "10/c": 10, "999/d": 999}
    assert data.classes == ()
    assert data.highest_label == 999


def test_one_name_among_numbers_makes_all_of_them_names(tmp_path):
    data = open_manifest(tree(tmp_path / "t", ["10/c.png", "9/a.png", "n01440764/b.png"]))
    assert data.classes == ("10", "9", "n01440764")
    assert data.highest_label is None


def test_folders_that_cannot_be_read(tmp_path, caplog):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"neither a manifest.json nor .tar files nor CLASS/picture.jpg"):
        open_manifest(tmp_path / "nothing")
    (tmp_path / "empty/cat").mkdir(parents=True)
    with pytest.raises(ValueError, match="1 class directories but no images"):
        open_manifest(tmp_path / "empty")
    root = tree(tmp_path / "heic", ["cat/a.png"])
    (root / "dog").mkdir()
    (root / "dog/a.heic").touch()
    with pytest.raises(ValueError, match=r"heic/dog holds 1 files, the first a.heic, but no images \(jpg, .*convert"):
        open_manifest(root)
    with pytest.raises(ValueError, match="two directories of the same number, one of them 07"):
        open_manifest(tree(tmp_path / "twice", ["7/a.png", "07/a.png"]))
    assert not caplog.records
    root = tree(tmp_path / "rest", ["cat/a.png", "cat/.hidden.png"])
    (root / "dog").mkdir()
    (root / "cat/notes.txt").touch()
    (root / "picture.jpg").touch()
    assert len(open_manifest(root)) == 1
    assert "left out 2 file(s) that are no images of a class" in caplog.text
    assert "1 class directories are empty, such as dog" in caplog.text


def test_a_directory_of_packed_directories_is_no_folder_of_pictures(tmp_path):
    root = tree(tmp_path / "pictures", ["cat/a.png"])
    pack(str(root), tmp_path / "shards/train", format="imagefolder", shard_size=2, seed=0)
    with pytest.raises(ValueError, match="holds train/: correct the path"):
        open_manifest(tmp_path / "shards")


def test_a_picture_that_does_not_decode_is_replaced_and_one_that_is_gone_ends_the_run(tmp_path):
    root = tree(tmp_path / "folder", NAMES)
    (root / "dog/x.png").write_bytes(b"")
    settings = {"seed": 0, "batch": 4, "rank": 0, "world_size": 1, "workers": 0, "max_corrupt_share": 1.0}
    transform = EvaluationTransform(image_size=8, crop=False, interpolation="bicubic")
    batches = list(evaluation_stream(open_manifest(root), transform, collate, **settings))
    assert sum(len(batch["key"]) for batch in batches) == 7
    (corrupt,) = [name for batch in batches for name in batch["corrupt"]]
    assert corrupt.startswith("dog/x.png:dog/x: image does not decode")
    stream = evaluation_stream(open_manifest(root), transform, collate, **settings)
    (root / "cat/a.png").unlink()
    with pytest.raises(OSError, match=r"rank 0, worker none cannot read shard .*cat/a\.png"):
        list(stream)
