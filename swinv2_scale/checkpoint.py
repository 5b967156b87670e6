"""Checkpoints that resume a run: written whole or not at all, verified before they are used.

    RUN_DIR/checkpoints/step_00000400/
        model.safetensors       float32 master weights in the released naming, running statistics of batch norms;
                                metadata: model, pretrained_windows
        optimizer.safetensors   exp_avg.<name>, exp_avg_sq.<name>
        ema.safetensors         averages of the weights, where they are kept: a file of weights like the first
        state.json              step, loss scale; seed, global batch and data hash; versions
        config.yaml             the resolved configuration
        MANIFEST.json           size and SHA-256 of each file above
        COMPLETE                written last

Tensors are whole and named, so a checkpoint belongs to no world size and no ZeRO stage.
"""

import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from swinv2_scale import distributed
from swinv2_scale.data.manifest import sha256_of
from swinv2_scale.engine import AVERAGE, Engine

FOLDER = "checkpoints"
HEADER = 2**22  # bytes that a file written tensor by tensor has for their names, shapes and places
Part = tuple[Iterable[tuple[str, Tensor]], dict[str, str]]  # a file's tensors by name, and its metadata


class Saved(NamedTuple):
    """What became of a checkpoint: `problem` is None, or why it could not be written.

    stall_seconds is what training waited for, write_seconds what the disk worked.
    """

    step: int
    path: Path
    problem: str | None
    stall_seconds: float
    write_seconds: float


class Saver:
    """Writes the checkpoints of a run, one at a time, in a thread of rank 0 while training goes on.

    The newest `keep` are kept, and those whose step is a multiple of keep_every (0: none). One that cannot be written
    (a full disk) leaves those that were there untouched; except with keep 0, for disks that hold only one: then the
    others are removed before the new one is written.

    Where the engine's states lie on a disk because no memory holds them, training waits while they are copied.
    """

    def __init__(self, run_dir: Path, keep: int, keep_every: int = 0) -> None:
        if keep < 0 or keep_every < 0:
            raise ValueError(f"keep_checkpoints={keep} and keep_every={keep_every} must be 0 or more")
        self._run_dir, self._keep, self._keep_every = run_dir, keep, keep_every
        # One thread for all of them, which waits between: a process that forks (loading workers) while a thread ends
        # may hand its child a lock that nobody releases.
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._finished: SimpleQueue[Saved] = SimpleQueue()

    def save(self, engine: Engine, *, step: int, state: dict[str, Any], metadata: dict[str, Any]) -> None:
        """Copy the checkpoint of `step` finished steps to rank 0's memory, and begin to write it. Collective.

        state goes to state.json, metadata (JSON values) into the headers of the files of weights. Waits until the
        checkpoint before is written.
        """
        begin = time.monotonic()
        self.wait()
        header = {key: json.dumps(value) for key, value in metadata.items()} | {"format": "pt"}
        parts: dict[str, Part] = {"model": (chain(engine.parameters(), engine.buffers()), header)}
        parts["optimizer"] = (engine.optimizer_state(), {"format": "pt"})
        if engine.has_averages:
            parts["ema"] = (chain(engine.averages(), engine.buffers()), header)
        state = {"step": step, "updates": engine.updates, "loss_scale": engine.loss_scale.state, **state}
        if engine.on_disk:  # no memory holds them all: training waits until they are written, one after the other
            if distributed.rank() == 0:
                self._write(step, dict(parts), state, begin, save_one_by_one)
            for tensors, _ in parts.values():  # the other ranks' part; and what rank 0 could not write
                deque(tensors, maxlen=0)
            return
        whole = {name: (_on_rank_0(tensors), header) for name, (tensors, header) in parts.items()}
        if distributed.rank() == 0:
            self._writing = self._thread.submit(self._write, step, whole, state, begin, save_file, time.monotonic())

    def wait(self) -> None:
        """Until nothing is being written. Only rank 0 ever waits."""
        if self._writing is not None:
            self._writing.result()

    def finished(self) -> list[Saved]:
        """The checkpoints that were finished since the last call; on ranks other than 0 none ever are."""
        return [self._finished.get() for _ in range(self._finished.qsize())]

    def _write(
        self,
        step: int,
        parts: dict[str, Any],
        state: dict[str, Any],
        begin: float,
        save: Callable[[Any, Path, dict[str, str]], None],
        gathered: float | None = None,
    ) -> None:
        """Write what training began to save at `begin`, and waited for until `gathered`; None: until it is written."""
        problem = None
        target = self._run_dir / FOLDER / f"step_{step:08d}"
        temporary = target.with_name(f".{target.name}.partial")
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            for path in _newest_first(self._run_dir) if self._keep == 0 else ():
                shutil.rmtree(path)
            while parts:  # each file's tensors are given back as soon as they are written
                name, (tensors, header) = parts.popitem()
                save(tensors, temporary / f"{name}.safetensors", header)
            (temporary / "state.json").write_text(json.dumps(state, indent=1))
            shutil.copy(self._run_dir / "config.yaml", temporary)
            _publish(temporary, target, max(self._keep, 1), self._keep_every)
        except (OSError, SafetensorError) as error:
            problem = str(error)
            shutil.rmtree(temporary, ignore_errors=True)
        end = time.monotonic()
        self._finished.put(Saved(step, target, problem, (gathered or end) - begin, end - (gathered or begin)))


def save_one_by_one(tensors: Iterable[tuple[str, Tensor]], path: Path, metadata: dict[str, str]) -> None:
    """A safetensors file of float32 tensors that need not be in memory together; its header is filled in at the end."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    with path.open("wb") as file:
        file.seek(8 + HEADER)
        for name, tensor in tensors:
            begin, end = end, end + 4 * tensor.numel()
            header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
            file.write(tensor.contiguous().numpy().data)
        text = json.dumps(header).encode().ljust(HEADER)  # the format pads with spaces
        assert len(text) == HEADER, len(text)
        file.seek(0)
        file.write(len(text).to_bytes(8, "little") + text)


def _on_rank_0(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Gather named tensors. Collective; ranks other than 0 keep none."""
    kept = {}
    for name, tensor in tensors:
        if distributed.rank() == 0:
            kept[name] = tensor
    return kept


def _publish(temporary: Path, target: Path, keep: int, keep_every: int = 0) -> None:
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
    older = [path for path in others if path < target][keep - 1 :]
    for path in later + [path for path in older if not keep_every or _step(path) % keep_every]:
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
    expected = dict(engine.shapes()) | {name: tuple(buffer.shape) for name, buffer in engine.buffers()}
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
    engine.loss_scale.state = state["loss_scale"]
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


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _flush(path: Path) -> None:
    """Bring a file's content, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
