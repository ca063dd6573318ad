"""Neighbour lists of a store within a cutoff, kept in files beside it and filled as they are found.

A list takes 7 bytes an edge, 11 where a structure has more than 65,536 atoms. The files are mapped into
memory, so that all processes of a machine share what the system's page cache holds of them. Each list carries
a checksum: one that a crash of the machine left half written is found again.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megagnn.data.arrays import Ints
from megagnn.data.store import Store

_ENTRY = np.dtype([("begin", "<i8"), ("count", "<i4"), ("check", "<u4")])
_NO_ROOM = -1
_SHIFT_BYTES, _LARGEST_SHIFT = 3, 127


class EdgeCache:
    """Lists of one store, cutoff and kind; see the module.

    Args:
        index, data: its two files.
        end_type: of an edge's ends, "<u2" or "<u4".
    """

    def __init__(self, index: Path, data: Path, end_type: str) -> None:
        self._files = (index, data, end_type)
        self._end = np.dtype(end_type)
        # another user's, or of a file system that is only read, serve as they are
        self._fills = os.access(index, os.W_OK) and os.access(data, os.W_OK)
        mode: Literal["r", "r+"] = "r+" if self._fills else "r"
        # plain views: indexing np.memmap costs a microsecond more each time
        self._index: NDArray[Any] = np.asarray(np.load(index, mmap_mode=mode, allow_pickle=False))
        self._data: NDArray[Any] = np.asarray(np.load(data, mmap_mode=mode, allow_pickle=False))
        if self._index.dtype != _ENTRY or self._data.dtype != np.uint8:
            raise ValueError(f"{index} is no index of neighbour lists; remove it and {data.name}")

    def __reduce__(self) -> tuple[Any, ...]:
        return EdgeCache, self._files

    @classmethod
    def open(
        cls, store: Store, cutoff: float, self_edges: bool, num_edges: Ints, max_bytes: int, make: bool
    ) -> EdgeCache | None:
        """The lists of a store; None where they are not there and cannot be made, or are not to be.

        Args:
            num_edges: (S,) of each structure, self edges included.
            max_bytes: room for lists, of the first structures of the store.
            make: make the files where they are missing or have other room: on one rank, before the others.
        """
        end_type = "<u2" if int(store.num_atoms.max(initial=0)) <= 2**16 else "<u4"
        digest = hashlib.sha256(json.dumps(sorted(store.header.sha256.items())).encode()).hexdigest()[:12]
        name = f"edges-{cutoff!r}-{'self-' if self_edges else ''}{digest}"
        index, data = store.path / f"{name}.index.npy", store.path / f"{name}.npy"
        sizes = -(-num_edges * (2 * np.dtype(end_type).itemsize + _SHIFT_BYTES) // 4) * 4
        ends = np.cumsum(sizes)
        room = int(ends[np.searchsorted(ends, max_bytes, side="right") - 1]) if max_bytes >= ends[0] else 0
        try:
            if make and (not index.is_file() or not data.is_file() or _length(data) != room):
                entries = np.zeros(len(store), dtype=_ENTRY)
                entries["begin"] = np.where(ends <= max_bytes, ends - sizes, _NO_ROOM)
                entries["count"] = num_edges
                _make(index, data, entries, room)
            return cls(index, data, end_type)
        except OSError:
            return None

    def get(self, row: int) -> tuple[Ints, Ints] | None:
        """Both ends (2, E) and shifts (E, 3) of a structure, or None where they are not there."""
        begin, count, check = self._index[row].item()
        if not check:
            return None
        kept = self._data[begin : begin + self._num_bytes(count)]
        if _check(kept) != check:
            return None
        middle = 2 * count * self._end.itemsize
        ends = kept[:middle].view(self._end).reshape(2, count).astype(np.int64)
        return ends, kept[middle:].view(np.int8).reshape(count, 3).astype(np.int64)

    def put(self, row: int, edge_index: Ints, shifts: Ints) -> None:
        """Keep a list, if there is room and its shifts fit a byte."""
        begin, count, _ = self._index[row].item()
        fits = self._fills and begin != _NO_ROOM and edge_index.shape[1] == count
        if not fits or np.abs(shifts).max(initial=0) > _LARGEST_SHIFT:
            return
        parts = (edge_index.astype(self._end), shifts.astype(np.int8))
        kept = np.concatenate([part.reshape(-1).view(np.uint8) for part in parts])
        self._data[begin : begin + len(kept)] = kept  # before the checksum that makes it count
        self._index["check"][row] = _check(kept)

    def _num_bytes(self, count: int) -> int:
        return count * (2 * self._end.itemsize + _SHIFT_BYTES)


def _check(kept: NDArray[np.uint8]) -> int:
    return zlib.crc32(kept.data) or 1  # 0 stands for none


def _length(data: Path) -> int:
    return len(np.load(data, mmap_mode="r", allow_pickle=False))


def _take_room(descriptor: int, num_bytes: int) -> None:
    """Raises OSError where the disk has no room."""
    if hasattr(os, "posix_fallocate"):  # not on macOS
        os.posix_fallocate(descriptor, 0, num_bytes)


def _make(index: Path, data: Path, entries: NDArray[Any], room: int) -> None:
    """Both files under other names, then renamed: who has the old ones open keeps them."""
    made = []
    for file in (data, index):
        handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        os.close(handle)
        made.append(Path(name))
    try:
        np.lib.format.open_memmap(made[0], "w+", np.uint8, (room,)).flush()
        if room:  # taken now: a write to mapped memory for which the disk has none would kill the process
            with made[0].open("rb+") as opened:
                _take_room(opened.fileno(), made[0].stat().st_size)
        with made[1].open("wb") as opened:
            np.save(opened, entries)
        for temporary, final in zip(made, (data, index), strict=True):
            temporary.chmod(0o644)
            index.unlink(missing_ok=True)  # an index of other data would be wrong in between
            temporary.replace(final)
    except OSError:
        for temporary in made:
            temporary.unlink(missing_ok=True)
        raise
