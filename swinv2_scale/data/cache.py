"""Whole shards on a disk of this host, so that a network carries each of them once."""

import fcntl
import hashlib
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

_ENTRY = re.compile(r"[0-9a-f]{64}([.]partial)?")
_SEALED = 10**18  # nanoseconds, modification time of complete entries


class DamagedError(ValueError):
    """A shard arrived with other contents than its manifest says."""


class Cache:
    """Whole shards in a directory, shared by the processes of a host; at most `limit` bytes, oldest reads go first.

        ENTRY           a complete shard: written under the other name, flushed, sealed, renamed
        ENTRY.partial   one that its writer fills and holds locked; all of its room is taken at once
        .lock           held while room is made

    ENTRY is 64 hexadecimal digits; files of other names are not touched. Its modification time is a fixed one, its
    seal: whatever is written into it later breaks that, and it is served no more. Its access time says when it was last
    read. Locks end with their process, so what a killed one left is removed by the next that needs room.

    Raises ValueError when the directory cannot be written.
    """

    def __init__(self, directory: Path, limit: int) -> None:
        self.directory, self.limit = directory, limit
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / ".lock").touch()
        except OSError as error:
            raise ValueError(f"data.cache={directory} cannot be written ({error}); choose another directory") from error

    def read(self, entry: str, start: int, end: int, size: int) -> bytes | None:
        """Bytes [start, end) of an entry of `size` bytes; None when it is not there, or not as it was written."""
        # Opened for each read: what stays open would go on taking room after its removal.
        try:
            file = os.open(self.directory / entry, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            status = os.fstat(file)
            if (status.st_size, status.st_mtime_ns) != (size, _SEALED):
                return None
            os.utime(file, ns=(time.time_ns(), _SEALED))
            return os.pread(file, end - start, start)
        finally:
            os.close(file)

    def fill(self, entry: str, size: int, blocks: Iterable[bytes], sha256: str) -> bool:
        """Writes an entry of `size` bytes, unless another process did meanwhile; False when there is no room for it.

        Raises DamagedError for contents of another hash than `sha256` ("": not known), and what `blocks` raises.
        """
        partial = self.directory / f"{entry}.partial"
        with _claimed(partial) as file:
            complete = self.read(entry, 0, 0, size) is not None
            if complete or not self._make_room(file, size):
                return complete
            digest = hashlib.sha256()
            for block in blocks:
                digest.update(block)
                os.write(file, block)
            if sha256 not in ("", digest.hexdigest()):
                raise DamagedError(f"its contents have the sha256 {digest.hexdigest()}, the manifest says {sha256}")
            os.fsync(file)
            os.utime(file, ns=(time.time_ns(), _SEALED))
            partial.rename(self.directory / entry)
            return True

    def _make_room(self, file: int, size: int) -> bool:
        """Gives `file` its `size` bytes on the disk, after removing entries; False when that is not enough."""
        with (self.directory / ".lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            used, entries = 0, []
            for path in self.directory.iterdir():
                if _ENTRY.fullmatch(path.name) and not (path.suffix and _abandoned(path)):
                    with suppress(FileNotFoundError):  # another writer gave up
                        status = path.stat()
                        used += status.st_size
                        entries += [] if path.suffix else [(status.st_atime_ns, status.st_size, path)]
            for _, freed, path in sorted(entries):
                if used + size <= self.limit:
                    break
                path.unlink()
                used -= freed
            try:
                if used + size <= self.limit:
                    os.posix_fallocate(file, 0, size)
                    return True
                missing = f"its limit is {self.limit / 1e9} GB (data.cache_gigabytes)"
            except OSError as error:
                missing = str(error)
        _warn(f"no room in the cache {self.directory} for a shard of {size / 1e9} GB, {missing}: read without it")
        return False


@contextmanager
def _claimed(path: Path) -> Iterator[int]:
    """The file of that name, created and locked, once no other process has it; removed unless it was renamed."""
    while True:
        file = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if _is_still(path, file):
                try:
                    yield file
                finally:
                    if _is_still(path, file):
                        path.unlink()
                return
        finally:
            os.close(file)


def _is_still(path: Path, file: int) -> bool:
    """Whether an open file still has this name: its last holder may have renamed or removed it."""
    try:
        return path.stat().st_ino == os.fstat(file).st_ino
    except FileNotFoundError:
        return False


def _abandoned(partial: Path) -> bool:
    """Removes a partial entry whose writer is gone, and says so."""
    with suppress(FileNotFoundError), partial.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if _is_still(partial, file.fileno()):
            partial.unlink()
    return True


@cache
def _warn(text: str) -> None:
    """Logs a warning, once in a process."""
    log.warning(text)
