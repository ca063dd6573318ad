"""What ASE's readers leave out or take for something else in the outputs of programs, format by format.

They give the labels of a frame without a word on whether the electronic steps behind it converged. Where a
program reached its largest number of steps first, energy and forces are those of an unfinished iteration.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

import ase
import numpy as np
from ase.io.formats import open_with_compression
from ase.units import Hartree

from megagnn.data.formats.units import Units

VASP_FRAME_END = "FREE ENERGIE OF THE ION-ELECTRON SYSTEM"
PW_RESULTS = ("!    total energy", "Forces acting on atoms", "total   stress", "Magnetic moment per site")
PW_FAILED = "convergence NOT achieved"

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


def converged_frames(path: Path, ase_format: str) -> list[bool]:
    """One bool for each frame, in the order of ASE's reader; an empty list where nothing is known.

    Raises:
        OSError, ValueError: a file that cannot be read as text.
    """
    rule = RULES.get(ase_format)
    if rule is None or not path.is_file():
        return []
    with open_with_compression(str(path), "rt") as file:
        return rule(file)


def outcar(lines: Iterable[str]) -> list[bool]:
    """Steps of a VASP OUTCAR, false where NELM was reached or VASP says so (since version 6)."""
    result: list[bool] = []
    num_allowed, last_step, reached, failed = 0, 0, False, False
    for line in lines:
        if "aborting loop" in line:
            reached |= "EDIFF is reached" in line
            failed |= "was not reached" in line
        elif " Iteration " in line:
            if found := re.search(r"Iteration\s+\d+\(\s*(\d+)\)", line):
                last_step = int(found.group(1))
        elif not num_allowed and (found := re.match(r"\s*NELM\s*=\s*(\d+)", line)):
            num_allowed = int(found.group(1))
        elif VASP_FRAME_END in line:
            used_up = not reached and 0 < num_allowed <= last_step
            result.append(not failed and not used_up)
            last_step, reached, failed = 0, False, False
    return result


def vasprun(file: IO[str]) -> list[bool]:
    """Steps of a vasprun.xml, false where NELM was reached and the last change was above EDIFF."""
    result: list[bool] = []
    num_allowed, tolerance = 0, 0.0
    try:
        for _, element in ElementTree.iterparse(file):
            if element.tag == "i" and element.get("name") == "NELM":
                num_allowed = int(element.text or 0)
            elif element.tag == "i" and element.get("name") == "EDIFF":
                tolerance = float(element.text or 0)
            elif element.tag == "calculation":
                if element.find("energy") is not None:
                    result.append(_finished(element, num_allowed, tolerance))
                element.clear()
    except ElementTree.ParseError:
        pass  # a file cut short; ASE reads its whole steps
    return result


def _finished(calculation: ElementTree.Element, num_allowed: int, tolerance: float) -> bool:
    energies = [
        float(found.text or "nan") for found in calculation.findall("scstep/energy/i[@name='e_fr_energy']")
    ]
    if not 0 < num_allowed <= len(energies):
        return True
    return len(energies) > 1 and abs(energies[-1] - energies[-2]) <= tolerance


def espresso(lines: Iterable[str]) -> list[bool]:
    """Frames of Quantum ESPRESSO's pw.x: configurations with results, as ASE has them."""
    result: list[bool] = []
    failed, has_results = False, False
    for line in lines:
        if "Program PWSCF" in line or "ATOMIC_POSITIONS" in line:
            if has_results:
                result.append(not failed)
            failed, has_results = False, False
        failed |= PW_FAILED in line
        has_results |= any(word in line for word in PW_RESULTS) or "End of band structure" in line
        has_results |= "End of self-consistent" in line
    return [*result, not failed] if has_results else result


RULES: dict[str, Callable[[IO[str]], list[bool]]] = {
    "vasp-out": outcar,
    "vasp-xml": vasprun,
    "espresso-out": espresso,
}
"""ASE's name of the format -> rule."""

AIMS_FAILED = ("self-consistency cycle did not converge", "scf cycle not converged")


def aims(lines: Iterable[str]) -> bool:
    """Whether one frame of FHI-aims converged, by its lines."""
    text = [line.lower() for line in lines]
    return not any(word in line for line in text for word in AIMS_FAILED)


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
