"""The commands `swinv2-scale data …` and `report`, through main()."""

import io
import itertools
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from webdataset import TarWriter

from swinv2_scale.cli import main

_buffer = io.BytesIO()
Image.new("RGB", (4, 4)).save(_buffer, "PNG")
PIXEL = _buffer.getvalue()


@pytest.fixture
def packed(tmp_path: Path, capsys) -> Path:
    destination = tmp_path / "digits"
    arguments = ["data", "pack", "digits/validation", str(destination), "--format", "demo", "--shard-size", "100"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("359 samples in 4 shard(s), 10 classes")
    return destination


def test_pack_image_folder(tmp_path, capsys, packed):
    (tmp_path / "tree" / "cat").mkdir(parents=True)
    (tmp_path / "tree" / "cat" / "a.png").write_bytes(b"never decoded")
    assert main(["data", "pack", str(tmp_path / "tree"), str(tmp_path / "cats"), "--shard-size", "1MB"]) == 0
    assert "1 samples in 1 shard(s), 1 classes" in capsys.readouterr().out
    assert main(["data", "verify", str(tmp_path / "cats")]) == 1
    assert "shard-000000.tar:cat/a: image does not decode" in capsys.readouterr().out


def test_verify_and_stats(packed, capsys):
    assert main(["data", "verify", str(packed)]) == 0
    assert "0 problem(s)" in capsys.readouterr().out
    assert main(["data", "stats", str(packed / "manifest.json")]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 359


def test_index(packed, capsys):
    (packed / "manifest.json").unlink()
    assert main(["data", "index", str(packed)]) == 0
    assert "359 samples in 4 shard(s)" in capsys.readouterr().out
    assert main(["data", "index", str(packed)]) == 2


def keys(capsys, packed: Path, *options: str) -> list[list[str]]:
    assert main(["data", "order", str(packed), "--seed", "1", "--global-batch", "8", *options]) == 0
    return [json.loads(line)["keys"] for line in capsys.readouterr().out.splitlines()]


def test_order(packed, capsys):
    whole = keys(capsys, packed)
    assert len(whole) == 44 and len({key for step in whole for key in step}) == 352
    ranks = [keys(capsys, packed, "--world", "2", "--rank", str(rank)) for rank in range(2)]
    assert whole == [a + b for a, b in zip(*ranks, strict=True)]
    ranks = [keys(capsys, packed, "--world", "2", "--rank", str(rank), "--micro-batch", "2") for rank in range(2)]
    assert whole == [a[:2] + b[:2] + a[2:] + b[2:] for a, b in zip(*ranks, strict=True)]
    assert keys(capsys, packed, "--start-step", "40") == whole[40:]
    assert keys(capsys, packed, "--start-step", "3", "--steps", "2") == whole[3:5]
    assert keys(capsys, packed, "--epoch", "1", "--steps", "1") == keys(
        capsys, packed, "--start-step", "44", "--steps", "1"
    )
    assert main(["data", "order", str(packed), "--global-batch", "8", "--epoch", "1", "--steps", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 44


def test_the_order_does_not_depend_on_ranks_workers_or_where_it_is_cut(tmp_path, capsys):
    """Through the real loader, over three unequal shards: fewer than workers x ranks."""
    for name, samples in (("a", 3), ("b", 30), ("c", 20)):
        with TarWriter(str(tmp_path / f"{name}.tar")) as writer:
            for number in range(samples):
                writer.write({"__key__": f"{name}{number}", "png": PIXEL, "cls": "0"})
    assert main(["data", "index", str(tmp_path)]) == 0

    def ordered(*options: object) -> list[list[str]]:
        capsys.readouterr()
        chosen = ["--seed", 5, "--global-batch", 24, "--open-shards", 2, "--start-step", 1, "--steps", 3, *options]
        assert main(["data", "order", str(tmp_path), *map(str, chosen)]) == 0
        return [json.loads(line)["keys"] for line in capsys.readouterr().out.splitlines()]

    whole = ordered()
    assert [len(set(step)) for step in whole] == [24, 24, 24]
    assert len(set(whole[1] + whole[2])) == 48  # steps 2 and 3 are the second epoch
    for world, workers in itertools.product((1, 2, 3, 4, 8), (0, 1, 3)):
        ranks = [ordered("--world", world, "--rank", rank, "--workers", workers) for rank in range(world)]
        assert [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)] == whole, (world, workers)
    assert ordered("--start-step", 3, "--steps", 1, "--workers", 1) == whole[2:]
    assert ordered("--start-step", 1, "--steps", 1, "--epoch", 1) == whole[2:]


def test_the_order_of_several_sources(tmp_path, capsys, packed):
    single = TarWriter(str(tmp_path / "one.tar"))
    single.write({"__key__": "single", "png": PIXEL, "cls": "0"})
    single.close()
    arguments = ["data", "order", str(packed), str(tmp_path / "one.tar"), "--global-batch", "8", "--steps", "5"]
    capsys.readouterr()
    assert main([*arguments, "--weights", "3", "1"]) == 0
    assert [line.count('"single"') for line in capsys.readouterr().out.splitlines()] == [2] * 5
    assert main(arguments) == 0
    assert sum(line.count('"single"') for line in capsys.readouterr().out.splitlines()) <= 1


def test_a_shard_that_ends_too_early_is_one_line_from_a_worker_too(packed, capsys):
    offsets = np.load(packed / "offsets.npy")
    offsets[:80] += 10**6  # past the end of the first shard
    np.save(packed / "offsets.npy", offsets)
    capsys.readouterr()
    for workers in ("0", "1"):
        assert main(["data", "order", str(packed), "--global-batch", "8", "--workers", workers]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1].startswith("error: rank 0, worker ") and "was truncated" in lines[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--global-batch", "8", "--workers", "-1"], "--workers -1 is negative"),
        (["--global-batch", "8", "--weights", "1", "2"], "2.0] for 1 sources"),
        (["--global-batch", "400"], "choose a global batch of 1 to 359"),
        (["--global-batch", "8", "--world", "3"], "--global-batch 8 is no multiple of --world 3"),
        (["--global-batch", "8", "--world", "0"], "--world 0 is no number of ranks; choose 1 or more"),
        (["--global-batch", "8", "--world", "2", "--rank", "2"], "--rank 2 is not one of 0 to 1"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(packed, capsys, options, message):
    assert main(["data", "order", str(packed), *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ") and message in lines[-1]
    assert not any("Traceback" in line for line in lines)


def test_stats_need_an_open_shard(packed, capsys):
    assert main(["data", "stats", str(packed), "--open-shards", "0"]) == 2
    assert "open_shards is 0; choose 1 or more" in capsys.readouterr().err


def test_missing_path(tmp_path, capsys):
    assert main(["data", "verify", str(tmp_path / "nothing")]) == 2
    assert "nothing does not exist" in capsys.readouterr().err


def test_report_calls_the_report_of_each_run(monkeypatch, capsys, tmp_path):
    report = types.ModuleType("swinv2_scale.report")
    written = []
    report.write_report = written.append
    report.headline = lambda run_dir: f"headline of {run_dir.name}"
    monkeypatch.setitem(sys.modules, "swinv2_scale.report", report)
    assert main(["report", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    assert capsys.readouterr().out.splitlines() == ["headline of one", "headline of two"]
    assert written == [tmp_path / "one", tmp_path / "two"]


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as exit_code:
        main(["--help"])
    assert exit_code.value.code == 0
    assert {"data", "checkpoint", "report"} <= set(capsys.readouterr().out.split())
