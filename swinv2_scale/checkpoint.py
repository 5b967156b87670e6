"""Checkpoints that resume a run: written whole or not at all, verified before they are used.

    RUN_DIR/checkpoints/step_00000400/
        model.safetensors       float32 master weights in the released naming; metadata: model, pretrained_windows
        optimizer.safetensors   exp_avg.<name>, exp_avg_sq.<name>
        ema.safetensors         averages of the weights, where they are kept: a file of weights like the first
        state.json              step; seed, global batch and data hash; versions
        config.yaml             the resolved configuration
        MANIFEST.json           size and SHA-256 of each file above
        COMPLETE                written last

Tensors are whole and named, so a checkpoint belongs to no world size and no ZeRO stage.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from swinv2_scale import distributed
from swinv2_scale.data.manifest import sha256_of
from swinv2_scale.engine import AVERAGE, Engine

FOLDER = "checkpoints"


def save(
    run_dir: Path, engine: Engine, *, step: int, state: dict[str, Any], metadata: dict[str, Any], keep: int
) -> Path:
    """Write the checkpoint of `step` finished steps. Collective; rank 0 writes. It and keep - 1 older ones are kept.

    state goes to state.json, metadata (JSON values) into the header of model.safetensors. Raises OSError on every
    rank when it cannot be written (a full disk); the checkpoints that were there are untouched then.
    """
    target = run_dir / FOLDER / f"step_{step:08d}"
    temporary = target.with_name(f".{target.name}.partial")
    header = {key: json.dumps(value) for key, value in metadata.items()} | {"format": "pt"}
    writer = _Writer(temporary, writes=distributed.rank() == 0)
    writer.tensors("model.safetensors", engine.parameters(), header)
    writer.tensors("optimizer.safetensors", engine.optimizer_state(), {"format": "pt"})
    if engine.has_averages:
        writer.tensors("ema.safetensors", engine.averages(), header)
    writer.call(
        lambda: (temporary / "state.json").write_text(
            json.dumps({"step": step, "updates": engine.updates, **state}, indent=1)
        )
    )
    writer.call(lambda: shutil.copy(run_dir / "config.yaml", temporary))
    writer.call(lambda: _publish(temporary, target, keep))
    if problem := distributed.from_rank_0(writer.problem):
        raise OSError(f"checkpoint {target} could not be written: {problem}")
    return target


class _Writer:
    """Rank 0's files of one checkpoint. After an error nothing is written, but gathering goes on: it is collective."""

    def __init__(self, directory: Path, writes: bool) -> None:
        self.directory, self.writes = directory, writes
        self.problem: str | None = None
        self.call(lambda: shutil.rmtree(directory, ignore_errors=True))
        self.call(lambda: directory.mkdir(parents=True))

    def call(self, write: Callable[[], object]) -> None:
        """Do something on rank 0's disk, unless it failed before."""
        if self.writes and self.problem is None:
            try:
                write()
            except (OSError, SafetensorError) as error:
                self.problem = str(error)
                shutil.rmtree(self.directory, ignore_errors=True)

    def tensors(self, name: str, tensors: Iterable[tuple[str, Tensor]], metadata: dict[str, str]) -> None:
        """Gather named tensors on all ranks, and write them as one safetensors file."""
        gathered = {}
        for key, tensor in tensors:
            if self.writes and self.problem is None:
                gathered[key] = tensor.contiguous()
        self.call(lambda: save_file(gathered, self.directory / name, metadata))


def _publish(temporary: Path, target: Path, keep: int) -> None:
    """Seal a written checkpoint with its hashes, give it its name, and remove what is no longer to be kept."""
    files = sorted(temporary.iterdir())
    manifest = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in files}
    (temporary / "MANIFEST.json").write_text(json.dumps(manifest, indent=1))
    (temporary / "COMPLETE").touch()
    for path in temporary.iterdir():
        _flush(path)
    shutil.rmtree(target, ignore_errors=True)  # damaged, or it would have been resumed from
    temporary.rename(target)
    _flush(target.parent)
    others = [path for path in _newest_first(target.parents[1]) if path != target]
    later = [path for path in others if path > target]  # damaged too, for the same reason
    for path in later + [path for path in others if path < target][keep - 1 :]:
        shutil.rmtree(path, ignore_errors=True)


