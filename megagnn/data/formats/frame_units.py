"""Frames as ASE reads them, with lengths and usual labels in the units of a store."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import ase
import numpy as np

from megagnn.data.formats.units import Units

QUANTITIES = {
    "energy": "energy",
    "free_energy": "energy",
    "energies": "energy",
    "atomic_energies": "energy",
    "forces": "forces",
    "stress": "stress",
    "stresses": "stress",
    "virial": "virial",
    "virials": "virial",
}
"""Usual name of a label -> its quantity, see `units.KNOWN`."""
PER_ATOM = ("energies", "atomic_energies")
WITHOUT_UNIT = ("magmom", "magmoms", "charges")


def convert_frame(atoms: ase.Atoms, units: Units, foreign: bool) -> None:
    """Convert positions, cell and labels under usual names, in place: among results, `info` and arrays.

    What nobody says the unit of is left out where lengths are others than Å, or the format has units of its
    own: momenta, and results such as a dipole. Labels under names of their own stay as they are.

    Args:
        units: those of the frame.
        foreign: whether the format has units of its own.
    """
    length = units.factor("length")
    if length != 1.0:
        atoms.set_cell(atoms.cell.array * length)
        atoms.positions *= length
    if length != 1.0 or foreign:
        atoms.arrays.pop("momenta", None)
        if atoms.calc is not None:
            known = (*QUANTITIES, *WITHOUT_UNIT)
            atoms.calc.results = {k: v for k, v in atoms.calc.results.items() if k in known}
    results = {} if atoms.calc is None else atoms.calc.results
    for place in (results, atoms.info, atoms.arrays):
        _convert(place, units, len(atoms))


def _convert(place: MutableMapping[str, Any], units: Units, num_atoms: int) -> None:
    for name in QUANTITIES.keys() & place.keys():
        factor = units.factor(QUANTITIES[name], 1 if name in PER_ATOM else num_atoms)
        if factor == 1.0 or place[name] is None:
            continue
        try:
            values = np.asarray(place[name], dtype=np.float64) * factor
        except (TypeError, ValueError):
            continue  # words under the name of a label
        place[name] = float(values.item()) if values.size == 1 else values
