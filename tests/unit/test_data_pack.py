"""Packing each published layout, in several processes, and going on after a kill; plain webdataset is the reference."""

import io
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from swinv2_scale.cli import main
from swinv2_scale.data.folder import one_file
from swinv2_scale.data.idx import index
from swinv2_scale.data.manifest import Manifest, open_manifest
from swinv2_scale.data.pack import pack, write_shards
from swinv2_scale.data.shards import read_sample, stats, verify
from swinv2_scale.data.videos import encode

RANDOM = np.random.default_rng(0)


def picture(path: Path, height: int = 9, width: int = 11) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return path.read_bytes()


def packed(source: Path, format: str, **options: Any) -> Manifest:
    destination = source.parent / f"packed-{len([*source.parent.iterdir()])}"
    settings = {"shard_size": 2, "seed": 0, "jobs": 2, **options}
    return pack(str(source), destination, format=format, **settings)


def plain(manifest: Manifest) -> dict[str, dict[str, bytes]]:
    """Members of each key as plain webdataset reads them; random access must find the same."""
    urls = [str(manifest.root / shard.name) for shard in manifest.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    found = [(s["__key__"], {name: s[name] for name in s if not name.startswith("__")}) for s in samples]
    assert found == [read_sample(manifest, number) for number in range(len(manifest))]
    assert len(dict(found)) == len(found)
    return dict(found)


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir()}


# Layouts


def table(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "table.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_csv_with_class_names(tmp_path):
    one, two = picture(tmp_path / "a/one.x.jpg"), picture(tmp_path / "a/one_x.png")
    other = picture(tmp_path / "b, c/other.png")
    source = table(
        tmp_path,
        "\ufeffclass,width,path",
        "zebra,3,a/one.x.jpg",
        "",
        f"cat,3,{tmp_path}/a/one_x.png",
        'cat,4,"b, c/other.png"',
    )
    manifest = packed(source, "csv")
    assert manifest.classes == ("cat", "zebra")
    assert manifest.samples_per_class == {"cat": 2, "zebra": 1}
    absolute = f"{tmp_path}/a/one_x"[1:]
    assert plain(manifest) == {
        "a/one_x": {"jpg": one, "cls": b"1"},
        absolute: {"png": two, "cls": b"0"},
        "b, c/other": {"png": other, "cls": b"0"},
    }
    assert verify(manifest) == []


def test_csv_with_labels_and_without(tmp_path, capsys):
    for name in "abc":
        picture(tmp_path / f"{name}.png")
    source = table(tmp_path, "path,label", "a.png,7", "b.png,2", "a.png,2")  # one image twice: two samples
    manifest = packed(source, "csv")
    assert manifest.classes == () and manifest.highest_label == 7
    assert manifest.samples_per_class == {"2": 2, "7": 1}
    assert {key: members["cls"] for key, members in plain(manifest).items()} == {"a": b"7", "b": b"2", "a~": b"2"}
    assert json.loads((manifest.root / "manifest.json").read_text())["samples_per_class"] == {"2": 2, "7": 1}
    assert main(["data", "pack", str(source), str(tmp_path / "cli"), "--format", "csv", "--jobs", "1"]) == 0
    assert "3 samples in 1 shard(s), classes: numbered: " in capsys.readouterr().out
    source = table(tmp_path, "path", "a.png", "../" + tmp_path.name + "/b.png")
    manifest = packed(source, "csv")
    assert manifest.highest_label is None and manifest.samples_per_class == {}
    assert {key: set(members) for key, members in plain(manifest).items()} == {
        "a": {"png"},
        f"{tmp_path.name}/b": {"png"},
    }
    assert verify(manifest) == [] and stats(manifest)["labels"] == {"-1": 2}
    assert main(["data", "pack", str(source), str(tmp_path / "cli2"), "--format", "csv", "--jobs", "1"]) == 0
    assert "2 samples in 1 shard(s), no classes: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["file,label", "a.png,1"], r"line 1: there is no column 'path' among \['file', 'label'\]"),
        (["path,label", "a.png,1", "gone.png,1"], r"table.csv, line 3: there is no file .*/gone.png"),
        (["path,label", "", "a.png,cat"], r"line 3: label 'cat' is no number from 0 on.*column `class`"),
        (["path,label", "a.png,-1"], r"line 2: label '-1'"),
        (["path,label", "a.png"], r"line 2: it has not the columns of the header"),
        (["path,label", "a.png,1,2"], r"line 2: it has not the columns of the header"),
        (["path,class", "a.png, "], r"line 2: the class is empty"),
        (["path,label,class", "a.png,1,cat"], r"has a column `label` and a column `class`; rename"),
        (["path", "a.heic"], r"line 2: 'a.heic' is no image \(jpg, .*convert"),
        (["path"], r"table.csv lists no sample"),
        ([], r"line 1: there is no column 'path' among \[\]"),
    ],
)
def test_csv_errors(tmp_path, lines, message):
    picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match=message):
        pack(str(table(tmp_path, *lines)), tmp_path / "out", format="csv", shard_size=2, seed=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "table.csv"]


