"""Pairs of near frames: whether energies change as forces and stresses say.

Between two structures of the same atoms, charge and spin that differ by displacements dx and a strain e, the
energy changes by

    dE = -sum(F . dx) + V (stress : e),

with forces, stress and volume taken as the mean of both ends (the trapezoid rule, exact for quadratic
energies). A unit or a sign that is wrong in one of the three shows as a factor, whatever the sizes. Where
cells differ and no stress is known, the second term is a fitted function of the volume instead.
"""

from dataclasses import dataclass

import numpy as np

from megagnn.data.arrays import Floats
from megagnn.data.record import Structure

MAX_DISPLACEMENT = 0.5
"""Å. Thermal displacements are half of it; beyond, energies are no longer near quadratic."""

MAX_STRAIN = 0.06
MIN_STRAIN = 1e-5
"""Below, the cell is the same but for rounding."""

STRAIN_LENGTH = 30.0
"""Å. Of pairs the one is nearest whose displacement plus this times its strain is least: a strain of 1 %
spoils the trapezoid rule about as much as 0.3 Å do."""

MIN_KNOWN = 20
"""Pairs that need no fitted function of the volume, from which on the others are left out."""

FOLDS = 10
"""Parts of the pairs, each of which is left out once for the error of a factor."""

MAX_PAIRS = 2000
MAX_SAMPLE = 300
MAX_ATOMS = 512
"""Bounds of time and memory: of pairs of consecutive frames, of the frames among which nearest ones are
looked for, and of the atoms of such a frame."""


@dataclass(frozen=True)
class Pair:
    """The energy difference of two near frames and what it should be.

    Attributes:
        energy: eV, as labelled.
        of_forces, of_stress: eV, what forces and stress say; 0 where nothing moved.
        num_atoms, volume: of the structure; volume in Å^3, 0 without one.
        displacement: Å, largest of an atom.
        strain: the largest component.
        growth: change of the volume over the mean one, of a pair whose cells differ without a stress; else 0.
        species: atomic numbers, as bytes.
    """

    energy: float
    of_forces: float
    of_stress: float
    num_atoms: int
    volume: float
    displacement: float
    strain: float = 0.0
    growth: float = 0.0
    species: bytes = b""

    @property
    def distance(self) -> float:
        """Å, by how much the trapezoid rule may err."""
        return self.displacement + STRAIN_LENGTH * self.strain


class NearFrames:
    """Collects pairs: consecutive frames as they come, and nearest ones among the first frames."""

    def __init__(self) -> None:
        self._last: Structure | None = None
        self._sample: dict[bytes, list[Structure]] = {}
        self._num_sampled = 0
        self._pairs: list[Pair] = []

    def add(self, structure: Structure) -> None:
        """One structure, in the order of the file; without an energy it tells nothing."""
        if structure.energy is None or structure.num_atoms > MAX_ATOMS:
            self._last = None
            return
        if self._last is not None and len(self._pairs) < MAX_PAIRS:
            found = pair_of(self._last, structure)
            self._pairs += [found] if found else []
        self._last = structure
        if self._num_sampled < MAX_SAMPLE:
            key = np.asarray(structure.atomic_numbers, dtype=np.uint8).tobytes()
            self._sample.setdefault(key, []).append(structure)
            self._num_sampled += 1

    def pairs(self) -> list[Pair]:
        """Those of consecutive frames; where they are few, nearest frames of the sample, too."""
        if len(self._pairs) >= MAX_SAMPLE // 2:
            return self._pairs
        found = list(self._pairs)
        for frames in self._sample.values():
            for index, structure in enumerate(frames[:-1]):
                candidates = [pair_of(structure, other) for other in frames[index + 2 : index + 40]]
                near = [pair for pair in candidates if pair is not None]
                if near:
                    found.append(min(near, key=lambda pair: pair.distance))
        return found


def pair_of(a: Structure, b: Structure) -> Pair | None:
    """What labels of two structures say of their energy difference; None if they are not near, or equal."""
    if a.num_atoms != b.num_atoms or not np.array_equal(a.pbc, b.pbc):
        return None
    if not np.array_equal(a.atomic_numbers, b.atomic_numbers) or a.energy is None or b.energy is None:
        return None
    if a.electronic_state != b.electronic_state:
        return None
    moved, strain = b.positions - a.positions, np.zeros((3, 3))
    volume = 0.0
    if np.any(a.pbc):
        if not np.all(a.pbc):  # of slabs and chains: only within one cell, where images are seldom crossed
            if np.abs(a.cell - b.cell).max() > MIN_STRAIN:
                return None
        else:
            strain = np.linalg.solve(a.cell, b.cell) - np.eye(3)
            if np.abs(strain).max() > MAX_STRAIN:
                return None
            fractions = b.positions @ np.linalg.inv(b.cell) - a.positions @ np.linalg.inv(a.cell)
            moved = (fractions - np.round(fractions)) @ ((a.cell + b.cell) / 2)
            volume = float(abs(np.linalg.det(a.cell)) + abs(np.linalg.det(b.cell))) / 2
    displacement = float(np.linalg.norm(moved, axis=1).max())
    strained = float(np.abs(strain).max()) > MIN_STRAIN
    if displacement > MAX_DISPLACEMENT or (displacement < 1e-4 and not strained):
        return None
    of_forces = of_stress = 0.0
    if displacement >= 1e-4:
        if a.forces is None or b.forces is None:
            return None
        of_forces = -float(((a.forces + b.forces) / 2 * moved).sum())
    growth = 0.0
    if strained and (a.stress is None or b.stress is None):
        growth = float(abs(np.linalg.det(b.cell)) - abs(np.linalg.det(a.cell))) / volume
        if displacement < 1e-4 or not growth:
            return None
    elif strained:
        assert a.stress is not None
        assert b.stress is not None
        # strain about the middle of the two cells, so that the rule is symmetric in them
        middle = np.linalg.solve((a.cell + b.cell) / 2, b.cell - a.cell)
        of_stress = volume * float(((a.stress + b.stress) / 2 * (middle + middle.T) / 2).sum())
    return Pair(
        b.energy - a.energy,
        of_forces,
        of_stress,
        a.num_atoms,
        volume,
        displacement,
        float(np.abs(strain).max()),
        growth,
        a.atomic_numbers.tobytes(),
    )


