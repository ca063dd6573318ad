"""Readers: from files of other programs to a stream of `Structure` records.

A reader yields one record for every frame it can read, in order, and does not judge it (see record.py); it
raises only where the file itself cannot be understood.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from megagnn.data.formats.adios import is_adios, look_into_adios, read_adios
from megagnn.data.formats.ase_files import read_ase
from megagnn.data.formats.cp2k import is_cp2k, read_cp2k
from megagnn.data.formats.deepmd import is_deepmd, look_into_deepmd, read_deepmd
from megagnn.data.formats.hdf5 import is_hdf5, look_into_hdf5, read_hdf5
from megagnn.data.formats.lmdb import is_lmdb, look_into_lmdb, read_lmdb
from megagnn.data.formats.mlearn import is_mlearn, read_mlearn
from megagnn.data.formats.npz import is_npz, look_into_npz, read_npz
from megagnn.data.formats.options import ReadOptions, UnreadableError
from megagnn.data.formats.packed import is_store, read_store
from megagnn.data.formats.pymatgen_json import is_pymatgen_json, read_pymatgen_json
from megagnn.data.formats.species import parse_species
from megagnn.data.formats.units import Units, parse_units
from megagnn.data.record import Structure

__all__ = [
    "FORMATS",
    "Format",
    "ReadOptions",
    "Units",
    "UnreadableError",
    "detect_format",
    "parse_species",
    "parse_units",
    "read_structures",
]


class Format(NamedTuple):
    """A format of files."""

    read: Callable[[Path, ReadOptions], Iterator[Structure]]
    """The reader."""
    recognises: Callable[[Path], bool]
    """Whether a file, which exists, is of this format, by its name and content."""
    look: Callable[[Path, ReadOptions], dict[str, Any]] = lambda *_: {}
    """What can be told of a file without reading it all: some of `layout`, `keys`, `units`, `num_structures`
    and `num_groups`."""


FORMATS = {
    "store": Format(read_store, is_store),
    "pymatgen": Format(read_pymatgen_json, is_pymatgen_json),
    "mlearn": Format(read_mlearn, is_mlearn),
    "hdf5": Format(read_hdf5, is_hdf5, look_into_hdf5),
    "lmdb": Format(read_lmdb, is_lmdb, look_into_lmdb),
    "npz": Format(read_npz, is_npz, look_into_npz),
    "cp2k": Format(read_cp2k, is_cp2k),
    "deepmd": Format(read_deepmd, is_deepmd, look_into_deepmd),
    "adios": Format(read_adios, is_adios, look_into_adios),
    "ase": Format(read_ase, lambda _: True),
}
"""Formats by name; a file is of the first that recognises it, and "ase" is what is left."""


def detect_format(path: Path) -> str:
    """Name of the format of a file: by content where its name does not say.

    Raises:
        ValueError: no such file.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist; check the name")
    return next(name for name, format in FORMATS.items() if format.recognises(path))


def read_structures(
    path: str | Path, options: ReadOptions | None = None, format: str | None = None
) -> Iterator[Structure]:
    """Stream the structures of a file.

    Args:
        path: any file ASE reads (compressed by gzip, bzip2 or xz too), JSON of pymatgen structures with
            labels (lists, mlearn, MatPES, MPtrj, Alexandria), HDF5, LMDB and arrays of published sets, a
            store or its archive.
        options: names, keys of labels, units, grouping; see `ReadOptions`. Grouped by file, the file is read
            twice: its group is named by all its structures.
        format: one of FORMATS, or None to detect it.

    Raises:
        ValueError: no such file or format, or a file that cannot be read (naming the frame).
    """
    path, options = Path(path), options or ReadOptions()
    name = format
    if name is None:
        name = "ase" if options.ase_format and path.exists() and not is_store(path) else detect_format(path)
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}; known are {', '.join(sorted(FORMATS))}")
    return _read(path, options, name)


def _read(path: Path, options: ReadOptions, name: str) -> Iterator[Structure]:
    if options.group_by == "file":
        options = replace(options, file_content=_file_content(path, options, name))
    try:
        yield from FORMATS[name].read(path, options)
    except UnreadableError as error:
        options.unreadable(error)


def _file_content(path: Path, options: ReadOptions, name: str) -> str:
    """A name made of all structures of a file that can be read, without their labels."""
    digest = hashlib.sha256()
    silent = replace(options, group_by="frame", on_unreadable=lambda _: None)
    try:
        for structure in FORMATS[name].read(path, silent):
            digest.update(structure.group.encode())
    except ValueError:
        pass  # told when the file is read for good
    return digest.hexdigest()[:16]
