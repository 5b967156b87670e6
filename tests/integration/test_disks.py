"""Small and read-only file systems under a real run. They are mounted, which takes root; elsewhere the tests skip."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from real_runs import Run, run
from test_faults import STEPS, settings

from swinv2_scale.checkpoint import verify

ROOM = 400_000  # bytes left on the full disk: enough for the record, not for a checkpoint


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=60M", "tmpfs", str(path)]
    if os.getuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a file system can only be mounted by root")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_costs_checkpoints_and_nothing_else(disk: Path, launch: Callable[..., Run], shards: Path) -> None:
    """The run goes on without those that do not fit, fails on the last one, and goes on from the one before it."""
    directory = disk / "run"

    def fill(ranks: list[int]) -> None:
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
        with (disk / "ballast").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free - ROOM)

    full = run(directory, *settings(shards), "checkpoint_every=3", at=(4, fill))
    assert full.returncode == 1, full.output
    assert sorted(full.events("checkpoint_failed")) == [6, 9, 12] and len(full.events("train")) == STEPS
    assert "step_00000012 could not be written" in full.output and "No space left on device" in full.output
    left = sorted((directory / "checkpoints").iterdir())
    assert [path.name for path in left] == ["step_00000003"] and verify(left[0]) is None
    (disk / "ballast").unlink()
    continued = run(directory, *settings(shards), "checkpoint_every=3")
    assert continued.returncode == 0 and "at step 3" in continued.output, continued.output
    assert continued.losses() == launch("whole", *settings(shards)).losses()


@pytest.mark.long
def test_a_read_only_run_directory_is_refused(disk: Path, shards: Path) -> None:
    first = run(disk / "run", *settings(shards), "steps=4")
    assert first.returncode == 0, first.output
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for directory in (disk / "run", disk / "other"):
        refused = run(directory, *settings(shards))
        assert refused.returncode == 2, refused.output
        assert f"run_dir={directory} cannot be written" in refused.output and "Read-only" in refused.output
    newest = disk / "run/checkpoints/step_00000004"
    assert verify(newest) is None and json.loads((newest / "state.json").read_text())["step"] == 4
