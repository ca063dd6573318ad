"""Per-element reference energies: what is left after them is the energy of bonding, which a model can learn.

Total energies of different elements and Hamiltonians differ by orders of magnitude more than chemistry does.
The references are fitted on the training split only, so that nothing of the test energies enters the model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megagnn.data.arrays import Floats, Ints

NUM_ELEMENTS = 119
"""Rows are indexed by atomic number; 0 is unused."""

ROWS_AT_ONCE = 8192
"""Structures of which a fit holds the shares of elements at a time."""

HARTREE = 27.211386245988
"""eV, CODATA 2018."""

ALL_ELECTRON_BAND = (0.9, 1.4)
"""Energies between these multiples of `all_electron_energy` are of all electrons: the formula is good to some
per cent up to krypton, and relativity adds a quarter for the heaviest atoms."""

COHESIVE_ENERGY = 12.0
"""eV per atom. Energies beyond are not relative to atoms: tungsten, with the strongest bonds, has 8.9, and
programs that count from atoms without spin add up to some 3."""

NOBLE_GASES = np.array([0, 2, 10, 18, 36, 54, 86])


@dataclass(frozen=True)
class ReferenceFit:
    """Reference energies, and what the data leave open of them.

    Attributes:
        energies: (num_sources, 119) float64, eV; zero for elements a source does not hold.
        unspanned: for each source (k, 119), orthonormal rows: the directions of composition that no energy
            determines. The energy of a composition c is known up to (c . row) for each row.
    """

    energies: Floats
    unspanned: tuple[Floats, ...]


def fit_references(
    atomic_numbers: NDArray[np.integer],
    offsets: NDArray[np.integer],
    energies: Floats,
    sources: NDArray[np.integer],
    num_sources: int,
    *,
    elements: Sequence[Ints],
    fixed: Floats | None = None,
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
        elements: atomic numbers of each source, ascending, also those that only structures without energy
            hold.
        fixed: (num_sources, 119) references that are known, eV, NaN for those to be fitted.

    Raises:
        ValueError: lengths that differ, energies not finite, an empty structure, or a source out of range.
    """
    _check(atomic_numbers, offsets, energies, sources, num_sources)
    num_atoms = np.diff(offsets)
    equations = [_Equations(len(seen)) for seen in elements]
    for rows in blocks(len(num_atoms)):
        numbers = atomic_numbers[offsets[rows.start] : offsets[rows.stop]]
        row_of_atom = np.repeat(np.arange(rows.stop - rows.start), num_atoms[rows])
        for source in np.unique(sources[rows]):
            mine = np.flatnonzero(sources[rows] == source)
            atoms = sources[rows][row_of_atom] == source
            row = np.searchsorted(mine, row_of_atom[atoms])
            column = np.searchsorted(elements[source], numbers[atoms])
            width = len(elements[source])
            counts = np.bincount(row * width + column, minlength=len(mine) * width)
            of_rows = num_atoms[rows][mine]
            shares = counts.reshape(len(mine), width) / of_rows[:, None]
            equations[source].add(shares, energies[rows][mine] / of_rows)
    references = np.zeros((num_sources, NUM_ELEMENTS))
    unspanned = []
    for source, seen in enumerate(elements):
        known = np.full(len(seen), np.nan) if fixed is None else fixed[source, seen]
        references[source, seen], open_rows = _fit(equations[source], seen, known)
        full = np.zeros((len(open_rows), NUM_ELEMENTS))
        full[:, seen] = open_rows
        unspanned.append(full)
    return ReferenceFit(references, tuple(unspanned))


