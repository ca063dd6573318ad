"""ADIOS2 folders of HydraGNN (`NAME.bp`): energies, forces and, of newer ones, charge and spin."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megagnn.data.formats.options import ReadOptions
from megagnn.data.formats.published import Method, Published, described, read_described
from megagnn.data.record import Structure

READER = "megagnn.data.foreign.adios:structures"
LAYOUTS = {"HydraGNN": Published((Method("unknown", "energy", "forces", "stress"),))}


def is_adios(path: Path) -> bool:
    """Whether a path is a folder with the index that ADIOS2 (BP4, BP5) writes."""
    return path.is_dir() and (path / "md.idx").is_file()


def read_adios(path: Path, options: ReadOptions) -> Iterator[Structure]:
    """Yield the structures of a folder, block by block; the side of HydraGNN's split is `info:side`.

    Raises:
        ValueError: a folder that cannot be read or is not HydraGNN's (an UnreadableError), adios2 that is not
            installed.
    """
    yield from read_described(READER, path, LAYOUTS, options)


def look_into_adios(path: Path, options: ReadOptions) -> dict[str, Any]:
    """See `Format.look`."""
    return described(READER, path, LAYOUTS, options)