def coco_source(root: Path) -> tuple[Path, dict[str, Any], dict[str, bytes]]:
    images = {name: picture(root / f"val2017/{name}.jpg", 8, 12) for name in ("000000000009", "000000000025", "7")}
    annotations = [
        {"id": 1, "image_id": 25, "category_id": 90, "bbox": [1.5, 2, 3, 4], "area": 12.0, "iscrowd": 0}
        | {"segmentation": [[1.5, 2, 4.5, 2, 4.5, 6]]},
        {"id": 2, "image_id": 9, "category_id": 3, "bbox": [0, 0, 2, 2], "area": 4.0, "iscrowd": 1}
        | {"segmentation": {"size": [8, 12], "counts": [0, 2, 94]}},
        {"id": 3, "image_id": 25, "category_id": 3, "bbox": [0, 0, 1, 1], "area": 1.0, "iscrowd": 0}
        | {"segmentation": [[0, 0, 1, 0, 1, 1]]},
    ]
    content = {
        "images": [{"id": int(n), "file_name": f"{n}.jpg", "width": 12, "height": 8, "license": 1} for n in images],
        "annotations": annotations,
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 3, "name": "car"}, {"id": 5, "name": "dög"}],
    }
    (root / "annotations").mkdir()
    path = root / "annotations/instances_val2017.json"
    path.write_text(json.dumps(content))
    return path, content, images


def test_coco(tmp_path):
    source, content, images = coco_source(tmp_path)
    manifest = packed(source, "coco")
    assert manifest.classes == ("car", "dög", "toothbrush")
    assert manifest.origin["category_ids"] == [3, 5, 90]
    samples = plain(manifest)
    assert {key: members["jpg"] for key, members in samples.items()} == images
    facts = {key: json.loads(members["json"]) for key, members in samples.items()}
    assert [len(facts[key]["annotations"]) for key in images] == [1, 2, 0]
    back = [(fact["image_id"], annotation) for fact in facts.values() for annotation in fact["annotations"]]
    for image_id, annotation in back:
        assert manifest.origin["category_ids"][annotation.pop("label")] == annotation["category_id"]
        assert image_id == annotation["image_id"]
    assert sorted((a for _, a in back), key=lambda a: a["id"]) == content["annotations"]
    assert facts["7"] == {"image_id": 7, "file_name": "7.jpg", "width": 12, "height": 8, "annotations": []}
    assert verify(manifest) == []
    numbers = stats(manifest)
    assert numbers["corrupt"] == 0 and numbers["width"]["max"] == 12 and numbers["members"] == {"jpg": 3, "json": 3}