def latest(run_dir: Path, warn: Any) -> Path | None:
    """The newest checkpoint that verifies, or None, agreed by all ranks; `warn` is told of damaged ones. Collective."""

    def search() -> Path | None:
        for path in _newest_first(run_dir):
            problem = verify(path)
            if problem is None:
                return path
            warn(f"skipping the checkpoint {path}: {problem}")
        return None

    return distributed.from_rank_0(search() if distributed.rank() == 0 else None)


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    if not (path / "COMPLETE").exists():
        return "its COMPLETE marker is missing: it was not written to the end"
    try:
        manifest = json.loads((path / "MANIFEST.json").read_text())
    except (OSError, ValueError) as error:
        return f"its MANIFEST.json cannot be read: {error}"
    for name, expected in manifest.items():
        file = path / name
        if not file.exists():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
        if sha256_of(file) != expected["sha256"]:
            return f"{name} does not have the recorded SHA-256"
    return None


def restore(path: Path, engine: Engine, identity: dict[str, Any]) -> dict[str, Any]:
    """Load a verified checkpoint into the engine, and return the state that was saved with it.

    identity: what must be as it was (seed, global batch, data, model) for the run to continue. Raises ValueError when
    it is not, and when the checkpoint is of the model of another task.
    """
    state = json.loads((path / "state.json").read_text())
    for key, value in identity.items():
        if state["identity"].get(key) != value:
            raise ValueError(
                f"checkpoint {path} was trained with {key}={state['identity'].get(key)}, not {value} as here: this run "
                "cannot be continued. Restore the setting, or start another run (name=…) with checkpoint=…"
            )
    expected = dict(engine.shapes())
    with safe_open(path / "model.safetensors", framework="pt") as model:
        saved = {name: tuple(model.get_slice(name).get_shape()) for name in model.keys()}  # noqa: SIM118
        if saved != expected:
            name = next(name for name in {**expected, **saved} if saved.get(name) != expected.get(name))
            raise ValueError(
                f"checkpoint {path} is of another model: {name} has shape {saved.get(name, 'none')} there and "
                f"{expected.get(name, 'none')} here. Give the run another name=…, or its directory back its model"
            )
        with ExitStack() as files:
            names = ("optimizer", "ema") if engine.has_averages else ("optimizer",)
            opened = {name: files.enter_context(safe_open(path / f"{name}.safetensors", "pt")) for name in names}

            def state_of(key: str) -> Tensor:
                kind, _, name = key.partition(".")
                return opened["ema"].get_tensor(name) if kind == AVERAGE else opened["optimizer"].get_tensor(key)

            engine.load(model.get_tensor, state_of, step=state["updates"])
    assert isinstance(state, dict)
    return state


def weights_file(path: str | Path) -> Path:
    """The file that a user's path means: itself, that of a checkpoint, or that of a run directory's newest one."""
    path = Path(path)
    if (path / "model.safetensors").exists():
        return path / "model.safetensors"
    newest = [checkpoint for checkpoint in _newest_first(path) if verify(checkpoint) is None] if path.is_dir() else []
    if path.is_dir() and not newest:
        raise ValueError(
            f"checkpoint {path}: this directory holds no complete checkpoint; is the run's training finished?"
        )
    return newest[0] / "model.safetensors" if newest else path


def checkpoints(path: Path) -> list[Path]:
    """The checkpoints of a run directory, the newest first, or the one that `path` is."""
    return [path] if path.is_dir() and path.name.startswith("step_") else _newest_first(path)


def _newest_first(run_dir: Path) -> list[Path]:
    return sorted((run_dir / FOLDER).glob("step_*"), reverse=True)


def _flush(path: Path) -> None:
    """Bring a file's content, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
