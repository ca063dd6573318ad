"""Per-element reference energies: what is left after them is the energy of bonding, which a model can learn.

Total energies of different elements and Hamiltonians differ by orders of magnitude more than chemistry does.
The references are fitted on the training split only, so that nothing of the test energies enters the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megagnn.data.atomic_energies import prior_energies

NUM_ELEMENTS = 119
"""Rows are indexed by atomic number; 0 is unused."""


@dataclass(frozen=True)
class ReferenceFit:
    """Reference energies, and what the data leave open of them.

    Attributes:
        energies: (num_sources, 119) float64, eV; zero for elements a source does not hold.
        unspanned: for each source (k, 119), orthonormal rows: the directions of composition that no energy
            determines. The energy of a composition c is known up to (c . row) for each row.
    """

    energies: NDArray[np.float64]
    unspanned: tuple[NDArray[np.float64], ...]


def fit_references(
    atomic_numbers: NDArray[np.integer],
    offsets: NDArray[np.integer],
    energies: NDArray[np.float64],
    sources: NDArray[np.integer],
    num_sources: int,
    *,
    fixed: NDArray[np.float64] | None = None,
    elements: Sequence[NDArray[np.integer]] | None = None,
) -> ReferenceFit:
    """Least squares E_s ~ sum over atoms of e[source, z], source by source, in float64.

    Each structure is weighted by 1 / its atoms: the residual is an energy per atom, the quantity the model is
    judged by, and large structures do not rule the fit. Where energies do not determine the references, as of
    elements that always come in the same proportion, the solution nearest to `prior_energies` is taken.

    Args:
        atomic_numbers: (N,) of all structures, one after the other; training split only.
        offsets: (S + 1,) first atom of each structure.
        energies: (S,) total energies, eV.
        sources: (S,) source of each structure, 0..num_sources - 1.
        num_sources: rows of the result.
        fixed: (num_sources, 119) references that are known, eV, NaN for those to be fitted.
        elements: atomic numbers of each source, with those that only structures without energy hold; those
            of the energies if not given.

    Raises:
        ValueError: lengths that differ, energies not finite, an empty structure, or a source out of range.
    """
    _check(atomic_numbers, offsets, energies, sources, num_sources)
    num_structures, num_atoms = len(offsets) - 1, np.diff(offsets)
    structure_of_atom = np.repeat(np.arange(num_structures), num_atoms)
    references = np.zeros((num_sources, NUM_ELEMENTS))
    unspanned = []
    for source in range(num_sources):
        rows = np.flatnonzero(sources == source)
        atoms = sources[structure_of_atom] == source
        extra = np.zeros(0, dtype=np.int64) if elements is None else np.asarray(elements[source])
        present = np.union1d(np.unique(atomic_numbers[atoms]), extra).astype(np.int64)
        row = np.searchsorted(rows, structure_of_atom[atoms])
        column = np.searchsorted(present, atomic_numbers[atoms])
        counts = np.bincount(row * len(present) + column, minlength=len(rows) * len(present))
        shares = counts.reshape(len(rows), len(present)) / num_atoms[rows, None]
        known = np.full(len(present), np.nan) if fixed is None else fixed[source, present]
        references[source, present], open_rows = _fit(
            shares, energies[rows] / num_atoms[rows], present, known
        )
        full = np.zeros((len(open_rows), NUM_ELEMENTS))
        full[:, present] = open_rows
        unspanned.append(full)
    return ReferenceFit(references, tuple(unspanned))


def _fit(
    shares: NDArray[np.float64],
    energies: NDArray[np.float64],
    elements: NDArray[np.int64],
    known: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """References of one source (k,) and what is open of them (m, k).

    Args:
        shares: (S, k) share of each element in each structure; energies: (S,) per atom, eV.
        elements: (k,) atomic numbers; known: (k,) their references, NaN for those to be fitted.
    """
    free = np.isnan(known)
    found, nothing = np.where(free, 0.0, known), np.zeros((0, len(elements)))
    if not free.any() or len(energies) == 0:
        return found, np.eye(len(elements))[free]
    left = energies - shares @ found if not free.all() else energies
    matrix = shares[:, free]
    solution, _, rank, _ = np.linalg.lstsq(matrix, left, rcond=None)
    if rank == free.sum():
        found[free] = solution
        return found, nothing
    prior = prior_energies(elements[free], matrix, left, elements, shares, energies)
    correction, *_ = np.linalg.lstsq(matrix, left - matrix @ prior, rcond=None)
    found[free] = prior + correction
    # Directions of no effect: the right singular vectors beyond the rank. Equal rows tell nothing new, and
    # rows of zeros make the matrix tall enough to have them all.
    rows = np.concatenate([np.unique(matrix, axis=0), np.zeros((int(free.sum()), int(free.sum())))])
    directions = np.linalg.svd(rows, full_matrices=False)[2][rank:]
    open_rows = np.zeros((len(directions), len(elements)))
    open_rows[:, free] = directions
    return found, open_rows


def _check(
    atomic_numbers: NDArray[np.integer],
    offsets: NDArray[np.integer],
    energies: NDArray[np.float64],
    sources: NDArray[np.integer],
    num_sources: int,
) -> None:
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
    if num_structures and np.diff(offsets).min() < 1:
        raise ValueError("a structure without atoms cannot enter the fit of references; remove it")