def test_coco_errors(tmp_path):
    source, content, _ = coco_source(tmp_path)

    def refused(message: str, **changes: Any) -> None:
        source.write_text(json.dumps({**content, **changes}))
        with pytest.raises(ValueError, match=message):
            packed(source, "coco")

    refused("annotation 1 is of image 4 and category 3", annotations=[{"id": 1, "image_id": 4, "category_id": 3}])
    refused("is no COCO annotation file .*KeyError: 'width'", images=[{"id": 9, "file_name": "7.jpg"}], annotations=[])
    refused("is no COCO annotation file .*TypeError", images=3)
    missing = [*content["images"], {"id": 1, "file_name": "x.jpg", "width": 1, "height": 1}]
    refused(r"1 of 4 images of .* are missing, the first .*val2017/x.jpg; unpack", images=missing)
    source.write_text("[")
    with pytest.raises(ValueError, match=r"is no COCO annotation file .*JSONDecodeError"):
        packed(source, "coco")
    with pytest.raises(ValueError, match=r"give ROOT/annotations/instances_SPLIT.json"):
        packed(tmp_path / "val2017", "coco")
    (tmp_path / "val2017").rename(tmp_path / "images")
    with pytest.raises(ValueError, match=r"neither in .*annotations/val2017 nor in .*/val2017; move or link"):
        packed(source, "coco")


def test_verify_finds_what_is_wrong_with_a_coco_sample(tmp_path):
    source, content, _ = coco_source(tmp_path)
    content["images"][0]["width"] = 13
    content["annotations"] = []  # whose masks tell it before anything is packed
    source.write_text(json.dumps(content))
    (problem,) = verify(packed(source, "coco"))
    assert "000000000009: image has 8 x 12 pixels, its annotation 8 x 13" in problem


def ade_source(root: Path) -> tuple[Path, dict[str, dict[str, bytes]]]:
    samples = {}
    for number in range(3):
        name = f"ADE_val_{number:08d}"
        mask = root / f"annotations/validation/{name}.png"
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RANDOM.integers(0, 3, (7, 6), dtype=np.uint8)).save(mask)
        samples[name] = {"jpg": picture(root / f"images/validation/{name}.jpg", 7, 6), "seg.png": mask.read_bytes()}
    (root / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.15\t11664\t1172\t1\twall\n2\t0.1\t6046\t612\t1\tbuilding, edifice\n"
    )
    return root / "images/validation", samples


def test_ade20k(tmp_path):
    source, samples = ade_source(tmp_path / "ADEChallengeData2016")
    manifest = packed(source, "ade20k")
    assert manifest.classes == ("wall", "building, edifice")
    assert plain(manifest) == samples
    assert verify(manifest) == [] and stats(manifest)["corrupt"] == 0
    Image.new("L", (5, 7)).save(source.parents[1] / "annotations/validation/ADE_val_00000001.png")
    (problem,) = verify(packed(source, "ade20k"))
    assert "ADE_val_00000001: image has 7 x 6 pixels, its annotation 7 x 5" in problem
    Image.new("L", (6, 7), 3).save(source.parents[1] / "annotations/validation/ADE_val_00000001.png")
    (problem,) = verify(packed(source, "ade20k"))
    assert problem.endswith("ADE_val_00000001: map of classes has the value 3, and there are 2 classes")
    (source.parents[1] / "objectInfo150.txt").unlink()
    manifest = packed(source, "ade20k")
    assert manifest.classes == () and verify(manifest) == []
    (source.parents[1] / "annotations/validation/ADE_val_00000002.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 images have no mask, the first of them ADE_val_00000002.jpg"):
        packed(source, "ade20k")
    with pytest.raises(ValueError, match="give ADEChallengeData2016/images/SPLIT"):
        packed(source.parent, "ade20k")


def video(path: Path) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(RANDOM.integers(0, 256, (2, 16, 16, 3), np.uint8), [0.0, 0.04]))
    return path.read_bytes()


