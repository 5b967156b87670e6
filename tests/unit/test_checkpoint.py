"""A checkpoint is used only when every byte of it is what was written."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from swinv2_scale.checkpoint import verify, weights_file


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints/step_00000004"
    path.mkdir(parents=True)
    files = {"model.safetensors": b"weights", "optimizer.safetensors": b"moments", "state.json": b"{}"}
    for name, content in files.items():
        (path / name).write_bytes(content)
    manifest = {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in files.items()}
    (path / "MANIFEST.json").write_text(json.dumps(manifest))
    (path / "COMPLETE").touch()
    return path


def test_an_intact_checkpoint_verifies(checkpoint: Path) -> None:
    assert verify(checkpoint) is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "COMPLETE").unlink(), "COMPLETE marker is missing"),
        (lambda path: (path / "MANIFEST.json").write_text("{"), r"MANIFEST\.json cannot be read"),
        (lambda path: (path / "optimizer.safetensors").unlink(), r"optimizer\.safetensors is missing"),
        (lambda path: (path / "state.json").write_bytes(b"{"), r"state\.json has 1 bytes instead of 2"),
        (lambda path: (path / "model.safetensors").write_bytes(b"weightz"), r"model\.safetensors does not have"),
    ],
)
def test_damage_is_found_and_named(checkpoint: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(checkpoint)
    problem = verify(checkpoint)
    assert problem is not None
    assert re.search(message, problem), problem


def test_what_a_path_means(checkpoint: Path, tmp_path: Path) -> None:
    model = checkpoint / "model.safetensors"
    assert weights_file(tmp_path) == weights_file(checkpoint) == weights_file(model) == model
    (checkpoint / "COMPLETE").unlink()
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        weights_file(tmp_path)
