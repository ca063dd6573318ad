"""Where the optimizer's buffers lie: in memory, or in files that are mapped into memory.

A file-mapped buffer is an ordinary tensor. Reading it brings its pages into memory, and `release` writes them
back and frees them, so that of a model's state only what is at work at the moment is resident. `fetch`
asks the system to read ahead meanwhile.
"""

import math
import mmap
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor


class Storage(Protocol):
    """Makes buffers, and is told which are needed soon and which are not needed for a while."""

    window: int
    """Elements of matrices that may be updated together, of several units."""

    def zeros(self, name: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer of zeros, (numel,); names are unique."""

    def fetch(self, buffers: Iterable[Tensor]) -> None:
        """These will be used soon."""

    def release(self, buffers: Iterable[Tensor]) -> None:
        """These will not be used for a while; what they hold is kept."""


class MemoryStorage:
    """Buffers in memory: of the parameters' device, or, with `host`, of the CPU, pinned beside a GPU."""

    window = 2**22

    def __init__(self, host: bool = False) -> None:
        self.host = host

    def zeros(self, name: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self.host and device.type == "cuda":
            return torch.zeros(numel, dtype=dtype, pin_memory=True)
        return torch.zeros(numel, dtype=dtype, device=device)

    def fetch(self, buffers: Iterable[Tensor]) -> None:
        """Nothing: they are there."""

    def release(self, buffers: Iterable[Tensor]) -> None:
        """Nothing: they stay."""


class DiskStorage:
    """Buffers in files of a folder, mapped into memory; the files vanish when the process ends.

    Args:
        folder: on a disk with room for the rank's share of the state; made where it is missing.

    Raises:
        ValueError: the folder cannot be written, or a buffer does not fit on the disk.
    """

    window = 0  # one unit after another

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._maps: dict[int, mmap.mmap] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise ValueError(
                f"optim.offload_dir {self.folder} cannot be written ({error}); name a folder on a disk with "
                "room for the optimizer's state"
            ) from None

    def zeros(self, name: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """See `Storage`; always on the CPU."""
        size = max(1, numel) * dtype.itemsize
        with tempfile.TemporaryFile(dir=self.folder) as file:  # without a name: gone with the process
            try:
                os.posix_fallocate(file.fileno(), 0, size)  # now, not when a page is written and none is left
            except OSError as error:
                raise ValueError(
                    f"optim.offload_dir {self.folder}: no room for {name}, {size:,} bytes ({error}); free "
                    "some, or name a folder on another disk"
                ) from None
            mapping = mmap.mmap(file.fileno(), size)
        buffer = torch.frombuffer(mapping, dtype=dtype, count=numel) if numel else torch.zeros(0, dtype=dtype)
        self._maps[buffer.data_ptr()] = mapping
        return buffer

    def fetch(self, buffers: Iterable[Tensor]) -> None:
        """See `Storage`: the system reads ahead."""
        for mapping in self._mappings(buffers):
            mapping.madvise(mmap.MADV_WILLNEED)

    def release(self, buffers: Iterable[Tensor]) -> None:
        """See `Storage`: the pages leave the process; the system writes them to the disk in its own time."""
        for mapping in self._mappings(buffers):
            mapping.madvise(mmap.MADV_DONTNEED)

    def _mappings(self, buffers: Iterable[Tensor]) -> list[mmap.mmap]:
        return [self._maps[b.data_ptr()] for b in buffers if b.data_ptr() in self._maps]


def num_bytes(buffers: Iterable[Tensor]) -> int:
    """Bytes of all of these."""
    return sum(math.prod(b.shape) * b.element_size() for b in buffers)
