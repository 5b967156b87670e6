"""Writing shards, in one process or several, so that an interruption loses none that was finished.

    shard-000007.tar            renamed from .shard-000007.tar.partial once all of its bytes are on disk
    .written/shard-000007.json  then: its bytes, sha256 and offsets. Its presence says that the shard is finished.

The bytes of a shard depend on its samples only, not on who writes it.
"""

import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import BinaryIO

import numpy as np
from rich.console import Console
from rich.progress import track
from webdataset import TarWriter

from swinv2_scale.data.folder import Item
from swinv2_scale.data.manifest import Shard, split_member

WRITTEN = ".written"  # directory of the notes, removed when all shards are finished

Task = tuple[str, np.ndarray]  # name of a shard, indices of its samples
Write = Callable[[str, Iterable[int]], None]


def write_all(directory: Path, items: Sequence[Item], groups: Mapping[str, np.ndarray], jobs: int) -> None:
    """Writes shards into `directory` in `jobs` processes; those that are finished already are kept.

    `groups` are the indices of the items of each shard, by the shard's name, in the order of writing.

    Raises ValueError when a source file cannot be read, a shard cannot be written, or a process dies.
    """
    (directory / WRITTEN).mkdir(exist_ok=True)
    names = [name for name in groups if not _is_written(directory, name)]

    def write(name: str, chosen: Iterable[int]) -> None:
        _write_shard(directory, name, (items[index] for index in chosen))

    tasks = [(name, groups[name]) for name in names]
    written = _in_processes(write, tasks, min(jobs, len(tasks))) if jobs > 1 else _in_turn(write, tasks)
    for _ in track(written, "packing", total=len(tasks), console=Console(stderr=True)):
        pass


def read_note(directory: Path, name: str) -> tuple[Shard, list[int]]:
    """A finished shard, and the offset in bytes of each of its samples."""
    note = json.loads((directory / WRITTEN / f"{name}.json").read_bytes())
    return Shard(name, note["bytes"], note["sha256"], len(note["offsets"])), note["offsets"]


def _is_written(directory: Path, name: str) -> bool:
    # After a power failure the note may have reached the disk, and the renaming of the shard not.
    shard = directory / name
    return (
        (directory / WRITTEN / f"{name}.json").exists()
        and shard.exists()
        and shard.stat().st_size == read_note(directory, name)[0].bytes
    )


class _Hashing:
    """A file that is only written to, and hashed on the way."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.sha256 = hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.sha256.update(content)
        return self.file.write(content)


def _write_shard(directory: Path, name: str, items: Iterable[Item]) -> None:
    partial = directory / f".{name}.partial"
    offsets: list[int] = []
    try:
        with partial.open("wb") as file:
            hashing = _Hashing(file)
            # PAX is plain ustar until a name is longer than 100 characters. Fixed times and owners: equal bytes.
            with TarWriter(hashing, encoder=False, mtime=0, format="PAX_FORMAT") as writer:
                for item in items:
                    offsets.append(writer.tarstream.offset)
                    writer.write({"__key__": item.key, **_contents(item)})
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        partial.replace(directory / name)
        partial = directory / WRITTEN / f"{name}.partial"
        with partial.open("w") as note:
            json.dump({"bytes": size, "sha256": hashing.sha256.hexdigest(), "offsets": offsets}, note)
            note.flush()
            os.fsync(note.fileno())
        partial.replace(directory / WRITTEN / f"{name}.json")
    except OSError as error:
        raise ValueError(f"cannot write {directory / name} ({error.strerror})") from error
    finally:
        partial.unlink(missing_ok=True)


def _contents(item: Item) -> dict[str, bytes]:
    contents = {}
    for extension, content in item.members.items():
        if split_member(f"{item.key}.{extension}") != (item.key, extension):
            raise ValueError(f"{item.key!r} with {extension!r} is no name for a sample of webdataset; rename the file")
        try:
            contents[extension] = content if isinstance(content, bytes) else content.read_bytes()
        except OSError as error:
            raise ValueError(f"cannot read {content!s} ({error.strerror}); repair it, or remove it") from error
    return contents


def _in_turn(write: Write, tasks: Sequence[Task]) -> Iterator[None]:
    for name, chosen in tasks:
        write(name, chosen)
        yield


def _in_processes(write: Write, tasks: Sequence[Task], jobs: int) -> Iterator[None]:
    """Starts the processes at once, then yields whenever a shard is finished."""
    # Forked processes share the list of samples, and keep the lock of the packing until the last of them has ended.
    context = multiprocessing.get_context("fork")
    processes = {}
    for number in range(jobs):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(write, tasks[number::jobs], sender, os.getpid()), daemon=True)
        process.start()
        sender.close()
        processes[receiver] = process
    return _follow(processes)


def _follow(processes: Mapping[Connection, BaseProcess]) -> Iterator[None]:
    running = dict(processes)
    try:
        while running:
            for receiver in wait(list(running)):
                assert isinstance(receiver, Connection)
                try:
                    message = receiver.recv()
                except EOFError:
                    process = running.pop(receiver)
                    process.join()
                    if process.exitcode:
                        raise ValueError(
                            f"a packing process ended with exit code {process.exitcode} (-9: killed, maybe for want of "
                            "memory; then use fewer --jobs)"
                        ) from None
                    continue
                if message is not None:
                    raise message
                yield
    finally:
        for process in processes.values():
            process.terminate()
            process.join()


def _work(write: Write, tasks: Sequence[Task], sender: Connection, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which then ends its processes
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        for name, chosen in tasks:
            write(name, _while_parent_lives(chosen, parent))
            sender.send(None)
    except ValueError as error:
        sender.send(error)


def _while_parent_lives(chosen: Iterable[int], parent: int) -> Iterator[int]:
    """The same numbers; ends the process once it is orphaned, because nobody would wait for what it writes."""
    for index in chosen:
        if os.getppid() != parent:
            os._exit(1)
        yield index