def test_kinetics_directories(tmp_path, capsys, caplog):
    one = video(tmp_path / "k/abseiling/_0abc_000003_000013.mp4")
    two = video(tmp_path / "k/zumba/v.1.webm")
    manifest = packed(tmp_path / "k", "kinetics")
    assert manifest.classes == ("abseiling", "zumba") and manifest.samples_per_class == {"abseiling": 1, "zumba": 1}
    assert plain(manifest) == {
        "abseiling/_0abc_000003_000013": {"mp4": one, "cls": b"0"},
        "zumba/v_1": {"webm": two, "cls": b"1"},
    }
    assert main(["data", "verify", str(manifest.root)]) == 0
    assert stats(manifest)["labels"] == {"abseiling": 1, "zumba": 1} and stats(manifest)["height"]["max"] == 16
    (tmp_path / "k/zumba/v.1.webm").write_bytes(two[:200])
    assert list(plain(packed(tmp_path / "k", "kinetics"))) == ["abseiling/_0abc_000003_000013"]
    assert "1 of 2 videos are broken, such as " in caplog.text and "v.1.webm (video does not open" in caplog.text
    (tmp_path / "k/abseiling/_0abc_000003_000013.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match="none of 2 videos can be read"):
        packed(tmp_path / "k", "kinetics")
    with pytest.raises(ValueError, match="class directories but no videos"):
        (tmp_path / "empty/cat").mkdir(parents=True)
        packed(tmp_path / "empty", "kinetics")


def test_kinetics_table(tmp_path, caplog):
    one, two = video(tmp_path / "train/-xyz_000003_000013.mp4"), video(tmp_path / "replacement/b_000000_000010.avi")
    video(tmp_path / "train/b_000000_000010.mp4")
    (tmp_path / "annotations").mkdir()
    source = tmp_path / "annotations/train.csv"
    source.write_text(
        "label,youtube_id,time_start,time_end,split\n"
        "zumba,-xyz,3,13,train\nabseiling,gone,1,11,train\nbaking cookies,b,0,10,train\n"
    )
    manifest = packed(source, "kinetics")
    assert manifest.classes == ("abseiling", "baking cookies", "zumba")
    assert manifest.samples_per_class == {"baking cookies": 1, "zumba": 1}
    assert plain(manifest) == {
        "zumba/-xyz_000003_000013": {"mp4": one, "cls": b"2"},
        "baking cookies/b_000000_000010": {"avi": two, "cls": b"1"},
    }
    assert "1 of 3 videos are missing, such as abseiling/gone_000001_000011.mp4; they are left out" in caplog.text
    source.write_text("label,youtube_id,time_start,time_end\nzumba,gone,3,13\n")
    with pytest.raises(ValueError, match=r"none of the 1 videos .* the first would be zumba/gone_000003_000013.mp4"):
        packed(source, "kinetics")
    source.write_text("label,youtube_id,time_start,time_end\nzumba,-xyz,3,later\n")
    with pytest.raises(ValueError, match=r"train.csv, line 2: .*'later' must be whole seconds"):
        packed(source, "kinetics")


def test_kinetics_list(tmp_path, caplog):
    one, two = video(tmp_path / "videos/riding a bike/a.mp4"), video(tmp_path / "other/b.mp4")
    source = tmp_path / "videos/train.txt"
    source.write_text(f"riding a bike/a.mp4 7\n\n{tmp_path}/other/b.mp4 2\ngone.mp4 1\n")
    manifest = packed(source, "kinetics")
    assert manifest.classes == () and manifest.highest_label == 7
    found = plain(manifest)
    assert found["riding a bike/a"] == {"mp4": one, "cls": b"7"}
    assert [members for key, members in found.items() if key.endswith("other/b")] == [{"mp4": two, "cls": b"2"}]
    assert "1 of 3 videos are missing, such as gone.mp4" in caplog.text
    source = source.with_suffix(".csv")
    source.write_text("riding a bike/a.mp4,7\n")
    assert plain(packed(source, "kinetics")) == {"riding a bike/a": {"mp4": one, "cls": b"7"}}
    source.write_text("riding a bike/a.mp4,7\nb.mp4,seven\n")
    with pytest.raises(ValueError, match=r'line 2: .*is no "path label" of a video'):
        packed(source, "kinetics")


def test_names_that_are_no_keys_are_refused(tmp_path):
    picture(tmp_path / "tree/__meta__/a.png")
    with pytest.raises(ValueError, match=r"'__meta__/a' with 'png' is no name for a sample.*rename"):
        packed(tmp_path / "tree", "imagefolder")


def test_manifests_without_counts_still_open(tmp_path):
    picture(tmp_path / "tree/cat/a.png")
    manifest = packed(tmp_path / "tree", "imagefolder")
    assert stats(manifest)["samples_per_class"] == {"cat": 1}
    path = manifest.root / "manifest.json"
    content = json.loads(path.read_text())
    del content["samples_per_class"]
    path.write_text(json.dumps(content))
    assert open_manifest(path).samples_per_class == {} and open_manifest(path).hash == manifest.hash


# Processes, interruptions, faults


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """1,200 files of 1 to 3 kB in 3 classes, never decoded."""
    root = tmp_path_factory.mktemp("tree")
    for number in range(1200):
        path = root / "abc"[number % 3] / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(RANDOM.bytes(1000 + number % 7 * 300))
    return root


def test_bytes_do_not_depend_on_the_number_of_processes(tree, tmp_path):
    expected = None
    for jobs in (1, 2, 5, 50):
        manifest = pack(str(tree), tmp_path / str(jobs), format="imagefolder", shard_size="200KB", seed=3, jobs=jobs)
        expected = expected or contents(manifest.root)
        assert contents(manifest.root) == expected
        assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
    assert len(expected) > 10
    assert verify_hashes(manifest)
    with pytest.raises(ValueError, match="0 jobs cannot pack"):
        pack(str(tree), tmp_path / "0", format="imagefolder", shard_size="200KB", seed=3, jobs=0)


def verify_hashes(manifest: Manifest) -> bool:
    """Whether the hashes and offsets that were taken while writing are those of a reader."""
    before = (manifest.shards, manifest.offsets.tolist())
    for name in ("manifest.json", "offsets.npy"):
        (manifest.root / name).unlink()
    again = index(manifest.root)
    return (again.shards, again.offsets.tolist()) == before


def start(*arguments: str, prelude: str = "") -> subprocess.Popen:
    code = f"import sys\n{prelude}\nfrom swinv2_scale.cli import main\nsys.exit(main(sys.argv[1:]))"
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True)


