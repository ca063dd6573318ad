"""What ASE's readers give that is not what the program meant, and how it is mended, format by format."""

from __future__ import annotations

from pathlib import Path

import ase
import numpy as np
from ase.io.formats import open_with_compression

from megagnn.data.formats.units import Units

FREE_ENERGY = ("vasp-out", "vasp-xml")
"""OUTCAR and vasprun.xml: forces are derivatives of the free energy, and `energy` is extrapolated to no
smearing."""
FREE_ENERGY_TAKEN = "the energy is the free energy, whose derivative the forces are"

OWN_UNITS = {"qbox": Units({"energy": "Ha", "forces": "Ha/bohr", "length": "bohr"})}
"""Formats whose numbers ASE leaves as the program prints them."""

STRESS_UNDECLARED = "stress left out: the sign and unit that the program prints are not known here"
OTHER_AXES = (
    "forces left out: they are in the axes of the input, positions only in Gaussian's standard orientation "
    "(run it with nosymm)"
)


class Mender:
    """What has to be known of a whole file to mend its frames.

    Args:
        path: the file.
        name: ASE's name of its format.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        self.units = OWN_UNITS.get(name, Units())
        self.rotated = name == "gaussian-out" and _only_standard_orientation(path)

    def mend(self, atoms: ase.Atoms) -> tuple[str, ...]:
        """Take labels away that are none; returns notes on them."""
        results = {} if atoms.calc is None else atoms.calc.results
        notes = []
        if self.name == "qbox" and results.pop("stress", None) is not None:
            notes.append(STRESS_UNDECLARED)
        if self.rotated and results.pop("forces", None) is not None:
            notes.append(OTHER_AXES)
        return tuple(notes)

    def converged(self, atoms: ase.Atoms) -> bool:
        """False where ASE's reader says that electronic steps failed, as that of ORCA by an energy NaN."""
        energy = None if atoms.calc is None else atoms.calc.results.get("energy")
        return not (self.name == "orca-output" and energy is not None and np.isnan(energy))


def _only_standard_orientation(path: Path) -> bool:
    found = set()
    with open_with_compression(str(path), "rt") as file:
        for line in file:
            if line.rstrip().endswith("orientation:"):
                found.add(line.strip().rstrip(":"))
    return found == {"Standard orientation"}
