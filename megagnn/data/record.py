"""The canonical record of one labelled structure: what every reader yields and every writer takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_ATOMIC_NUMBER = 118


@dataclass(frozen=True)
class Structure:
    """One structure with its labels; N atoms.

    Attributes:
        atomic_numbers: (N,) uint8.
        positions: (N, 3) float64, Å; need not lie inside the cell.
        cell: (3, 3) float64, Å, rows are lattice vectors; zeros if nothing is periodic.
        pbc: (3,) bool, periodic along each lattice vector.
        energy: total energy in eV (never per atom), or None.
        forces: (N, 3) float64, eV/Å, or None. Forces of fixed atoms are kept as the engine gave them.
        stress: (3, 3) float64, eV/Å^3, tension positive, or None.
        group: split key: molecule, slab or trajectory id. Structures of one group never land on two sides of
            a split, whatever their source.
        source: name of the data set the structure comes from.
        level: name of the level of theory of its labels.
        fixed: (N,) bool, atoms held fixed by the labeller, or None if none is.
        split: index into SPLITS of the side it was on in the store it comes from, or None.
        notes: what the reader left out or changed, in words; counted in the provenance.
        weights: of its energy, forces and stress in the loss, each 1 unless the file says otherwise.
        config_type: what kind of structure the file says it is, such as "IsolatedAtom"; empty for none.
        file: name of the file it was read from; empty where there is one file only.
        converged: False if the file says that the engine's electronic steps did not converge.
    """

    atomic_numbers: NDArray[np.uint8]
    positions: NDArray[np.float64]
    cell: NDArray[np.float64]
    pbc: NDArray[np.bool_]
    energy: float | None = None
    forces: NDArray[np.float64] | None = None
    stress: NDArray[np.float64] | None = None
    group: str = ""
    source: str = "default"
    level: str = "unknown"
    fixed: NDArray[np.bool_] | None = None
    split: int | None = None
    notes: tuple[str, ...] = ()
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    config_type: str = ""
    file: str = ""
    converged: bool = True

    @property
    def num_atoms(self) -> int:
        return len(self.atomic_numbers)
