"""The packed store: one directory of flat memory-mapped arrays, structures one after the other (CSR).

No edges are stored: a neighbour list is found in a fraction of a millisecond, stored edges would take many
times the room of the atoms, and they would freeze the cutoff. Labels that are missing are NaN on disk and
None in Python.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megagnn.data import keys
from megagnn.data.split import SPLITS
from megagnn.data.store_format import (
    ALL_ARRAYS,
    ARRAYS,
    GROUPS_FILE,
    LABEL_ENERGY,
    LABEL_FORCES,
    LABEL_STRESS,
    OPTIONAL_ARRAYS,
    StoreHeader,
    sha256_of,
)
from megagnn.data.store_writer import SplitRule, write_store

__all__ = ["SplitRule", "Store", "StoreHeader", "write_store"]


class Store:
    """A packed store opened for reading; arrays stay on disk until touched.

    Attributes:
        path: its directory.
        header: its StoreHeader.
        num_atoms: (S,) int64; source, level, group: (S,) integers, see StoreHeader; split: (S,) index into
            SPLITS.
    """

    def __init__(self, path: Path, header: StoreHeader, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.path = path
        self.header = header
        self.arrays = dict(arrays)
        self.num_atoms: NDArray[np.int64] = np.diff(self.arrays["offsets"])
        self.source, self.level = self.arrays["source"], self.arrays["level"]
        self.group, self.split = self.arrays["group"], self.arrays["split"]

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """Open a store and check that every array is there in full (not its checksum: see `verify`).

        Raises:
            ValueError: not a directory, not a store, another version, or a missing, truncated or foreign
            array.
        """
        directory = Path(path)
        header = StoreHeader.read(directory)
        arrays = {name: _map_array(directory, name, header) for name in _names(header)}
        offsets = arrays["offsets"]
        if offsets[0] != 0 or offsets[-1] != header.num_atoms or (np.diff(offsets) < 1).any():
            raise ValueError(
                f"{directory / 'offsets.npy'} is damaged: offsets do not add up to {header.num_atoms} atoms"
            )
        return cls(directory, header, arrays)

    def __reduce__(self) -> tuple[Any, ...]:
        # Workers of a data loader map the files again instead of receiving a copy of the data.
        return Store.open, (self.path,)

    def __len__(self) -> int:
        return self.header.num_structures

    def indices(self, split: str) -> NDArray[np.int64]:
        """Structures of a split, ascending.

        Raises:
            ValueError: an unknown name.
        """
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; known are {', '.join(SPLITS)}")
        return np.flatnonzero(self.split == SPLITS.index(split))

    def structure(self, index: int) -> dict[str, Any]:
        """One structure as read-only views, with the keys of keys.py.

        Returns:
            atomic_numbers (N,), positions (N, 3), cell (3, 3), pbc (3,), fixed (N,), source, level,
            structure, those of energy, forces (N, 3), stress (3, 3) that are labelled, and weights (3,) where
            the store has some.
        """
        arrays = self.arrays
        if not 0 <= index < len(self):
            raise IndexError(f"structure {index} of a store of {len(self)}")
        atoms = slice(arrays["offsets"][index], arrays["offsets"][index + 1])
        labels = int(arrays["labels"][index])
        record = {
            keys.ATOMIC_NUMBERS: arrays["atomic_numbers"][atoms],
            keys.POSITIONS: arrays["positions"][atoms],
            keys.CELL: arrays["cell"][index],
            keys.PBC: arrays["pbc"][index].view(np.bool_),
            keys.FIXED: arrays["fixed"][atoms].view(np.bool_),
            keys.SOURCE: int(arrays["source"][index]),
            keys.LEVEL: int(arrays["level"][index]),
            keys.STRUCTURE: index,
        }
        if labels & LABEL_ENERGY:
            record[keys.ENERGY] = float(arrays["energy"][index])
        if labels & LABEL_FORCES:
            record[keys.FORCES] = arrays["forces"][atoms]
        if labels & LABEL_STRESS:
            record[keys.STRESS] = arrays["stress"][index]
        if "weights" in arrays:
            record[keys.WEIGHTS] = arrays["weights"][index]
        return record

    def config_types(self) -> NDArray[np.str_]:
        """(S,) kind of each structure, as its file says; empty where it says none."""
        return self._named("config_type", self.header.config_types)

    def files(self) -> NDArray[np.str_]:
        """(S,) name of the file each structure was read from; empty where all are of one."""
        return self._named("file", self.header.files)

    def _named(self, array: str, names: tuple[str, ...]) -> NDArray[np.str_]:
        if array not in self.arrays:
            return np.full(len(self), "")
        return np.array(names)[self.arrays[array]]

    def group_names(self) -> list[str] | None:
        """Names of the groups, indexed by `group`; None for a store made before names were stored.

        Raises:
            ValueError: a missing or damaged file of names.
        """
        if GROUPS_FILE not in self.header.sha256:
            return None
        file = self.path / GROUPS_FILE
        try:
            names = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{file} is missing or damaged ({error}); prepare or unpack the store again"
            ) from error
        if not isinstance(names, list) or len(names) <= self.group.max():
            raise ValueError(f"{file} does not name every group of the store; prepare or unpack it again")
        return names

    def verify(self) -> None:
        """Compare every array, and the names of groups, with their checksums.

        Raises:
            ValueError: naming the first file that differs.
        """
        if GROUPS_FILE in self.header.sha256:
            self.group_names()
        for name in (
            *(f"{name}.npy" for name in _names(self.header)),
            *([GROUPS_FILE] * (GROUPS_FILE in self.header.sha256)),
        ):
            file = self.path / name
            if sha256_of(file) != self.header.sha256.get(file.name):
                raise ValueError(
                    f"{file} does not match its checksum: the store is damaged; prepare or unpack it again"
                )


def _names(header: StoreHeader) -> list[str]:
    """Arrays that the store of a header has."""
    return [*ARRAYS, *(name for name in OPTIONAL_ARRAYS if f"{name}.npy" in header.sha256)]


def _map_array(directory: Path, name: str, header: StoreHeader) -> NDArray[Any]:
    file = directory / f"{name}.npy"
    if not file.is_file():
        raise ValueError(
            f"{directory} lacks {file.name}: the store is incomplete; prepare or unpack it again"
        )
    shape, dtype = header.array_shape(name), np.dtype(ALL_ARRAYS[name][0])
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(
            f"{file} is truncated or damaged ({error}); prepare or unpack the store again"
        ) from error
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(
            f"{file} holds {array.dtype} {array.shape}, the header asks for {dtype} {shape}; prepare the "
            "data again"
        )
    return np.asarray(array)  # a plain view: indexing np.memmap costs a microsecond more each time