@dataclass(frozen=True)
class Slope:
    """How energies change against what labels say: 1 is right, -1 the wrong sign.

    Attributes:
        value: the factor.
        misfit: median of what is left over the median without it: small is sure.
        num_pairs: of frames.
        error: standard deviation of the factor.
    """

    value: float
    misfit: float
    num_pairs: int
    error: float = 0.0


def slopes(pairs: list[Pair], per: str = "") -> tuple[Slope | None, Slope | None]:
    """Slopes of forces and of stress, by least absolute deviations, which single bad frames do not disturb.

    Pairs whose cells differ without a stress take part where others are few: their energies may change with
    the volume, linearly and quadratically, in whatever way fits.

    Args:
        per: "atom" or "volume" divides what labels say by the number of atoms or the volume, for energies per
            atom and virials.

    Returns:
        None where no pair tells.
    """
    known = [pair for pair in pairs if not pair.growth]
    if sum(pair.of_forces != 0 for pair in known) >= MIN_KNOWN:
        pairs = known
    if not pairs:
        return None, None
    energy = np.array([pair.energy for pair in pairs])
    divisor = np.ones(len(pairs))
    if per == "atom":
        divisor = np.array([pair.num_atoms for pair in pairs], dtype=np.float64)
    forces = np.array([pair.of_forces for pair in pairs]) / divisor
    stress = np.array([pair.of_stress for pair in pairs]) / divisor
    if per == "volume":
        stress = stress / np.array([pair.volume or 1.0 for pair in pairs])
    columns = np.stack([forces, stress, *_of_volume(pairs)], axis=1)
    used = [k for k in range(columns.shape[1]) if np.count_nonzero(columns[:, k]) >= 3]
    result: list[Slope | None] = [None, None]
    if not used:
        return None, None
    found, residual = least_absolute(columns[:, used], energy)
    for k in {0, 1} & set(used):
        position, without = used.index(k), energy
        if len(used) > 1:
            without = least_absolute(columns[:, [j for j in used if j != k]], energy)[1]
        rows = columns[:, k] != 0
        scale = float(np.median(np.abs(without[rows])))
        if scale > 0:
            misfit = float(np.median(np.abs(residual[rows]))) / scale
            error = _jackknife(columns[:, used], energy, position)
            result[k] = Slope(float(found[position]), misfit, int(rows.sum()), error)
    return result[0], result[1]


def _of_volume(pairs: list[Pair]) -> list[Floats]:
    """Columns for pairs without a stress: the growth of the volume, and that times how large it is."""
    growth = np.array([pair.growth * pair.num_atoms for pair in pairs])
    if not growth.any():
        return []
    size = np.ones(len(pairs))
    of_species: dict[bytes, list[int]] = {}
    for index, pair in enumerate(pairs):
        of_species.setdefault(pair.species, []).append(index)
    for rows in of_species.values():
        volumes = np.array([pairs[k].volume for k in rows])
        size[rows] = volumes / (np.median(volumes) or 1.0)
    return [growth, growth * (size - 1)]


def _jackknife(columns: Floats, values: Floats, position: int) -> float:
    """Standard deviation of one coefficient, by leaving out every tenth pair in turn (jackknife)."""
    if len(values) < FOLDS + columns.shape[1]:
        return float("inf")
    folds = np.arange(len(values)) % FOLDS
    found = [least_absolute(columns[folds != k], values[folds != k])[0][position] for k in range(FOLDS)]
    return float(np.std(found) * np.sqrt(FOLDS - 1))


def least_absolute(columns: Floats, values: Floats, floor: float | None = None) -> tuple[Floats, Floats]:
    """Coefficients of the smallest sum of absolute residuals, by reweighted least squares; and residuals.

    Args:
        columns: (S, k); values: (S,).
        floor: smaller residuals weigh as if they were of this size; 1e-6 of the median if not given.
    """
    sizes = np.median(np.abs(columns), axis=0)
    sizes = np.where(sizes > 0, sizes, np.abs(columns).max(axis=0))
    sizes = np.where(sizes > 0, sizes, 1.0)
    scaled = columns / sizes
    if floor is None:
        floor = 1e-6 * float(np.median(np.abs(values))) + 1e-12
    weights = 1.0 / np.maximum(np.abs(values), floor)  # large differences would rule the first guess
    found = np.zeros(columns.shape[1])
    for _ in range(60):
        root = np.sqrt(weights)[:, None]
        before, (found, *_) = found, np.linalg.lstsq(scaled * root, values * root[:, 0], rcond=None)
        if np.allclose(found, before, rtol=1e-4, atol=0):
            break
        weights = 1.0 / np.maximum(np.abs(values - scaled @ found), floor)
    return found / sizes, values - scaled @ found