class _Equations:
    """Shares @ references = energies per atom, of any number of structures.

    Beyond ROWS_AT_ONCE they are rotated into as many as there are unknowns, and one: the triangle of a QR
    decomposition has the same least squares solution, rank and null space. (Normal equations would lose half
    of the digits.)

    Attributes:
        num_rows: structures so far; sum_shares: (k,) and sum_energies: eV per atom, over them.
    """

    def __init__(self, num_elements: int) -> None:
        self.num_rows = 0
        self.sum_shares, self.sum_energies = np.zeros(num_elements), 0.0
        self._rows = np.zeros((0, num_elements + 1))

    def add(self, shares: Floats, energies: Floats) -> None:
        """More structures: shares (S, k) of each element, energies (S,) per atom, eV."""
        self.num_rows += len(energies)
        self.sum_shares += shares.sum(axis=0)
        self.sum_energies += float(energies.sum())
        self._rows = np.concatenate([self._rows, np.column_stack([shares, energies])])
        if len(self._rows) > max(ROWS_AT_ONCE, self._rows.shape[1]):
            self._rows = np.asarray(np.linalg.qr(self._rows, mode="r"))

    def rows(self) -> tuple[Floats, Floats]:
        """Shares (R, k) and energies (R,) of equations that say the same as all structures."""
        return self._rows[:, :-1], self._rows[:, -1]


def blocks(num_structures: int) -> Iterator[slice]:
    """Slices of at most ROWS_AT_ONCE structures, to bound the memory of what is computed of atoms."""
    for start in range(0, num_structures, ROWS_AT_ONCE):
        yield slice(start, min(start + ROWS_AT_ONCE, num_structures))


def _fit(equations: _Equations, elements: Ints, known: Floats) -> tuple[Floats, Floats]:
    """References of one source (k,) and what is open of them (m, k); `known` is NaN where to be fitted."""
    free = np.isnan(known)
    found, nothing = np.where(free, 0.0, known), np.zeros((0, len(elements)))
    if not free.any() or equations.num_rows == 0:
        return found, np.eye(len(elements))[free]
    shares, energies = equations.rows()
    left = energies - shares @ found if not free.all() else energies
    matrix = shares[:, free]
    precision = float(np.finfo(np.float64).eps * max(equations.num_rows, free.sum()))
    solution, _, rank, _ = np.linalg.lstsq(matrix, left, rcond=precision)
    if rank == free.sum():
        found[free] = solution
        return found, nothing
    mean_shares = equations.sum_shares / equations.num_rows
    mean_energy = equations.sum_energies / equations.num_rows
    prior = prior_energies(elements[free], matrix, left, elements, mean_shares, mean_energy)
    correction, *_ = np.linalg.lstsq(matrix, left - matrix @ prior, rcond=precision)
    found[free] = prior + correction
    # Directions of no effect: the right singular vectors beyond the rank.
    directions = np.linalg.svd(np.linalg.qr(matrix, mode="r"), full_matrices=True)[2][rank:]
    open_rows = np.zeros((len(directions), len(elements)))
    open_rows[:, free] = directions
    return found, open_rows


def _check(
    atomic_numbers: NDArray[np.integer],
    offsets: NDArray[np.integer],
    energies: Floats,
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


def all_electron_energy(atomic_numbers: ArrayLike) -> Floats:
    """Non-relativistic energy of neutral atoms with all electrons, eV.

    -0.768745 Z^(7/3) + Z^2/2 - 0.269900 Z^(5/3) Hartree: Thomas and Fermi, Scott, Dirac and Schwinger
    (Englert and Schwinger, Phys. Rev. A 32, 26 (1985)).
    """
    z = np.asarray(atomic_numbers, dtype=np.float64)
    return HARTREE * (-0.768745 * z ** (7 / 3) + 0.5 * z**2 - 0.2699 * z ** (5 / 3))


def valence_electrons(atomic_numbers: ArrayLike) -> Ints:
    """Electrons beyond the noble gas before, without a filled f shell."""
    z = np.asarray(atomic_numbers, dtype=np.int64)
    count = z - NOBLE_GASES[np.searchsorted(NOBLE_GASES, z, side="left") - 1]
    return np.where(count > 16, count - 14, count)


def prior_energies(
    free: Ints, matrix: Floats, left: Floats, elements: Ints, mean_shares: Floats, mean_energy: float
) -> Floats:
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
