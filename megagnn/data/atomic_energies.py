"""What the energy of a free atom is about, before any data: a prior for references, a measure for units."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

HARTREE = 27.211386245988
"""eV."""

ALL_ELECTRON_BAND = (0.9, 1.4)
"""Energies between these multiples of `all_electron_energy` are of all electrons: the formula is good to some
per cent up to krypton, and relativity adds a quarter for the heaviest atoms."""

COHESIVE_ENERGY = 12.0
"""eV per atom. Energies beyond are not relative to atoms: tungsten, with the strongest bonds, has 8.9, and
programs that count from atoms without spin add up to some 3."""

NOBLE_GASES = np.array([0, 2, 10, 18, 36, 54, 86])


def all_electron_energy(atomic_numbers: ArrayLike) -> NDArray[np.float64]:
    """Non-relativistic energy of neutral atoms with all electrons, eV.

    -0.768745 Z^(7/3) + Z^2/2 - 0.269900 Z^(5/3) Hartree: Thomas and Fermi, Scott, Dirac and Schwinger
    (Englert and Schwinger, Phys. Rev. A 32, 26 (1985)).
    """
    z = np.asarray(atomic_numbers, dtype=np.float64)
    return HARTREE * (-0.768745 * z ** (7 / 3) + 0.5 * z**2 - 0.2699 * z ** (5 / 3))


def valence_electrons(atomic_numbers: ArrayLike) -> NDArray[np.int64]:
    """Electrons beyond the noble gas before, without a filled f shell."""
    z = np.asarray(atomic_numbers, dtype=np.int64)
    count = z - NOBLE_GASES[np.searchsorted(NOBLE_GASES, z, side="left") - 1]
    return np.where(count > 16, count - 14, count)


def prior_energies(
    free: NDArray[np.int64],
    matrix: NDArray[np.float64],
    left: NDArray[np.float64],
    elements: NDArray[np.int64],
    mean_shares: NDArray[np.float64],
    mean_energy: float,
) -> NDArray[np.float64]:
    """References to assume where energies leave them open, (m,) eV.

    Their ratios follow the size of the energies: those of all electrons are `all_electron_energy`; others
    beyond the energy of bonds count the valence electrons, and go with the square of their number; energies
    relative to atoms are shared equally among the atoms. One factor fits them to the energies.

    Args:
        free: (m,) elements wanted; matrix: (S, m) their shares in the structures; left: (S,) energies per
            atom without the references that are known, eV. Any rotation of the S rows gives the same.
        elements: (k,) all elements; mean_shares: (k,) of them in the structures; mean_energy: per atom, eV.
    """
    atomic = float(mean_shares @ all_electron_energy(elements))
    if ALL_ELECTRON_BAND[0] < mean_energy / atomic < ALL_ELECTRON_BAND[1]:
        shape = all_electron_energy(free)
    elif abs(mean_energy) > COHESIVE_ENERGY:
        shape = -(valence_electrons(free).astype(np.float64) ** 2)
    else:
        shape = -np.ones(len(free))
    expected = matrix @ shape
    return shape * float(expected @ left / max(float(expected @ expected), 1e-300))
