"""Any file ASE reads, extended XYZ first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ase
import ase.io
import numpy as np
from ase.constraints import FixAtoms, FixCartesian
from ase.stress import voigt_6_to_full_3x3_stress
from numpy.typing import NDArray

from megagnn.data.formats.options import ReadOptions, group_name, usable_stress
from megagnn.data.record import Structure


def read_ase(path: Path, options: ReadOptions) -> Iterator[Structure]:
    """Stream the frames of a file through `ase.io.iread`.

    Labels are what ASE holds as results: energy (total, eV; never the free energy), forces (eV/Å) as the
    engine gave them (ASE's `get_forces` would zero those of fixed atoms), stress (eV/Å^3, tension positive)
    where the structure is periodic in three directions. Keys of one's own, such as REF_energy, are looked up
    in `atoms.info` and `atoms.arrays`.

    Raises:
        ValueError: a file ASE cannot read, a first frame without labels, naming the keys that are there, or
            labels of which some are named by a key and others are not (see `ReadOptions.check_label_keys`).
    """
    frames = _frames(path)
    for index, atoms in enumerate(frames):
        structure = structure_from_atoms(atoms, options, path, index)
        if index == 0:
            _check_labels(structure, atoms, options, path)
        usual = [name for name in options.label_keys if name in _results(atoms)]
        options.check_label_keys(usual, f"{path}, frame {index}")
        yield structure


def structure_from_atoms(
    atoms: ase.Atoms, options: ReadOptions, path: Path = Path("atoms"), frame: int = 0
) -> Structure:
    """The record of one `ase.Atoms`; labels that are not there are None.

    Raises:
        ValueError: a label of a shape that makes no sense.
    """
    periodic = np.asarray(atoms.pbc, dtype=bool)
    cell = atoms.cell.array.astype(np.float64) if periodic.any() else np.zeros((3, 3))
    energy = _label(atoms, options.energy_key, "energy")
    forces = _label(atoms, options.forces_key, "forces")
    stress = _label(atoms, options.stress_key, "stress")
    try:
        stress, notes = usable_stress(None if stress is None else _full_stress(stress), periodic)
        return Structure(
            atomic_numbers=np.asarray(atoms.numbers).astype(np.uint8),
            positions=np.asarray(atoms.positions, dtype=np.float64),
            cell=cell,
            pbc=periodic,
            energy=None if energy is None else float(np.asarray(energy, dtype=np.float64).reshape(())),
            forces=None if forces is None else np.asarray(forces, dtype=np.float64),
            stress=stress,
            group=group_name(
                options.group_by, path=path, frame=frame, numbers=atoms.numbers, info=atoms.info
            ),
            source=options.source_name(path),
            level=options.level or "unknown",
            fixed=fixed_atoms(atoms),
            notes=notes,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}, frame {frame}: {error}") from error


def fixed_atoms(atoms: ase.Atoms) -> NDArray[np.bool_] | None:
    """(N,) bool of atoms held fixed in all directions, or None if none is."""
    fixed = np.zeros(len(atoms), dtype=bool)
    for constraint in atoms.constraints:
        if isinstance(constraint, FixAtoms) or (
            isinstance(constraint, FixCartesian) and np.asarray(constraint.mask).all()
        ):
            fixed[constraint.index] = True
    return fixed if fixed.any() else None


def _frames(path: Path) -> Iterator[ase.Atoms]:
    """Frames of a file; whatever its parser raises becomes a ValueError naming the frame."""
    index = 0
    try:
        for atoms in ase.io.iread(path, index=":"):
            yield atoms
            index += 1
    except GeneratorExit:
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"cannot read {path}, frame {index}: {reason}; is the file whole and its format known to ASE?"
        ) from error


def _results(atoms: ase.Atoms) -> dict[str, Any]:
    return atoms.calc.results if atoms.calc is not None else {}


def _label(atoms: ase.Atoms, key: str | None, name: str) -> Any:
    """A label by its key, or by the usual name among ASE's results."""
    results = _results(atoms)
    places: list[Any] = [results] if key is None else [atoms.info, atoms.arrays, results]
    for place in places:
        if (key or name) in place:
            return place[key or name]
    return None


def _full_stress(stress: Any) -> NDArray[np.float64]:
    values = np.asarray(stress, dtype=np.float64)
    if values.shape == (6,):
        return np.asarray(voigt_6_to_full_3x3_stress(values))
    if values.size == 9:
        return values.reshape(3, 3)
    raise ValueError(f"stress must have 6 or 9 components, got shape {values.shape}")


def _check_labels(structure: Structure, atoms: ase.Atoms, options: ReadOptions, path: Path) -> None:
    """Refuse a file whose first frame lacks what was asked for by name, or has nothing to learn from."""
    results = _results(atoms)
    there = (
        f"info: {', '.join(atoms.info) or 'none'}; arrays: "
        f"{', '.join(k for k in atoms.arrays if k not in ('numbers', 'positions')) or 'none'}; "
        f"results: {', '.join(results) or 'none'}"
    )
    for name, key in options.label_keys.items():
        if key not in (None, "none") and _label(atoms, key, name) is None:
            raise ValueError(f"{path}: there is no {name} key {key!r}; the first frame has {there}")
    if structure.energy is None and structure.forces is None:
        raise ValueError(
            f"{path}: no energy or forces found; the first frame has {there}. Name the keys of the labels "
            "with --energy-key and --forces-key"
        )
