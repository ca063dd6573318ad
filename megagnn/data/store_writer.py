"""Writing a packed store: streamed to disk, and either there in full or not there at all."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megagnn.data import keys
from megagnn.data.arrays import Bools, Floats
from megagnn.data.record import Structure, check_structure
from megagnn.data.split import SPLITS
from megagnn.data.store_format import (
    ALL_ARRAYS,
    GROUPS_FILE,
    HEADER_FILE,
    OPTIONAL_ARRAYS,
    StoreHeader,
    sha256_of,
)

LARGEST_LOSS = 1e-5
"""Å; molecules and slabs are moved to the origin where their coordinates would lose more."""

NAMED = {
    "source": "sources",
    "level": "levels of theory",
    "config_type": "kinds (config_type)",
    "file": "files",
}
"""Array that stores the numbers of names -> what is named, in words."""

SplitRule = Callable[[Sequence[str], Sequence[str]], NDArray[np.uint8]]
"""(groups, sources), one name for each structure -> (S,) uint8 index into SPLITS."""


def write_store(
    path: str | Path,
    structures: Iterable[Structure],
    *,
    splits: SplitRule | NDArray[np.integer],
    provenance: Mapping[str, Mapping[str, Any]] | None = None,
    split_description: Mapping[str, Any] | None = None,
    warnings: Sequence[str] = (),
    references: Mapping[str, Mapping[str, float]] | None = None,
    isolated_distance: float | None = None,
    overwrite: bool = False,
) -> StoreHeader:
    """Write structures into a new store. On any error nothing remains.

    Args:
        path: directory to be made.
        structures: read once, in order; memory does not grow with their atoms.
        splits: (S,) index into SPLITS for each structure, or a function of all groups and sources, such as
            `split_groups`, called when all structures are read.
        provenance: for each source, free form, JSON values only. A generator may fill it while it is read.
        split_description: how the split was made, free form.
        warnings: what looks wrong, in words; read last, so that the generator and `splits` may add to it.
        references: reference energies that were given, eV, by source and chemical symbol.
        isolated_distance: Å, from which single atoms are isolated, where it was given.
        overwrite: replace a store that is there already (never anything else).

    Returns:
        The header as written.

    Raises:
        ValueError: path exists, no structure, a structure no store can hold, splits of the wrong length or
            value, or one group on two sides of the split.
    """
    with new_store(Path(path), overwrite) as work:
        with _Writer(work) as writer:
            for index, structure in enumerate(structures):
                check_structure(structure, where=f"structure {index}")
                writer.add(structure)
            header = writer.finish(splits, dict(split_description or {}), provenance or {}, warnings)
            header = replace(header, isolated_distance=isolated_distance)
            header.references.update({source: dict(row) for source, row in (references or {}).items()})
        (work / HEADER_FILE).write_text(header.to_json(), encoding="utf-8")
    return header


@contextmanager
def new_store(target: Path, overwrite: bool) -> Iterator[Path]:
    """A directory to be filled, which takes its place as `target` in the end; on any error nothing remains.

    Raises:
        ValueError: `target` exists, unless it is a store or an empty directory that may be overwritten.
    """
    _check_target(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield work
        work.chmod(0o755)
        _move_into_place(work, target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not overwrite:
        raise ValueError(
            f"{target} exists already; remove it, choose another place, or overwrite it (--overwrite)"
        )
    if any(target.iterdir() if target.is_dir() else [target]):
        StoreHeader.read(target)  # refuses to replace anything that is not a store


def _move_into_place(work: Path, target: Path) -> None:
    """Rename a finished directory to its place; a store that is there already goes only after that worked."""
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        target.rename(old / "store")
        try:
            work.rename(target)
        except OSError:
            (old / "store").rename(target)
            raise
        finally:
            shutil.rmtree(old, ignore_errors=True)
    else:
        work.rename(target)


class _Writer:
    """Appends structures to one file per array; shapes are filled in at the end."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files: dict[str, BinaryIO] = {}
        self.names: dict[str, dict[str, int]] = {array: {} for array in NAMED}
        self.needed: set[str] = set()
        self.group_ids: dict[str, int] = {}
        self.groups: list[str] = []
        self.group_sources: list[str] = []
        self.num_atoms = 0

    def __enter__(self) -> _Writer:
        for name in ALL_ARRAYS:
            self.files[name] = (self.directory / f"{name}.npy").open("w+b")
            _write_npy_header(self.files[name], name, (0, *ALL_ARRAYS[name][1]))
        self._append("offsets", 0)
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.files.values():
            file.close()

    def add(self, s: Structure) -> None:
        labels, positions = s.labels, storable_positions(s.positions, s.cell, s.pbc)
        if s.charge and keys.DIPOLE in labels:  # of a charged molecule it is about the origin, which may move
            labels[keys.DIPOLE] = labels[keys.DIPOLE] + s.charge * (positions - s.positions).mean(axis=0)
        self.num_atoms += s.num_atoms
        row: dict[str, Any] = {
            "offsets": self.num_atoms,
            "atomic_numbers": s.atomic_numbers,
            "positions": positions,
            "fixed": np.zeros(s.num_atoms) if s.fixed is None else s.fixed,
            "cell": s.cell,
            "pbc": s.pbc,
            "group": self.group_ids.setdefault(s.group, len(self.group_ids)),
            "weights": s.weights,
            "charge": s.charge,
            "multiplicity": s.multiplicity,
            **{array: self._index(array, getattr(s, array)) for array in NAMED},
            "labels": sum(keys.LABELS[name].bit for name in labels),
        }
        for name, label in keys.LABELS.items():
            shape = (s.num_atoms, *label.shape) if label.per_atom else label.shape
            row[name] = labels[name] if name in labels else np.full(shape, np.nan)
        for name, value in row.items():
            self._append(name, value)
        told = {"weights": s.weights != (1.0, 1.0, 1.0), "charge": s.charge, "multiplicity": s.multiplicity}
        self.needed.update(s.others, (name for name, value in told.items() if value))
        self.groups.append(s.group)
        self.group_sources.append(s.source)

    def finish(
        self,
        splits: SplitRule | NDArray[np.integer],
        description: dict[str, Any],
        provenance: Mapping[str, Mapping[str, Any]],
        warnings: Sequence[str],
    ) -> StoreHeader:
        if not self.groups:
            raise ValueError("no structure to write: the input is empty or every structure was left out")
        chosen = splits(self.groups, self.group_sources) if callable(splits) else splits
        self._append("split", self._check_splits(np.asarray(chosen)))
        needed = {
            **{name: name in self.needed for name in OPTIONAL_ARRAYS},
            "config_type": set(self.names["config_type"]) != {""},
            "file": len(self.names["file"]) > 1,
        }
        header = StoreHeader(
            sources=tuple(self.names["source"]),
            levels=tuple(self.names["level"]),
            num_structures=len(self.groups),
            num_atoms=self.num_atoms,
            split=description,
            provenance={name: dict(record) for name, record in provenance.items()},
            config_types=tuple(self.names["config_type"]) if needed["config_type"] else (),
            files=tuple(self.names["file"]) if needed["file"] else (),
            warnings=tuple(warnings),
        )
        for name, file in self.files.items():
            if name in OPTIONAL_ARRAYS and not needed[name]:
                file.close()
                (self.directory / f"{name}.npy").unlink()
                continue
            file.seek(0)
            _write_npy_header(file, name, header.array_shape(name))
            file.close()
            header.sha256[f"{name}.npy"] = sha256_of(self.directory / f"{name}.npy")
        names = self.directory / GROUPS_FILE
        names.write_text(
            json.dumps(list(self.group_ids), ensure_ascii=False, indent=0) + "\n", encoding="utf-8"
        )
        header.sha256[GROUPS_FILE] = sha256_of(names)
        return header

    def _index(self, array: str, name: str) -> int:
        """The number under which an array stores a name."""
        table, largest = self.names[array], np.iinfo(ALL_ARRAYS[array][0]).max
        index = table.setdefault(name, len(table))
        if index > largest:
            raise ValueError(
                f"more than {largest} {NAMED[array]} in one store; is an identifier used as a name?"
            )
        return index

    def _append(self, name: str, value: Any) -> None:
        self.files[name].write(np.ascontiguousarray(value, dtype=ALL_ARRAYS[name][0]).tobytes())

    def _check_splits(self, splits: NDArray[np.integer]) -> NDArray[np.integer]:
        if splits.shape != (len(self.groups),):
            raise ValueError(
                f"splits must have shape ({len(self.groups)},), one for each structure, got {splits.shape}"
            )
        if len(splits) and not (splits.min() >= 0 and splits.max() < len(SPLITS)):
            raise ValueError(
                f"splits must be 0, 1 or 2 ({', '.join(SPLITS)}), got {splits.min()} to {splits.max()}"
            )
        group_of = np.array([self.group_ids[group] for group in self.groups])
        first = np.zeros(len(self.group_ids), dtype=np.int64)
        first[group_of[::-1]] = splits[::-1]
        leaking = np.flatnonzero(first[group_of] != splits)
        if len(leaking):
            k = int(leaking[0])
            raise ValueError(
                f"group {self.groups[k]!r}, met in source {self.group_sources[k]!r}, lies on two sides of "
                "the split; keep groups whole (split_groups, --seed), or name the groups apart if they are "
                "unrelated"
            )
        return splits


