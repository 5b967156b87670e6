"""Tensors in a file: memory for what a machine's memory does not hold."""

import mmap
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor


class MappedFile:
    """float32 tensors that lie in a file of `folder`, which has no name and is gone when the process ends.

    Their pages are read when they are touched, and written back by the operating system, whatever becomes of them in
    memory; `release` gives the memory back. Raises ValueError where the disk has no room or cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # lives as long as the tensors
        except OSError as error:
            raise ValueError(f"parallel.offload_path={folder} cannot be written: {error}") from error
        self._folder, self._bytes, self._maps = folder, 0, list[mmap.mmap]()

    def take(self, elements: int) -> Tensor:
        """A tensor of zeros, (elements,). The disk's room for it is claimed now, not when it is written."""
        size = -(-4 * elements // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        try:
            os.posix_fallocate(self._file.fileno(), self._bytes, size)
        except OSError as error:
            raise ValueError(
                f"parallel.offload_path={self._folder} has no room: {error} after {self._bytes / 1e9:.1f} GB; AdamW "
                "takes 12 bytes a parameter, divided by the number of ranks"
            ) from error
        self._maps.append(mmap.mmap(self._file.fileno(), size, offset=self._bytes))
        self._bytes += size
        return torch.frombuffer(self._maps[-1], dtype=torch.float32, count=elements)

    def release(self) -> None:
        """Give back the memory of all pages; what was written stays in the file."""
        for part in self._maps:
            part.madvise(mmap.MADV_DONTNEED)
