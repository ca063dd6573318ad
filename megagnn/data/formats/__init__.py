"""Readers: from files of other programs to a stream of `Structure` records.

A reader yields one record for every frame, in order, and does not judge it (see validate.py); it raises only
where the file itself cannot be understood.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megagnn.data.formats.ase_files import read_ase
from megagnn.data.formats.mlearn import is_mlearn, read_mlearn
from megagnn.data.formats.options import ReadOptions
from megagnn.data.formats.packed import is_store, read_store
from megagnn.data.record import Structure

__all__ = ["FORMATS", "ReadOptions", "detect_format", "read_structures"]

FORMATS = {"ase": read_ase, "mlearn": read_mlearn, "store": read_store}
"""Name -> reader(path, options)."""


def detect_format(path: Path) -> str:
    """Name of the format of a file: by content where its name does not say.

    Raises:
        ValueError: no such file.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist; check the name")
    if is_store(path):
        return "store"
    if is_mlearn(path):
        return "mlearn"
    return "ase"


def read_structures(
    path: str | Path, options: ReadOptions | None = None, format: str | None = None
) -> Iterator[Structure]:
    """Stream the structures of a file.

    Args:
        path: any file ASE reads (compressed by gzip, bzip2 or xz too), an mlearn JSON file, a store or its
        archive.
        options: names, keys of labels, grouping; see `ReadOptions`.
        format: one of FORMATS, or None to detect it.

    Raises:
        ValueError: no such file or format, or a file that cannot be read (naming the frame).
    """
    path = Path(path)
    name = detect_format(path) if format is None else format
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}; known are {', '.join(FORMATS)}")
    return FORMATS[name](path, options or ReadOptions())