def wait_until(condition: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_killed_packing_goes_on(tree, tmp_path, caplog):
    caplog.set_level("INFO")
    arguments = {"format": "imagefolder", "shard_size": 2, "seed": 0, "jobs": 2}
    whole = pack(str(tree), tmp_path / "whole", **arguments)
    assert len(whole.shards) == 600
    out, shards = tmp_path / "out", tmp_path / ".out.partial/shards"
    process = start("data", "pack", str(tree), str(out), "--shard-size", "2", "--jobs", "2")
    wait_until(lambda: len([*shards.glob(".written/*.json")]) > 20)
    with pytest.raises(ValueError, match=r"another process is packing into .*out; wait for it, or end it"):
        pack(str(tree), out, **arguments)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    orphans = [p for p in shards.glob(".shard*.partial")]
    finished = {path.name.removesuffix(".json") for path in shards.glob(".written/*.json")}
    assert 20 < len(finished) < 600 and not out.exists()
    before = {name: (shards / name).stat() for name in finished}
    caplog.clear()
    wait_until(lambda: unlocked(tmp_path / ".out.partial/lock"))
    resumed = pack(str(tree), out, **arguments)
    assert "going on from" in caplog.text
    assert contents(out) == contents(whole.root), orphans
    for name, status in before.items():
        assert (resumed.root / name).stat().st_ino == status.st_ino
        assert (resumed.root / name).stat().st_mtime_ns == status.st_mtime_ns
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def unlocked(path: Path) -> bool:
    """Whether the processes that the killed one had started have ended: they hold its lock."""
    return subprocess.run(["flock", "--nonblock", str(path), "true"], check=False).returncode == 0


@pytest.fixture
def interrupted(tmp_path) -> Path:
    """A source whose last file cannot be read, packed up to there."""
    for number in range(20):
        picture(tmp_path / f"tree/cat/{number:02d}.png")
    (tmp_path / "tree/cat/99.png").symlink_to("/proc/self/mem")  # its first bytes give an input/output error
    with pytest.raises(
        ValueError, match=r"cannot read .*cat/99.png \(Input/output error\); .*The same command goes on"
    ):
        pack(str(tmp_path / "tree"), tmp_path / "out", format="imagefolder", shard_size=1, seed=0, jobs=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "tree"]
    assert 0 < len([*tmp_path.glob(".out.partial/shards/.written/*.json")]) < 21
    return tmp_path


def test_partial_work_for_another_source_is_discarded(interrupted, caplog):
    (interrupted / "tree/cat/99.png").unlink()
    picture(interrupted / "tree/cat/00.png")
    manifest = packed_out(interrupted)
    assert "tree has changed since it was packed in part: the finished shards are discarded" in caplog.text
    assert len(manifest) == 20 and verify(manifest) == []
    assert sorted(path.name for path in interrupted.iterdir()) == ["out", "tree"]


def test_partial_work_with_other_settings_is_kept(interrupted):
    before = sorted(interrupted.glob(".out.partial/**/*"))
    with pytest.raises(
        ValueError, match=r"holds an interrupted packing with seed 0, not 4; finish that one, or remove"
    ):
        packed_out(interrupted, seed=4)
    assert sorted(interrupted.glob(".out.partial/**/*")) == before


def packed_out(root: Path, seed: int = 0) -> Manifest:
    return pack(str(root / "tree"), root / "out", format="imagefolder", shard_size=1, seed=seed, jobs=1)


def test_a_full_disk(tmp_path):
    """A limit on the size of files stands for the full disk: the same call of the system fails."""
    for number in range(20):
        (tmp_path / "tree/cat").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"tree/cat/{number:02d}.png").write_bytes(RANDOM.bytes(400_000 if number == 7 else 1000))
    command = ["data", "pack", str(tmp_path / "tree"), str(tmp_path / "out"), "--shard-size", "1", "--jobs", "1"]
    process = start(*command, prelude=f"import resource; resource.setrlimit({resource.RLIMIT_FSIZE}, (300000,) * 2)")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    last = errors.splitlines()[-1]
    assert last.startswith("error: cannot write ") and ".tar (File too large). The same command goes on" in last
    assert "Traceback" not in errors and not (tmp_path / "out").exists()
    finished = {path.name: path.stat().st_ino for path in tmp_path.glob(".out.partial/shards/*.tar")}
    assert 0 < len(finished) < 20
    assert main(command) == 0
    assert len(open_manifest(tmp_path / "out")) == 20
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in finished} == finished


