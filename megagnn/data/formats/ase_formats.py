"""ASE's formats: which of them a file has, and what ASE's readers leave out of the outputs of programs.

They give the labels of a frame without a word on whether the electronic steps behind it converged. Where a
program reached its largest number of steps first, energy and forces are those of an unfinished iteration.
"""

import difflib
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

import ase
import numpy as np
from ase.io.formats import UnknownFileTypeError, filetype, ioformats, open_with_compression
from ase.units import Hartree

from megagnn.data.formats.electrons import TOLD, state_of_output
from megagnn.data.formats.options import UnreadableError, cannot_read
from megagnn.data.formats.units import Units

SIGNATURES = {
    "aims-output": ("FHI-aims", "Self-consistency cycle converged", "| Number of spin channels"),
    "espresso-out": ("Program PWSCF",),
    "orca-output": ("O   R   C   A",),
    "gaussian-out": ("Entering Gaussian System",),
    "abinit-out": ("of ABINIT",),
    "nwchem-out": ("Northwest Computational Chemistry",),
    "gamess-us-out": ("GAMESS",),
    "gpaw-out": ("___ ___ ___ _ _ _",),
    "vasp-out": ("FREE ENERGIE OF THE ION-ELECTRON SYSTEM",),
    "vasp-xml": ("<modeling>",),
    "castep-castep": ("CASTEP version",),
    "lammps-dump-text": ("ITEM: TIMESTEP",),
    "lammps-data": ("xlo xhi",),
    "onetep-out": ("Linear-Scaling Ab Initio Total Energy Program",),
}
"""ASE's formats by words their files hold somewhere near the beginning, for messages."""
HEAD = 1 << 20

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


def ase_format(path: Path, given: str | None) -> str:
    """ASE's name of the format of a file.

    Where ASE knows neither name nor content, a first line that is a number means extended XYZ.

    Raises:
        ValueError: a name given that ASE does not know or cannot read.
        UnreadableError: a file of no known format, naming candidates.
    """
    if given is not None:
        if given not in ioformats or not ioformats[given].can_read:
            readable = [name for name, form in ioformats.items() if form.can_read and name != given]
            near = difflib.get_close_matches(given, readable, n=3) or ["extxyz", "vasp-out", "aims-output"]
            raise ValueError(
                f"--ase-format: ASE reads no format {given!r}; near are {', '.join(near)}, all are listed by "
                "`ase info --formats`"
            )
        return given
    try:
        name = filetype(str(path))
    except UnknownFileTypeError as error:
        if "Empty file" in str(error):
            raise UnreadableError(f"cannot read {path}, frame 0: the file is empty") from error
        name = ""
    except (OSError, EOFError) as error:
        raise cannot_read(path, 0, error) from error
    if name in ioformats:
        return name
    if _head(path).split("\n")[0].strip().isdigit():
        return "extxyz"
    raise UnreadableError(
        f"cannot read {path}, frame 0: ASE knows no such file by its name or content; name its format with "
        f"--ase-format{_candidates(path, name)}"
    )


def nothing_found(path: Path, name: str) -> UnreadableError:
    """The error of a file in which ASE's reader found no structure."""
    return UnreadableError(
        f"{path}: no structure found, read as ASE's format {name}; if the file is of another program, name "
        f"its format with --ase-format{_candidates(path, name)}"
    )


def _candidates(path: Path, but: str) -> str:
    """Formats whose words the file holds, in words."""
    head = _head(path)
    found = [
        name for name, words in SIGNATURES.items() if name != but and any(word in head for word in words)
    ]
    return f" (by its content perhaps {' or '.join(found)})" if found else " (as in --ase-format aims-output)"


def _head(path: Path) -> str:
    if path.is_dir():
        return ""
    try:
        with open_with_compression(str(path), "rb") as file:
            return bytes(file.read(HEAD)).decode("utf-8", errors="replace")
    except (OSError, EOFError):
        return ""


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
        self.state: dict[str, int] = {}
        self.notes: tuple[str, ...] = ()
        if name == "gaussian-out":
            self.rotated, self.failed = _of_gaussian(path)
        if name in TOLD:
            with open_with_compression(str(path), "rt") as file:
                self.state, self.notes = state_of_output(file, name)

    def mend(self, atoms: ase.Atoms) -> tuple[str, ...]:
        """Take labels away that are none, add charge and spin to `info`; returns notes on them."""
        results = {} if atoms.calc is None else atoms.calc.results
        atoms.info.update(self.state)
        notes = list(self.notes)
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