def _write_npy_header(file: BinaryIO, name: str, shape: tuple[int, ...]) -> None:
    """A .npy header of fixed length (128 bytes), so that it can be written again when the length is known."""
    text = f"{{'descr': '{ALL_ARRAYS[name][0]}', 'fortran_order': False, 'shape': {shape!r}, }}"
    magic = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little")
    file.write(magic + text.ljust(117).encode("ascii") + b"\n")


def storable_positions(positions: Floats, cell: Floats, pbc: Bools) -> Floats:
    """Positions (N, 3) in Å that are as good in float32, and the same where they were so already.

    Float32 at 30,000 Å knows steps of 2e-3 Å, which is more than what a distance may be off. So along
    periodic lattice vectors, atoms further than one cell outside the cell are wrapped into it. If coordinates
    are still large and not everything is periodic, all atoms are moved so that their centre is the origin.
    Neither changes a distance between atoms or images.
    """
    positions = np.asarray(positions, dtype=np.float64)
    periodic = np.asarray(pbc, dtype=bool)
    if periodic.any():
        positions = _wrapped(positions, np.asarray(cell, dtype=np.float64), periodic)
    loss = np.abs(positions).max(initial=0.0) * 2.0**-24
    if loss > LARGEST_LOSS and not periodic.all():
        positions = positions - positions.mean(axis=0)
    return positions


def _wrapped(positions: Floats, cell: Floats, periodic: Bools) -> Floats:
    # Least squares: of a slab or a chain the other lattice vectors may be zero.
    fractions = positions @ np.linalg.pinv(np.where(periodic[:, None], cell, 0.0))
    far = ((fractions < -1) | (fractions >= 2)) & periodic
    if not far.any():
        return positions
    return positions - np.where(far, np.floor(fractions), 0.0) @ cell
