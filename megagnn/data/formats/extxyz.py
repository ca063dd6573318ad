"""Extended XYZ, frame by frame: framing and species are read here, each frame by ASE.

ASE's reader stops at the first frame it cannot parse, at a species that is no element, and at a `stress` or
`virial` that has not nine numbers, whether it is wanted or not.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import ase
import numpy as np
from ase.io.extxyz import key_val_str_to_dict, read_xyz
from ase.io.formats import open_with_compression

from megagnn.data.formats.options import ReadOptions, UnreadableError
from megagnn.data.formats.species import number_of, unknown_species

TENSORS = ("stress", "virial")
UNREADABLE_STRESS = "stress that is no tensor"
"""Key of `info` under which a stress stands that ASE could not hold."""
_TENSOR_KEY = re.compile(rf"(?<![\w-])({'|'.join(TENSORS)})(?=\s*=)")
_ASIDE = "set_aside_"


def iterate_extxyz(path: Path, options: ReadOptions) -> Iterator[tuple[int, ase.Atoms]]:
    """(index, atoms) of the frames of a file; those that cannot be read go to `options.unreadable`.

    After a frame whose end is not found nothing more is read.

    Raises:
        UnreadableError: see above.
    """
    index = 0
    try:
        with open_with_compression(str(path), "r") as file:
            for frame in _split(file):
                index += 1
                try:
                    atoms = _atoms(frame, options.species)
                except Exception as error:
                    options.unreadable(_unreadable(path, index - 1, error))
                    continue
                yield index - 1, atoms
    except UnreadableError:
        raise
    except (OSError, EOFError, ValueError) as error:
        options.unreadable(_unreadable(path, index, error))


def _unreadable(path: Path, index: int, error: Exception) -> UnreadableError:
    if isinstance(error, UnreadableError):
        return UnreadableError(f"cannot read {path}, frame {index}: {error}")
    reason = str(error) or type(error).__name__
    return UnreadableError(f"cannot read {path}, frame {index}: {reason}; is the file whole?")


def _split(file: IO[str]) -> Iterator[list[str]]:
    """Lines of each frame: number of atoms, comment, atoms, and cell vectors (VEC1...) if there are any."""
    line = file.readline()
    while line:
        if not line.strip():
            line = file.readline()
            continue
        if not line.strip().isdigit():
            raise ValueError(f"expected the number of atoms, got {line.strip()[:60]!r}")
        num_atoms = int(line)
        lines = [line, *(file.readline() for _ in range(num_atoms + 1))]
        if not lines[-1]:
            raise ValueError(f"the file ends within a frame of {num_atoms} atoms")
        line = file.readline()
        while line.lstrip().startswith("VEC"):
            lines.append(line)
            line = file.readline()
        yield lines


def _atoms(lines: list[str], species: Mapping[str, str]) -> ase.Atoms:
    num_atoms = int(lines[0])
    column = _species_column(lines[1])
    if column is not None:
        atom_lines = lines[2 : 2 + num_atoms]
        rows = [line.split(None, column + 1) for line in atom_lines]
        names = [row[column] if len(row) > column else "" for row in rows]
        known = {name: number_of(name, species) for name in set(names)}
        unknown = [name for name in names if known[name] is None]
        if unknown:
            raise UnreadableError(unknown_species(unknown))
        if any(name in species for name in known):
            lines = (
                lines[:2]
                + [
                    " ".join([*row[:column], species.get(row[column], row[column]), *row[column + 1 :]])
                    for row in rows
                ]
                + lines[2 + num_atoms :]
            )
    (atoms,) = read_xyz(io.StringIO("".join(_ended(lines))), slice(0, 1), properties_parser=parse_comment)
    return atoms


def _ended(lines: list[str]) -> list[str]:
    return [line if line.endswith("\n") else line + "\n" for line in lines]


def _species_column(comment: str) -> int | None:
    """Column of the names of species; None where there are only atomic numbers."""
    found = re.search(r"Properties\s*=\s*[\"']?([^\s\"']+)", comment)
    if found is None:
        return 0
    fields = found.group(1).split(":")
    column = 0
    for name, _, count in zip(fields[::3], fields[1::3], fields[2::3], strict=False):
        if name in ("species", "symbols"):
            return None if "Z" in fields[::3] else column
        column += int(count)
    return None


def parse_comment(comment: str) -> dict[str, Any]:
    """What the comment line says, as ASE parses it, and tensors of six numbers, too.

    A stress that is no tensor is put aside under a key of its own, so that it matters only if it is wanted.
    """
    info = key_val_str_to_dict(_TENSOR_KEY.sub(rf"{_ASIDE}\1", comment))
    for name in TENSORS:
        if _ASIDE + name not in info:
            continue
        value = info.pop(_ASIDE + name)
        array = np.asarray(value)
        if array.dtype.kind in "if" and array.size == 9:
            info[name] = array.reshape(3, 3, order="F")
        elif array.dtype.kind in "if" and array.size == 6:
            info[name] = array
        elif name == "stress":
            info[UNREADABLE_STRESS] = value
        else:
            info[name] = value
    return dict(info)