def test_a_process_that_is_killed_is_an_error(tree, tmp_path):
    """As the kernel does when memory runs out."""
    process = start("data", "pack", str(tree), str(tmp_path / "out"), "--shard-size", "1", "--jobs", "2")
    wait_until(lambda: [*tmp_path.glob(".out.partial/shards/.written/*.json")])
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "a packing process ended with exit code -9 (-9: killed" in errors.splitlines()[-1]


# .idx files


def wds2idx(tar: Path, version: str) -> None:
    """The index that NVIDIA DALI's wds2idx writes beside a tar."""
    samples: list[tuple[str, list[str]]] = []
    with tarfile.open(tar) as archive:
        for member in archive.getmembers():
            directory, slash, name = member.name.rpartition("/")
            if member.type != tarfile.REGTYPE or name.startswith("."):
                continue
            stem, _, extension = name.partition(".")
            words = [extension, str(member.offset_data), str(member.size), member.name]
            if not samples or samples[-1][0] != directory + slash + stem:
                samples.append((directory + slash + stem, []))
            samples[-1][1].extend(words[: 3 if version == "v1.1" else 4])
    lines = [f"{version} {len(samples)}", *(" ".join(words) for _, words in samples)]
    tar.with_suffix(".idx").write_text("\n".join(lines) + "\n")


