"""A checkpoint is used only when every byte of it is what was written."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import swinv2_scale.checkpoint as checkpoint_module
from swinv2_scale.checkpoint import Saver, _publish, verify, weights_file
from swinv2_scale.cli import main
from swinv2_scale.optim import LossScale


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


def seal(run_dir: Path, step: int, keep: int, keep_every: int = 0) -> None:
    partial = run_dir / f"checkpoints/.step_{step:08d}.partial"
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"weights")
    _publish(partial, run_dir / f"checkpoints/step_{step:08d}", keep, keep_every)


def test_the_newest_are_kept_and_later_ones_which_must_be_damaged_are_not(tmp_path: Path) -> None:
    for step in (100, 200, 300):
        seal(tmp_path, step, keep=2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000200", "step_00000300"]
    assert all(verify(tmp_path / "checkpoints" / name) is None for name in names)
    (tmp_path / "checkpoints/step_00000300/COMPLETE").unlink()  # the run continues at 200 and saves 250
    seal(tmp_path, 250, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000250"]


def test_every_so_many_steps_one_is_kept_for_good(tmp_path: Path) -> None:
    for step in range(100, 800, 100):
        seal(tmp_path, step, keep=2, keep_every=300)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [f"step_{step:08d}" for step in (300, 600, 700)]
    with pytest.raises(ValueError, match="keep_checkpoints=0 and keep_every=-1 must be 0 or more"):
        Saver(tmp_path, keep=0, keep_every=-1)


class Trained:
    """As much of an engine as a checkpoint needs."""

    has_averages, updates, loss_scale, on_disk = True, 7, LossScale(1.0, grows=False), False

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "w", torch.ones(3)

    averages = parameters

    def buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "norm.running_mean", torch.zeros(3)

    def optimizer_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "exp_avg.w", torch.ones(3)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "ema.safetensors"])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    (tmp_path / "config.yaml").write_text("name: x\n")

    def save_file(tensors: dict, path: Path, metadata: dict) -> None:
        if path.name == file and "00000002" in str(path):
            raise OSError(28, "No space left on device")
        path.write_bytes(b"tensors")

    monkeypatch.setattr(checkpoint_module, "save_file", save_file)
    saver = Saver(tmp_path, keep=1)
    for step in (1, 2):
        saver.save(Trained(), step=step, state={}, metadata={})
    saver.wait()
    first, second = saver.finished()
    assert first.problem is None and verify(first.path) is None
    assert second.path.name == "step_00000002" and "No space left" in str(second.problem)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    assert saver.finished() == []


@pytest.mark.usefixtures("one_rank")
def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text("name: x\n")
    disk = Event()

    def save_file(tensors: dict, path: Path, metadata: dict) -> None:
        assert disk.wait(20)
        path.write_bytes(b"tensors")

    monkeypatch.setattr(checkpoint_module, "save_file", save_file)
    saver = Saver(tmp_path, keep=1)
    saver.save(Trained(), step=1, state={}, metadata={})  # comes back while the disk waits
    assert saver.finished() == [] and not (tmp_path / "checkpoints/step_00000001").exists()
    disk.set()
    saver.save(Trained(), step=2, state={}, metadata={})  # waits for the first
    assert [saved.step for saved in saver.finished()][:1] == [1]
    saver.wait()
    assert verify(tmp_path / "checkpoints/step_00000002") is None


def test_what_a_path_means(checkpoint: Path, tmp_path: Path) -> None:
    model = checkpoint / "model.safetensors"
    assert weights_file(tmp_path) == weights_file(checkpoint) == weights_file(model) == model
    (checkpoint / "COMPLETE").unlink()
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        weights_file(tmp_path)


def test_the_command_verifies_one_checkpoint_or_all_of_a_run(checkpoint: Path, tmp_path: Path, capsys) -> None:
    assert main(["checkpoint", "verify", str(checkpoint)]) == 0
    assert capsys.readouterr().out == f"{checkpoint}: intact\n"
    seal(tmp_path, 5, keep=2)
    (checkpoint / "MANIFEST.json").unlink()
    assert main(["checkpoint", "verify", str(tmp_path)]) == 1
    newest, damaged = capsys.readouterr().out.splitlines()
    assert newest.endswith("step_00000005: intact") and "step_00000004: its MANIFEST.json cannot be read" in damaged
    assert main(["checkpoint", "verify", str(checkpoint)]) == 1
    assert main(["checkpoint", "verify", str(tmp_path / "nothing")]) == 2
    assert "is no checkpoint, and no run directory that holds one" in capsys.readouterr().err


class OnDisk(Trained):
    """Its states are too large for memory."""

    on_disk = True


@pytest.mark.usefixtures("one_rank")
def test_a_checkpoint_is_written_tensor_by_tensor_where_no_memory_holds_it(tmp_path: Path) -> None:
    """And with keep=0 in the place of the one before."""
    (tmp_path / "config.yaml").write_text("name: x\n")
    saver = Saver(tmp_path, keep=0)
    for step in (1, 2):
        saver.save(OnDisk(), step=step, state={}, metadata={"classes": ["a"]})
        (saved,) = saver.finished()  # at once
        assert saved.problem is None and verify(saved.path) is None
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]
    assert torch.equal(load_file(saved.path / "optimizer.safetensors")["exp_avg.w"], torch.ones(3))
    with safe_open(saved.path / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("w"), torch.ones(3)) and json.loads(file.metadata()["classes"]) == ["a"]
