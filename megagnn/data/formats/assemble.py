"""From what a reader of any format found of a frame to its `Structure`: units, virials, weights, groups."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ase.stress import voigt_6_to_full_3x3_stress
from numpy.typing import NDArray

from megagnn.data import keys
from megagnn.data.arrays import Bools, Floats
from megagnn.data.formats.electrons import electronic_state
from megagnn.data.formats.groups import group_name
from megagnn.data.formats.options import ReadOptions, UnreadableError
from megagnn.data.formats.units import KNOWN, Units
from megagnn.data.record import Structure

STRESS_DROPPED = "stress left out: not periodic in three directions"
FROM_VIRIAL = "stress made from the virial, as -virial/V"
CONTRADICTION = "the stress and the virial of the file contradict each other; the stress is taken"
DIPOLE_DROPPED = "dipole left out: that of a periodic structure depends on where its cell begins"

SIGNS_OF_FAILURE = ("converged", "scf_converged", "is_converged", "electronic_converged")
"""Keys of `info` that say whether the electronic steps converged."""


@dataclass
class Frame:
    """One structure as a file tells it, N atoms, in the units of the file.

    Attributes:
        path, index: the file and the number of the frame in it, from 0.
        numbers: (N,) atomic numbers; positions: (N, 3); cell: (3, 3) rows are lattice vectors; pbc: (3,).
        energy, forces, stress, virial: labels of any shape that makes sense, or None. Stress and virial have
            nine numbers or six in the order xx, yy, zz, yz, xz, xy.
        info: what else the file says of the frame.
        units: the file's own, where the format declares them.
        group: what the format tells about the origin of the frame, or None.
        level: the level of theory if the file says it.
        fixed: (N,) bool or None.
        notes: what was left out or changed so far.
        converged: False if the file says that the electronic steps did not converge.
        others: labels of other kinds by their names, or None; but for a dipole in the units of a store
            (`keys.LABELS`).
    """

    path: Path
    index: int
    numbers: NDArray[np.integer]
    positions: Floats
    cell: Floats
    pbc: Bools
    energy: Any = None
    forces: Any = None
    stress: Any = None
    virial: Any = None
    info: Mapping[str, Any] = field(default_factory=dict)
    units: Units = field(default_factory=Units)
    group: str | None = None
    level: str = "unknown"
    fixed: Bools | None = None
    notes: tuple[str, ...] = ()
    converged: bool = True
    others: Mapping[str, Any] = field(default_factory=dict)


def assemble(frame: Frame, options: ReadOptions) -> Structure:
    """The record of a frame in the units of a store.

    Units declared by the user come before those of the format. A stress is taken as it is; without one, and
    with a virial, it is -virial/V.

    Raises:
        UnreadableError: a label of a shape that makes no sense.
        ValueError: no such key to group by (see `group_name`).
    """
    units = options.units.over(frame.units)
    num_atoms = len(frame.numbers)
    pbc = np.asarray(frame.pbc, dtype=bool)
    try:
        length = units.factor("length")
        positions = np.asarray(frame.positions, dtype=np.float64) * length
        cell = np.asarray(frame.cell, dtype=np.float64) * length if pbc.any() else np.zeros((3, 3))
        energy = _number(frame.energy, units.factor("energy", num_atoms))
        forces = (
            None if frame.forces is None else np.asarray(frame.forces, np.float64) * units.factor("forces")
        )
        stress, notes = _stress(frame, units, cell, pbc)
        others = {
            name: np.asarray(value, dtype=np.float64) * (units.factor(name) if name in KNOWN else 1.0)
            for name, value in frame.others.items()
            if value is not None
        }
        weights = _weights(frame.info)
        charge, multiplicity, of_electrons = electronic_state(frame.info, frame.numbers)
    except (TypeError, ValueError) as error:
        raise UnreadableError(f"{frame.path}, frame {frame.index}: {error}") from error
    notes = (*frame.notes, *notes, *of_electrons)
    if keys.DIPOLE in others and pbc.any():
        del others[keys.DIPOLE]
        notes = (*notes, DIPOLE_DROPPED)
    numbers = np.asarray(frame.numbers)
    return Structure(
        atomic_numbers=numbers.astype(np.uint8),
        positions=positions,
        cell=cell,
        pbc=pbc,
        energy=energy,
        forces=forces,
        stress=stress,
        group=group_name(
            options.group_by,
            path=frame.path,
            frame=frame.index,
            numbers=numbers,
            positions=positions,
            cell=cell,
            info=frame.info,
            file_content=options.file_content,
            auto=frame.group,
        ),
        source=options.source_name(frame.path),
        level=options.level or frame.level,
        fixed=frame.fixed,
        notes=notes,
        weights=weights,
        charge=charge,
        multiplicity=multiplicity,
        others=others,
        config_type=str(frame.info.get("config_type", "")),
        converged=frame.converged and not any(_says_no(frame.info.get(key)) for key in SIGNS_OF_FAILURE),
    )


def usable_stress(stress: Floats | None, pbc: Bools) -> tuple[Floats | None, tuple[str, ...]]:
    """A stress label, or None and a note where its volume holds vacuum (slabs, chains, molecules).

    The thickness of the vacuum is an arbitrary choice of whoever set up the cell, and so is such a stress.
    """
    if stress is None or np.all(pbc):
        return stress, ()
    return None, (STRESS_DROPPED,)


def full_tensor(value: Any, what: str = "stress") -> Floats:
    """(3, 3) from nine numbers, or six in the order xx, yy, zz, yz, xz, xy.

    Raises:
        ValueError: another number of components, or something that is no number.
    """
    values = np.asarray(value, dtype=np.float64).squeeze()
    if values.shape == (6,):
        return np.asarray(voigt_6_to_full_3x3_stress(values))
    if values.size == 9:
        return values.reshape(3, 3)
    raise ValueError(f"{what} must have 6 or 9 components, got shape {values.shape}")


def _number(value: Any, factor: float) -> float | None:
    return None if value is None else float(np.asarray(value, dtype=np.float64).reshape(())) * factor


def _stress(frame: Frame, units: Units, cell: Floats, pbc: Bools) -> tuple[Floats | None, tuple[str, ...]]:
    """The stress with notes: as given, or from the virial where there is none."""
    given = None if frame.stress is None else full_tensor(frame.stress) * units.factor("stress")
    if frame.virial is None or not pbc.all():
        return usable_stress(given if frame.virial is None or given is not None else np.zeros((3, 3)), pbc)
    virial = full_tensor(frame.virial, "virial") * units.factor("virial")
    volume = abs(np.linalg.det(cell))
    if not volume > 0:
        raise ValueError("the cell has no volume, by which the virial is divided; leave the virial out")
    from_virial = -virial / volume
    if given is None:
        return from_virial, (FROM_VIRIAL,)
    size = max(np.abs(given).max(), np.abs(from_virial).max())
    agree = np.abs(given - from_virial).max() <= 0.02 * size + 1e-5
    return given, () if agree else (CONTRADICTION,)


def _weights(info: Mapping[str, Any]) -> tuple[float, float, float]:
    """Weights of energy, forces and stress in the loss, as MACE writes them."""

    def weight(*names: str) -> float:
        return float(np.prod([float(info.get(name, 1.0)) for name in names]))

    result = (
        weight("config_weight", "config_energy_weight"),
        weight("config_weight", "config_forces_weight"),
        weight("config_weight", "config_stress_weight", "config_virials_weight"),
    )
    if not all(np.isfinite(w) and w >= 0 for w in result):
        raise ValueError(f"weights (config_weight and its kin) must be 0 or positive, got {result}")
    return result


def _says_no(value: Any) -> bool:
    return value is not None and str(value).strip().lower() in ("f", "false", "no", "0", ".false.")