@pytest.fixture
def foreign(tmp_path) -> Path:
    """Two shards with long names (PAX headers), members of no sample, and no manifest."""
    root = tmp_path / "foreign"
    root.mkdir()
    members = [("dir", None), ("dir/._a.jpg", b"hidden"), ("dir/a.jpg", b"1" * 700), ("dir/a.cls", b"3")]
    members += [("x" * 150 + "/ünï.jpg", b""), ("x" * 150 + "/ünï.json", b"{}" * 256)]
    members += [("b.seg.PNG", b"2" * 512), ("b.jpg", b"4" * 513)]
    for number in range(2):
        with tarfile.open(root / f"{number}.tar", "w", format=tarfile.PAX_FORMAT) as archive:
            for name, content in members:
                info = tarfile.TarInfo(f"{number}{name}")
                info.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
                info.size = len(content or b"")
                archive.addfile(info, io.BytesIO(content or b""))
    return root


def samples(manifest: Manifest) -> list[tuple[str, dict[str, bytes]]]:
    return [read_sample(manifest, number) for number in range(len(manifest))]


@pytest.mark.parametrize("version", ["v1.1", "v1.2"])
def test_idx_files_give_the_same_samples_as_reading(foreign, version, caplog):
    expected = samples(index(foreign))
    hashes = [shard.sha256 for shard in open_manifest(foreign).shards]
    assert len(expected) == 6 and all(hashes)
    (foreign / "manifest.json").unlink()
    for number in range(2):
        wds2idx(foreign / f"{number}.tar", version)
    assert not caplog.records
    manifest = index(foreign)
    assert samples(manifest) == expected
    assert [shard.sha256 for shard in manifest.shards] == ["", ""]
    assert "2 of 2 shard(s) are indexed by their .idx files, without being read: their sha256 is unknown" in caplog.text
    (foreign / "manifest.json").unlink()
    (foreign / "1.idx").unlink()
    manifest = index(foreign)
    assert samples(manifest) == expected
    assert [shard.sha256 for shard in manifest.shards] == ["", hashes[1]]


def test_idx_files_give_the_offsets_of_packed_shards(tree, tmp_path):
    manifest = pack(str(tree), tmp_path / "out", format="imagefolder", shard_size="400KB", seed=3, jobs=1)
    offsets = manifest.offsets.copy()
    for shard in manifest.shards:
        wds2idx(manifest.root / shard.name, "v1.2")
    (manifest.root / "manifest.json").unlink()
    assert np.array_equal(index(manifest.root).offsets, offsets)


def test_idx_files_that_are_not_of_the_shard(foreign):
    wds2idx(foreign / "0.tar", "v1.2")
    table = foreign / "0.idx"
    head, *lines = table.read_text().splitlines()

    def refused(message: str, *changed: str) -> None:
        table.write_text("\n".join(changed) + "\n")
        with pytest.raises(ValueError, match=message + r".*; remove it, then the tar headers of 0.tar are read"):
            index(foreign)
        assert not (foreign / "manifest.json").exists()

    refused("0.idx begins with 'v1.0 3'", "v1.0 3", *lines)
    refused("0.idx begins with 'v1.2 3', not .* its 2 lines", head, *lines[:2])
    refused("0.idx begins with ''", "")
    refused("line 3: 7 words are no multiple of 4", head, lines[0], " ".join(lines[1].split()[:7]), lines[2])
    refused("line 3: invalid literal", head, lines[0], lines[1].replace(" 0 ", " none "), lines[2])
    refused("line 4: no member can be at byte 512", head, *lines[:2], "jpg 512 3 b.jpg")
    refused("line 2: no member can be at byte 700", head, "jpg 700 3 b.jpg", *lines[1:])
    refused("is not of 0.tar, which has no 701 bytes at 2048", head, lines[0].replace(" 700 ", " 701 "), *lines[1:])
    refused("is not of 0.tar, which has no", head, *lines[:2], "jpg 1024000 3 b.jpg")


