"""What ASE's readers give that is not what the program meant, and how it is mended, format by format."""

from __future__ import annotations

from pathlib import Path

import ase
import numpy as np
from ase.io.formats import open_with_compression
from ase.units import Hartree

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
        self.rotated = False
        self.failed: list[float] = []
        if name == "gaussian-out":
            self.rotated, self.failed = _of_gaussian(path)

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
        """False where electronic steps failed: of ORCA ASE's reader gives the energy as NaN, Gaussian says so
        before the energy."""
        energy = None if atoms.calc is None else atoms.calc.results.get("energy")
        if energy is None:
            return True
        unfinished = self.name == "orca-output" and np.isnan(energy)
        return not (unfinished or np.isclose(energy, self.failed, rtol=1e-12, atol=0.0).any())


def _of_gaussian(path: Path) -> tuple[bool, list[float]]:
    """Whether positions are in standard orientation only, and energies (eV) whose cycle did not converge."""
    orientations, failed, has_failed = set(), [], False
    with open_with_compression(str(path), "rt") as file:
        for line in file:
            if line.rstrip().endswith("orientation:"):
                orientations.add(line.strip().rstrip(":"))
            elif "Convergence criterion not met" in line:
                has_failed = True
            elif line.strip().startswith("SCF Done:"):
                if has_failed:
                    failed.append(float(line.split("=")[1].split()[0].replace("D", "e")) * Hartree)
                has_failed = False
    return orientations == {"Standard orientation"}, failed
