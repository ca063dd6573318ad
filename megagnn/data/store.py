"""The packed store: one directory of flat memory-mapped arrays, structures one after the other (CSR).

No edges are stored: a neighbour list is found in a fraction of a millisecond, stored edges would take many
times the room of the atoms, and they would freeze the cutoff. Labels that are missing are NaN on disk and
None in Python.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from megagnn.data import keys
from megagnn.data.arrays import Bools, Ints
from megagnn.data.neighbours import neighbour_list
from megagnn.data.record import ISOLATED_DISTANCE, ISOLATED_PREFIX, is_isolated
from megagnn.data.split import SPLITS, without_prefix
from megagnn.data.store_format import ALL_ARRAYS, ARRAYS, GROUPS_FILE, OPTIONAL_ARRAYS, StoreHeader, sha256_of
from megagnn.data.store_writer import SplitRule, write_store

__all__ = ["SplitRule", "Store", "StoreHeader", "write_store"]

# Counting the edges of more structures than this takes several seconds, and shows a progress bar.
SILENT_STRUCTURES = 20_000

# A copy of a store has these in common; a store of other labels for the same structures has not.
CONTENT = ("positions.npy", "energy.npy", "forces.npy")


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
        self.num_atoms: Ints = np.diff(self.arrays["offsets"])
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

    def indices(self, split: str) -> Ints:
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
            structure, the labels that it has, as energy, forces (N, 3), stress (3, 3), and weights (3,),
            charge and multiplicity where the store has some.
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
        for name, label in keys.LABELS.items():
            if labels & label.bit:
                value = arrays[name][atoms if label.per_atom else index]
                record[name] = value if value.ndim else float(value)
        if "weights" in arrays:
            record[keys.WEIGHTS] = arrays["weights"][index]
        if "charge" in arrays:
            record[keys.CHARGE] = float(arrays["charge"][index])
        if "multiplicity" in arrays:
            record[keys.MULTIPLICITY] = int(arrays["multiplicity"][index])
        return record

    def of_atoms(self, name: str, rows: NDArray[np.integer]) -> NDArray[Any]:
        """Entries of an array of atoms for all atoms of some structures (K,), one structure after another."""
        offsets, lengths = self.arrays["offsets"], self.num_atoms[rows]
        skipped = np.cumsum(lengths) - lengths
        return self.arrays[name][np.arange(lengths.sum()) + np.repeat(offsets[rows] - skipped, lengths)]

    def labelled(self, label: str, rows: Ints) -> Ints:
        """Those of some structures that have a label (`keys.LABELS`)."""
        return rows[(self.arrays["labels"][rows] & keys.LABELS[label].bit) > 0]

    def isolated_atoms(self, distance: float = ISOLATED_DISTANCE) -> Bools:
        """(S,) bool, which structures are isolated atoms; ions are none.

        distance: Å, from which they are isolated, unless the store was prepared with another.
        """
        distance = self.header.isolated_distance or distance
        found = self.num_atoms == 1
        if "charge" in self.arrays:
            found &= self.arrays["charge"] == 0
        kinds = self.config_types() if found.any() else np.empty(0)
        for index in np.flatnonzero(found):
            s = self.structure(int(index))
            kind = str(kinds[index])
            found[index] = is_isolated(1, s[keys.POSITIONS], s[keys.CELL], s[keys.PBC], kind, distance)
        return found

    def config_types(self) -> NDArray[np.str_]:
        """(S,) kind of each structure, as its file says; empty where it says none."""
        return self._named("config_type", self.header.config_types)

    def files(self) -> NDArray[np.str_]:
        """(S,) name of the file each structure was read from; empty where all are of one."""
        return self._named("file", self.header.files)

    def config_type_of(self, index: int) -> str:
        """`config_types` of one structure, without an array of all."""
        return self._name_of("config_type", self.header.config_types, index)

    def file_of(self, index: int) -> str:
        """`files` of one structure, without an array of all."""
        return self._name_of("file", self.header.files, index)

    def _name_of(self, array: str, names: tuple[str, ...], index: int) -> str:
        return names[int(self.arrays[array][index])] if array in self.arrays else ""

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
        files = [f"{name}.npy" for name in _names(self.header)]
        if self.group_names() is not None:
            files.append(GROUPS_FILE)
        for file in (self.path / name for name in files):
            if sha256_of(file) != self.header.sha256.get(file.name):
                raise ValueError(
                    f"{file} does not match its checksum: the store is damaged; prepare or unpack it again"
                )


def _names(header: StoreHeader) -> list[str]:
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


def cached_num_edges(store: Store, cutoff: float) -> Ints:
    """(S,) edges of every structure of a store, without self edges.

    Counted once and kept in the store's directory where that is writable. Ranks may do this at once: each
    writes a file of its own and renames it, and they all write the same numbers. Many structures show a
    progress bar.
    """
    cache = store.path / f"num_edges-{cutoff!r}.npy"
    try:
        counts = np.load(cache, allow_pickle=False)
        if counts.shape == (len(store),) and counts.dtype == np.int64:
            return np.asarray(counts)
    except (OSError, ValueError, EOFError):
        pass  # not there, or cut short by a full disk: count again
    counts = np.empty(len(store), dtype=np.int64)
    few = len(store) <= SILENT_STRUCTURES
    for i in tqdm(
        range(len(store)), desc=f"counting edges of {store.path.name}", unit=" structures", disable=few
    ):
        s = store.structure(i)
        counts[i] = neighbour_list(s[keys.POSITIONS], s[keys.CELL], s[keys.PBC], cutoff)[0].shape[1]
    _save_atomically(cache, counts)
    return counts


def _save_atomically(path: Path, array: NDArray[Any]) -> None:
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError:
        return  # a read-only store: counted again next time
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, array)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError:
        Path(name).unlink(missing_ok=True)


def check_together(stores: Sequence[Store]) -> None:
    """Refuse stores that would count structures twice or leak test structures into training.

    Raises:
        ValueError: one store given twice or a copy of it; or see `check_sides`.
    """
    if len(stores) < 2:
        return
    seen: dict[object, Store] = {}
    for store in stores:
        content = tuple(store.header.sha256.get(name) for name in CONTENT)
        for mark in (store.path.resolve(), content if all(content) else store.path.resolve()):
            other = seen.setdefault(mark, store)
            if other is not store:
                raise ValueError(
                    f"{other.path} and {store.path} are the same store; give it once, or its structures "
                    "count twice"
                )
    check_sides(stores)


def check_sides(stores: Sequence[Store]) -> None:
    """Refuse stores that have one group on different sides, such as training and test.

    Groups are compared where their names are stored. A group of a fixed test or validation file that its own
    store trains on, as its publisher chose, is left out of the comparison, and so are isolated atoms.

    Raises:
        ValueError: a group on different sides in two stores.
    """
    first: dict[str, tuple[int, Store]] = {}
    for store in stores:
        for group, side in group_sides(store).items():
            known, other = first.setdefault(group, (side, store))
            if known != side:
                raise ValueError(
                    f"group {group!r} is {SPLITS[known]} in {other.path} and {SPLITS[side]} in "
                    f"{store.path}; a group must lie on one side. Prepare them together: megagnn prepare "
                    f"{other.path} {store.path} --seed 0 --out DIR"
                )


def group_sides(store: Store) -> dict[str, int]:
    """Side of each group by name, as an index into SPLITS; empty where the store has no names."""
    names = store.group_names()
    if names is None:
        return {}
    groups, rows = np.unique(store.group, return_index=True)
    sides: dict[str, int] = {}
    fixed: dict[str, int] = {}
    for group, side in zip(groups.tolist(), store.split[rows].tolist(), strict=True):
        name = names[group]
        is_fixed, name = without_prefix(name) != name, without_prefix(name)
        if name.startswith(ISOLATED_PREFIX):
            continue  # references in one store, test cases in another
        if is_fixed:
            fixed[name] = max(side, fixed.get(name, side))
        else:
            sides[name] = side
    return {**fixed, **sides}
