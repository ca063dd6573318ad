"""Sizes, energies, forces, neighbours and distances over a sample of a store, source by source."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ase.data import covalent_radii
from numpy.typing import NDArray

from megagnn.data import keys
from megagnn.data.arrays import Floats, Ints
from megagnn.data.baseline import Baseline
from megagnn.data.neighbours import neighbour_list, periodic_cell
from megagnn.data.references import NUM_ELEMENTS
from megagnn.data.store import Store

BLOCK = 1 << 20
"""Structures whose source is looked at together."""

FORCE_BINS = np.logspace(-4, 3, 71)
"""eV/Å; smaller and larger norms count in the outermost bins."""
DISTANCE_BINS = np.linspace(0.3, 2.1, 73)
"""Of an atom's nearest neighbour, over the sum of the two covalent radii."""

MEASURES = {
    "energy": "energy per atom less references, eV",
    "force": "largest force, eV/Å",
    "distance": "shortest distance over the sum of covalent radii",
    "edges": "edges per atom",
    "atoms": "atoms",
}
"""One number of each structure -> what it is."""


@dataclass
class Survey:
    """What a sample of one source holds.

    Attributes:
        source: its name; num_structures: that it has, sampled or not.
        rows: (S,) structures of the sample, ascending.
        values: of MEASURES, (S,) each; NaN where a structure has none.
        atoms, structures: (119,) atoms of each element, and structures that hold it.
        force_counts, distance_counts: atoms in each of the bins.
    """

    source: str
    num_structures: int
    rows: Ints
    values: dict[str, Floats]
    atoms: Ints = field(default_factory=lambda: np.zeros(NUM_ELEMENTS, dtype=np.int64))
    structures: Ints = field(default_factory=lambda: np.zeros(NUM_ELEMENTS, dtype=np.int64))
    force_counts: Ints = field(default_factory=lambda: np.zeros(len(FORCE_BINS) - 1, dtype=np.int64))
    distance_counts: Ints = field(default_factory=lambda: np.zeros(len(DISTANCE_BINS) - 1, dtype=np.int64))

    def farthest(self, measure: str, count: int) -> list[tuple[int, float, float]]:
        """Structures farthest from the median: (row, value, distance in robust standard deviations).

        Of distances the shortest, and of edges and atoms the most, are meant; of energies both sides.
        """
        values = self.values[measure]
        known = np.flatnonzero(np.isfinite(values))
        if not len(known):
            return []
        off = values[known] - np.median(values[known])
        spread = 1.4826 * float(np.median(np.abs(off)))
        signed = {"energy": np.abs(off), "distance": -off}.get(measure, off)
        order = np.argsort(-signed, kind="stable")[:count]
        scores = off / spread if spread > 0 else np.full(len(off), np.nan)
        return [(int(self.rows[known[k]]), float(values[known[k]]), float(scores[k])) for k in order]


def survey(store: Store, known: Baseline, cutoff: float, num_sampled: int) -> Iterator[Survey]:
    """One survey for each source of a store that has structures.

    Args:
        known: references and shifts of its training split.
        cutoff: Å, of edges; beyond it an atom has no nearest neighbour.
        num_sampled: structures of each source, at most, evenly over all; they bound time and memory.

    Raises:
        ValueError: a cutoff or a number that is not positive.
    """
    if not (cutoff > 0 and num_sampled > 0):
        raise ValueError(
            f"--cutoff and --sample must be positive, got {cutoff:g} Å and {num_sampled:,} structures"
        )
    energies = known.references + known.shifts[:, None]
    for index, source in enumerate(store.header.sources):
        rows, count = _sample(store, index, num_sampled)
        if not count:
            continue
        values = {measure: np.full(len(rows), np.nan) for measure in MEASURES}
        found = Survey(source, count, rows, values)
        for k, row in enumerate(rows.tolist()):
            for measure, value in _measure(found, store.structure(row), energies[index], cutoff).items():
                values[measure][k] = value
        yield found


def _sample(store: Store, source: int, limit: int) -> tuple[Ints, int]:
    """Rows of a source, every so-manieth of them, and how many there are."""
    starts = range(0, len(store), BLOCK)
    count = sum(int((store.source[start : start + BLOCK] == source).sum()) for start in starts)
    step, seen, rows = max(1, -(-count // limit)), 0, [np.zeros(0, dtype=np.int64)]
    for start in starts:
        mine = start + np.flatnonzero(store.source[start : start + BLOCK] == source)
        rows.append(mine[(seen + np.arange(len(mine))) % step == 0])
        seen += len(mine)
    return np.concatenate(rows), count


def _measure(found: Survey, s: dict[str, Any], energies: Floats, cutoff: float) -> dict[str, float]:
    """The numbers of a structure; its atoms are counted in the survey."""
    numbers = s[keys.ATOMIC_NUMBERS].astype(np.int64)
    counts = np.bincount(numbers, minlength=NUM_ELEMENTS)
    found.atoms += counts
    found.structures += counts > 0
    values: dict[str, float] = {"atoms": len(numbers)}
    if keys.ENERGY in s:
        values["energy"] = (s[keys.ENERGY] - energies[numbers].sum()) / len(numbers)
    if keys.FORCES in s:
        norms = np.linalg.norm(s[keys.FORCES].astype(np.float64), axis=1)
        found.force_counts += _counts(norms, FORCE_BINS)
        values["force"] = norms.max()
    edges, nearest = _neighbours(s, numbers, cutoff)
    values["edges"] = edges / len(numbers)
    nearest = nearest[np.isfinite(nearest)]
    if len(nearest):
        found.distance_counts += _counts(nearest, DISTANCE_BINS)
        values["distance"] = nearest.min()
    return values


def _counts(values: Floats, bins: Floats) -> NDArray[np.int64]:
    return np.histogram(np.clip(values, bins[0], bins[-1]), bins)[0].astype(np.int64)


def _neighbours(s: dict[str, Any], numbers: Ints, cutoff: float) -> tuple[int, Floats]:
    """Number of edges, and (N,) the distance of the nearest neighbour over the sum of covalent radii."""
    positions, cell = s[keys.POSITIONS].astype(np.float64), s[keys.CELL].astype(np.float64)
    (i, j), shifts = neighbour_list(positions, cell, s[keys.PBC], cutoff)
    vectors = positions[j] - positions[i] + shifts @ periodic_cell(cell, np.asarray(s[keys.PBC]))
    radii = covalent_radii[numbers]
    nearest = np.full(len(numbers), np.inf)
    np.minimum.at(nearest, i, np.linalg.norm(vectors, axis=1) / (radii[i] + radii[j]))
    return len(i), nearest
