"""The commands `swinv2-scale data …` and `report`, through main()."""

import json
import sys
import types
from pathlib import Path

import pytest

from swinv2_scale.cli import main


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--global-batch", "400"], "choose a global batch of 1 to 359"),
        (["--global-batch", "8", "--world", "3"], "--global-batch 8 is no multiple of --world 3"),
        (["--global-batch", "8", "--world", "2", "--rank", "2"], "--rank 2 is not one of 0 to 1"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(packed, capsys, options, message):
    assert main(["data", "order", str(packed), *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ") and message in lines[-1]
    assert not any("Traceback" in line for line in lines)


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
