"""LAMMPS text dumps: elements come from a column or the user, and there is no energy in them.

ASE's reader takes types 1, 2, 3 for H, He, Li, and gives every frame with forces an energy of 0.
"""

import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import ase
import numpy as np
from ase.calculators.lammps import convert
from ase.data import atomic_masses
from ase.io.formats import open_with_compression
from ase.io.lammpsrun import read_lammps_dump_text

from megagnn.data.arrays import Floats, Ints
from megagnn.data.formats.options import ReadOptions, UnreadableError, parsed_frames
from megagnn.data.formats.species import numbers_of

NO_ENERGY = "energy left out: a LAMMPS dump holds none"
UNITS_ASSUMED = "lengths and forces taken to be in LAMMPS units metal, Å and eV/Å (--units for others)"
FROM_MASSES = "elements told by masses"
MASS_TOLERANCE = 0.05

Notes = tuple[str, ...]


def iterate_dump(path: Path, options: ReadOptions) -> Iterator[tuple[int, tuple[ase.Atoms, Notes]]]:
    """(index, (atoms, notes)) of each frame; those that cannot be read go to `options.unreadable`.

    Raises:
        UnreadableError: see above; among them a dump that tells no elements, for which none are given.
    """
    yield from parsed_frames(path, _split(path), partial(_atoms, options), options)


def _split(path: Path) -> Iterator[tuple[list[str], str | None]]:
    """Lines of each frame from ITEM: TIMESTEP on, and the style of units where one is named before it."""
    lines: list[str] = []
    style = next_style = None
    with open_with_compression(str(path), "r") as file:
        for line in file:
            if line.startswith("ITEM: UNITS"):
                next_style = next(file, "").strip() or next_style
                continue
            if line.startswith("ITEM: TIMESTEP"):
                if lines:
                    yield lines, style
                lines, style = [], next_style
            lines.append(line)
    if lines:
        yield lines, style


def _atoms(options: ReadOptions, frame: tuple[list[str], str | None]) -> tuple[ase.Atoms, Notes]:
    lines, style = frame
    start = next((k for k, line in enumerate(lines) if line.startswith("ITEM: ATOMS")), None)
    if start is None:
        raise ValueError("the frame has no ITEM: ATOMS")
    columns = lines[start].split()[2:]
    rows = [line.split() for line in lines[start + 1 :] if line.strip()]
    counts = [k + 1 for k, line in enumerate(lines[:start]) if line.startswith("ITEM: NUMBER OF ATOMS")]
    if counts and int(lines[counts[0]]) != len(rows):
        raise ValueError(f"{len(rows)} atoms are there of {int(lines[counts[0]])}")
    if any(len(row) != len(columns) for row in rows):
        raise ValueError("a line of an atom has not as many numbers as there are columns")
    numbers, notes = _numbers(columns, rows, options)
    names = ase.Atoms(numbers=numbers).get_chemical_symbols()
    if "element" not in columns:
        columns, rows = [*columns, "element"], [[*row, ""] for row in rows]
    for row, name in zip(rows, names, strict=True):
        row[columns.index("element")] = name
    text = [*lines[:start], f"ITEM: ATOMS {' '.join(columns)}\n", *(" ".join(row) + "\n" for row in rows)]
    (atoms,) = read_lammps_dump_text(io.StringIO("".join(text)), index=slice(0, 1), units=style or "metal")
    if atoms.calc is not None:
        atoms.calc.results.pop("energy", None)  # 0 of ASE's making
    _as_written(atoms, style or "metal", options)
    notes = (*notes, NO_ENERGY)
    return atoms, notes if style or {"length", "forces"} & set(options.units.of) else (*notes, UNITS_ASSUMED)


def _as_written(atoms: ase.Atoms, style: str, options: ReadOptions) -> None:
    """Undo the style's conversion of what the user declares units of, which `assemble` converts from them."""
    if "length" in options.units.of:
        length = convert(1.0, "distance", style, "ASE")
        atoms.set_cell(atoms.cell.array / length)
        atoms.positions /= length
    if "forces" in options.units.of and atoms.calc is not None and "forces" in atoms.calc.results:
        atoms.calc.results["forces"] = atoms.calc.results["forces"] / convert(1.0, "force", style, "ASE")


def _numbers(columns: list[str], rows: list[list[str]], options: ReadOptions) -> tuple[Ints, Notes]:
    """(N,) atomic numbers in the order of lines."""
    if "element" in columns:
        return numbers_of([row[columns.index("element")] for row in rows], options.species), ()
    if "type" in columns and options.species:
        types = [row[columns.index("type")] for row in rows]
        return numbers_of(types, options.species, "--type-map"), ()
    if "mass" in columns:
        return _from_masses(np.array([float(row[columns.index("mass")]) for row in rows]), columns)
    raise UnreadableError(_no_elements(columns, rows))


def _from_masses(masses: Floats, columns: list[str]) -> tuple[Ints, Notes]:
    numbers = np.array([int(np.nanargmin(np.abs(atomic_masses[1:] - m))) + 1 for m in masses], dtype=np.int64)
    off = np.abs(atomic_masses[numbers] - masses)
    if (off > MASS_TOLERANCE).any():
        mass = masses[int(np.argmax(off))]
        way = "--type-map 1=Si,2=O" if "type" in columns else "a column of elements (dump_modify element)"
        raise UnreadableError(f"a mass of {mass:g} is that of no element; say which it is with {way}")
    return numbers, (FROM_MASSES,)


def _no_elements(columns: list[str], rows: list[list[str]]) -> str:
    what = f"a LAMMPS dump without a column of elements (it has {' '.join(columns)})"
    if "type" not in columns:
        return f"{what}; write one with dump_modify element"
    types = sorted({row[columns.index("type")] for row in rows}, key=lambda t: (len(t), t))
    example = ",".join(f"{t}={e}" for t, e in zip(types, ("Si", "O", "H", "C", "N"), strict=False))
    return f"{what}; say which elements its types {', '.join(types)} are, as in --type-map {example}"
