"""The manifest: locating samples, indexing shards that have none, and every error with its remedy."""

import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from swinv2_scale.data.folder import one_file
from swinv2_scale.data.idx import index
from swinv2_scale.data.manifest import Manifest, open_manifest
from swinv2_scale.data.pack import write_shards
from swinv2_scale.data.shards import read_sample


@pytest.fixture
def packed(tmp_path: Path) -> Manifest:
    root = tmp_path / "packed"
    root.mkdir()
    items = [one_file(f"dir/k{i:02d}", "png", i % 2, bytes([i]) * (100 + 700 * i)) for i in range(10)]
    return write_shards(items, root, classes=["a", "b"], shard_size=4, seed=0, origin={"seed": 0})


def test_all_ways_to_name_a_data_set_agree(packed, caplog):
    for source in (packed.root, str(packed.root), packed.root / "manifest.json"):
        opened = open_manifest(source)
        assert opened.hash == packed.hash and opened.classes == ("a", "b") and len(opened) == 10
    assert not caplog.records
    by_headers = open_manifest(f"{packed.root}/shard-*.tar")
    assert np.array_equal(by_headers.offsets, packed.offsets)
    assert [shard.samples for shard in by_headers.shards] == [shard.samples for shard in packed.shards]
    assert [read_sample(by_headers, i) for i in range(10)] == [read_sample(packed, i) for i in range(10)]
    assert len(caplog.records) == 1 and "swinv2-scale data index" in caplog.text


def test_every_sample_is_located_within_its_shard(packed):
    ends: dict[Path, int] = {}
    for number in range(10):
        path, offset, size = packed.locate(number)
        assert offset == ends.get(path, 0) and size > 0
        ends[path] = offset + size
    assert ends == {packed.root / shard.name: shard.bytes for shard in packed.shards}
    for outside in (-1, 10):
        with pytest.raises(IndexError):
            packed.locate(outside)


def test_offsets_are_mapped_and_pickled_by_name(packed):
    assert isinstance(packed.offsets, np.memmap)
    copy = pickle.loads(pickle.dumps(packed))
    assert isinstance(copy.offsets, np.memmap)
    assert packed.offsets.tobytes() not in pickle.dumps(packed)
    assert [copy.locate(i) for i in range(10)] == [packed.locate(i) for i in range(10)]


def test_index_writes_the_manifest_that_packing_wrote(packed):
    expected = json.loads((packed.root / "manifest.json").read_text())["shards"]
    with pytest.raises(ValueError, match="already has a manifest"):
        index(packed.root)
    (packed.root / "manifest.json").unlink()
    (packed.root / "offsets.npy").unlink()
    written = index(packed.root)
    assert json.loads((packed.root / "manifest.json").read_text())["shards"] == expected
    assert written.hash == packed.hash
    assert sorted(p.name for p in packed.root.iterdir()) == sorted(
        ["manifest.json", "offsets.npy", *(shard.name for shard in packed.shards)]
    )


def test_hash_depends_on_the_shards_alone(packed):
    content = json.loads((packed.root / "manifest.json").read_text())
    content["origin"] = {"source": "elsewhere"}
    (packed.root / "manifest.json").write_text(json.dumps(content))
    assert open_manifest(packed.root).hash == packed.hash
    content["shards"][0]["sha256"] = "0" * 64
    (packed.root / "manifest.json").write_text(json.dumps(content))
    assert open_manifest(packed.root).hash != packed.hash


def test_missing_path_shows_what_exists(packed):
    with pytest.raises(ValueError, match=r"packet does not exist.*holds packed/"):
        open_manifest(packed.root.parent / "packet")
    with pytest.raises(ValueError, match=r"nowhere/deep does not exist.*holds packed/"):
        open_manifest(packed.root.parent / "nowhere" / "deep")
    with pytest.raises(ValueError, match=r"x-\*\.tar does not exist.*shard-000000.tar"):
        open_manifest(packed.root / "x-*.tar")


def test_a_directory_without_shards(packed):
    with pytest.raises(ValueError, match=r"neither a manifest.json nor .tar files.*holds packed/.*data pack"):
        open_manifest(packed.root.parent)


def test_missing_changed_and_truncated_shards(packed):
    path = packed.root / packed.shards[1].name
    content = path.read_bytes()
    path.write_bytes(content[:-512])
    with pytest.raises(ValueError, match=rf"{path.name} has .* bytes but its manifest says .*copy it again"):
        open_manifest(packed.root)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{path.name} is listed in .*but does not exist; copy it again"):
        open_manifest(packed.root)


@pytest.mark.parametrize("keep", ["half a member", "whole members"])
def test_truncated_shards_without_a_manifest(packed, keep):
    path, offset, size = packed.locate(1)
    content = path.read_bytes()
    path.write_bytes(content[: offset + size] if keep == "whole members" else content[: offset + 700])
    with pytest.raises(ValueError, match=rf"{path.name} .*truncated.*again"):
        open_manifest(path)


def test_a_file_that_is_no_tar(tmp_path):
    (tmp_path / "picture.tar").write_bytes(b"\xff\xd8" * 4000)
    (tmp_path / "empty.tar").write_bytes(b"")
    for name in ("picture.tar", "empty.tar"):
        with pytest.raises(ValueError, match=rf"{name} is no uncompressed tar file"):
            open_manifest(tmp_path / name)


def test_empty_data_sets(packed, tmp_path):
    with tarfile.open(tmp_path / "none.tar", "w"):
        pass
    with pytest.raises(ValueError, match=r"none.tar .*without a single sample.*pack it again"):
        open_manifest(tmp_path / "none.tar")
    content = json.loads((packed.root / "manifest.json").read_text())
    (packed.root / "manifest.json").write_text(json.dumps({**content, "shards": []}))
    with pytest.raises(ValueError, match="lists no sample: the data set is empty"):
        open_manifest(packed.root)


def test_manifests_that_are_none(packed):
    path = packed.root / "manifest.json"
    content = json.loads(path.read_text())
    for text, message in (
        ("{", "is no manifest of shards"),
        ("[]", "is no manifest of shards"),
        (json.dumps({**content, "version": 99}), "format version 99"),
        (json.dumps({**content, "shards": [*content["shards"], content["shards"][0]]}), "lists 13 samples"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"{message}.*data index"):
            open_manifest(packed.root)
    path.write_text(json.dumps(content))
    (packed.root / "offsets.npy").unlink()
    with pytest.raises(ValueError, match=r"offsets.npy is missing.*copy it too"):
        open_manifest(path)
