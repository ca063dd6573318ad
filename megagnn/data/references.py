"""Per-element reference energies: what is left after them is the energy of bonding, which a model can learn.

Total energies of different elements and Hamiltonians differ by orders of magnitude more than chemistry does.
The references are fitted on the training split only, so that nothing of the test energies enters the model.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NUM_ELEMENTS = 119
"""Rows are indexed by atomic number; 0 is unused."""


def fit_references(
    atomic_numbers: NDArray[np.integer],
    offsets: NDArray[np.integer],
    energies: NDArray[np.float64],
    sources: NDArray[np.integer],
    num_sources: int,
) -> NDArray[np.float64]:
    """Least squares E_s ~ sum over atoms of e[source, z], source by source, in float64.

    Each structure is weighted by 1 / its atoms: the residual is an energy per atom, the quantity the model is
    judged by, and large structures do not rule the fit. Where elements always come in the same proportion the
    solution is not unique, and the one of smallest norm is taken.

    Args:
        atomic_numbers: (N,) of all structures, one after the other; training split only.
        offsets: (S + 1,) first atom of each structure.
        energies: (S,) total energies, eV.
        sources: (S,) source of each structure, 0..num_sources - 1.
        num_sources: rows of the result.

    Returns:
        (num_sources, 119) float64, eV; zero for elements a source does not hold.

    Raises:
        ValueError: lengths that differ, energies not finite, an empty structure, or a source out of range.
    """
    num_structures = len(offsets) - 1
    if not num_structures == len(energies) == len(sources) or offsets[-1] != len(atomic_numbers):
        raise ValueError(
            f"offsets are of {num_structures} structures and {offsets[-1]} atoms, but there are "
            f"{len(energies)} energies, {len(sources)} sources and {len(atomic_numbers)} atoms"
        )
    if not np.isfinite(energies).all():
        raise ValueError("energies must be finite to fit references; leave structures without energy out")
    if num_structures and not 0 <= sources.min() <= sources.max() < num_sources:
        raise ValueError(f"sources must lie in 0..{num_sources - 1}, got {sources.min()} to {sources.max()}")
    num_atoms = np.diff(offsets)
    if num_structures and num_atoms.min() < 1:
        raise ValueError("a structure without atoms cannot enter the fit of references; remove it")
    structure_of_atom = np.repeat(np.arange(num_structures), num_atoms)
    references = np.zeros((num_sources, NUM_ELEMENTS))
    for source in np.unique(sources):
        rows = np.flatnonzero(sources == source)
        atoms = sources[structure_of_atom] == source
        present, column = np.unique(atomic_numbers[atoms], return_inverse=True)
        row = np.searchsorted(rows, structure_of_atom[atoms])
        counts = np.bincount(row * len(present) + column, minlength=len(rows) * len(present))
        per_atom = counts.reshape(len(rows), len(present)) / num_atoms[rows, None]
        references[source, present], *_ = np.linalg.lstsq(
            per_atom, energies[rows] / num_atoms[rows], rcond=None
        )
    return references