def test_shards_are_written_without_a_second_look_at_finished_ones(tmp_path):
    """write_shards goes on in a directory, and writes again what has not its full size."""
    items = [one_file(f"k{i}", "png", 0, bytes(3000)) for i in range(8)]
    settings = {"classes": ["c"], "shard_size": 2, "seed": 0, "origin": {}}
    whole = write_shards(items, tmp_path, **settings)
    expected = contents(tmp_path)
    notes = tmp_path / ".written"
    notes.mkdir()
    for shard in whole.shards[:3]:
        offsets = list(range(0, shard.samples * 4608, 4608))
        note = {"bytes": shard.bytes, "sha256": shard.sha256, "offsets": offsets}
        (notes / f"{shard.name}.json").write_text(json.dumps(note))
    (tmp_path / "manifest.json").unlink()
    (tmp_path / whole.shards[0].name).write_bytes(b"")
    (tmp_path / whole.shards[1].name).unlink()
    before = (tmp_path / whole.shards[2].name).stat().st_ino
    write_shards(items, tmp_path, **settings)
    assert contents(tmp_path) == expected
    assert (tmp_path / whole.shards[2].name).stat().st_ino == before


def gnu_idx(tar: Path) -> None:
    """The index that wds2idx writes where it asks GNU tar for the offsets, which it does by default."""
    listing = ["tar", "--list", "--block-number", "--verbose", "--file", str(tar)]
    lines = subprocess.run(listing, check=True, capture_output=True, text=True).stdout.splitlines()
    samples: list[tuple[str, list[str]]] = []
    for line, following in itertools.pairwise(lines):
        size, name = int(line.split()[4]), line.split()[7]
        offset = (int(following.split()[1].rstrip(":")) * 512 - size) // 512 * 512
        dot = name.find(".", name.rfind("/") + 1)
        if not samples or samples[-1][0] != name[:dot]:
            samples.append((name[:dot], []))
        samples[-1][1].append(f"{name[dot + 1 :]} {offset} {size} {name}")
    rows = [f"v1.2 {len(samples)}", *(" ".join(words) for _, words in samples)]
    tar.with_suffix(".idx").write_text("\n".join(rows) + "\n")


@pytest.mark.skipif(shutil.which("tar") is None, reason="GNU tar is not here")
def test_idx_files_with_gnu_tars_offsets(tmp_path):
    """Right without PAX headers; wrong with them, which is noticed; a README is no sample."""
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for name in ("README", "a.jpg", "a.cls", "LICENSE", "b.jpg", "b.cls"):
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"abc"))
    gnu_idx(tmp_path / "0.tar")
    found = samples(index(tmp_path))
    assert found == [(key, {"jpg": b"abc", "cls": b"abc"}) for key in ("a", "b")]
    (tmp_path / "manifest.json").unlink()
    with webdataset.TarWriter(str(tmp_path / "1.tar"), mtime=0.5) as writer:  # a time with a fraction: PAX headers
        for number in range(3):
            writer.write({"__key__": f"k{number}", "jpg": bytes(700), "cls": b"1"})
    gnu_idx(tmp_path / "1.tar")
    with pytest.raises(ValueError, match=r"1.idx is not of 1.tar, .*; remove it, .*does not help where GNU tar"):
        index(tmp_path)
    (tmp_path / "1.idx").unlink()
    assert len(index(tmp_path)) == 5
