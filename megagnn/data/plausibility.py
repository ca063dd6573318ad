"""Whether labels can be what they are taken for: sizes, and agreement of energies, forces and stress.

A wrong unit or sign trains without a word, and the model is wrong by that factor. Faults are *sure* where no
data of this kind exist, or where the labels contradict each other by a clean factor; else they are
suspicions. The limits are such that right data pass: molecules by xTB and all-electron methods, slabs by EMT,
crystals and melts by DFT, at the most some eV/Å and tens of GPa.
"""

import math
from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megagnn.data.arrays import Floats, Ints
from megagnn.data.copies import Places
from megagnn.data.formats.groups import empirical_formula, symbols
from megagnn.data.formats.units import TOLERANCE, Units, explain_factor, explain_size
from megagnn.data.near_frames import NearFrames, Pair, Slope, least_absolute, slopes
from megagnn.data.record import Structure
from megagnn.data.references import all_electron_energy
from megagnn.data.samples import LONG, Lengths, TwoMethods

LARGE_STRESS, IMPOSSIBLE_STRESS = 1.0, 10.0
"""eV/Å^3, root mean square: 160 GPa is half the pressure in the Earth's core, 1600 GPa is in no data."""

IMPOSSIBLE_VIRIAL = 30.0
"""eV per atom, root mean square of stress times volume: a crystal has some 10 at 200 GPa, for it shrinks."""

LARGE_FORCE = 15.0
"""eV/Å, root mean square. Structures far from any equilibrium have 5; kcal/mol/Å make it 23 times larger."""

RIGHT_SLOPES = (0.5, 2.0)
"""Energies change as forces say within this factor, or something is wrong. The embedded and mlearn data lie
within 0.89 and 1.08; smearing, loose convergence and large steps spoil it by some tenths."""

BOHR_SLOPES = (1.75, 2.05)
"""Within the factor of two, but sharp: 1.89 is a length in bohr, mostly of forces in Ha/bohr beside energies
in Ha."""

CLEAR_ERRORS, CLEAR_PAIRS, CLEAR_MISFIT = 5.0, 20, 0.85
CLEAR_SLOPES, CLEAR_SLOPES_MISFIT = (0.25, 4.0), 0.6
"""Where strains and large steps spoil the fit, a factor is still wrong if it is negative by so many standard
deviations, or beyond these limits by size. Right data never have either."""

BOHR_LENGTHS = (0.4, 0.7)
"""The factor of energies in eV and forces in eV/Å beside lengths in bohr is 0.53; within these limits it is
sure where the distances say the same."""

UNEXPLAINED_ROOM = 0.4
"""Tolerance of the logarithm of the factor of energies per atom, where no other unit explains it."""

SURE_MISFIT, SHARP_MISFIT = 0.3, 0.12
"""Share of the energy differences that a factor leaves unexplained. Right data leave 0.04 to 0.14."""

MIN_PAIRS = 5

LOST_PAIRS, LOST_MISFIT, LOST_DISPLACEMENT, LOST_ENERGY = 20, 0.9, 0.1, 0.02
"""Energies that go with the forces in no way, over as many pairs of frames that are as near (Å) and should
differ by so much (eV, median), which is more than energies are rounded."""

OUTLIER, OUTLIER_TOTAL, OUTLIER_SPREADS = 3.0, 100.0, 30.0
"""An energy is told that is off by so many eV per atom, eV in total, and robust standard deviations."""

MIN_ZEROS = 3
"""Structures of energy 0, to the last digit, from which on that is no chance."""

MAX_ROWS = 20000
"""Structures from which energies of elements are estimated, for outliers."""

SHOWN = 3

ALL_ELECTRON_UNITS = ("Ha", "kcal/mol", "kJ/mol")
"""In which programs with all electrons write total energies."""


@dataclass(frozen=True)
class Fault:
    """Something wrong with labels, in words."""

    text: str
    sure: bool


class LabelCheck:
    """The labels of one source: `add` its structures in order, then `faults`.

    It keeps some numbers of each structure, and the positions of a bounded sample.

    Args:
        source: its name.
        declared: units that the user declared, quantity -> unit; the labels are converted already.
    """

    def __init__(self, source: str, declared: Mapping[str, str] | None = None) -> None:
        self.source = source
        self.declared = ",".join(f"{name}={unit}" for name, unit in (declared or {}).items())
        self._frames, self._lengths, self._methods = NearFrames(), Lengths(), TwoMethods()
        self._forces, self._stress = _Squares(), _Squares()
        self._virial = _Squares()
        self._compositions: dict[tuple[bytes, bytes, tuple[float, int]], int] = {}
        self._energies, self._indices = array("d"), array("q")
        self._places = Places()

    def add(self, structure: Structure, file: str, frame: int) -> None:
        """One structure that is no isolated atom, and where it comes from."""
        s = structure
        self._frames.add(s)
        self._lengths.add(s)
        self._methods.add(s, file, frame)
        if s.forces is not None:
            self._forces.add(s.forces)
        if s.stress is not None:
            self._stress.add(s.stress)
            self._virial.add(s.stress * abs(np.linalg.det(s.cell)) / s.num_atoms)
        if s.energy is not None:
            elements, counts = np.unique(np.asarray(s.atomic_numbers, np.uint8), return_counts=True)
            composition = (elements.tobytes(), counts.astype(np.int32).tobytes(), s.electronic_state)
            self._indices.append(self._compositions.setdefault(composition, len(self._compositions)))
            self._energies.append(float(s.energy))
            self._places.add(file, frame)

    def faults(self) -> list[Fault]:
        """What is wrong, the sure faults first."""
        found = [*self._absent(), *self._sizes(), *self._differences(), *self._totals(), *self._outliers()]
        found += self._states()
        found += [Fault(text, False) for text in [*self._lengths.told(), *self._methods.told()]]
        doubt = f"; declared: {self.declared}, perhaps that is what is wrong" if self.declared else ""
        told = []
        for fault in found:
            text = fault.text + (doubt if "--units" in fault.text else "")
            told.append(Fault(f"{self.source}: {text}", fault.sure))
        return sorted(told, key=lambda fault: not fault.sure)

    def _absent(self) -> Iterator[Fault]:
        """Energies of 0 that a program wrote because it had none, as converters of LAMMPS dumps do."""
        count = len(self._energies)
        if count >= MIN_ZEROS and self._forces.rms != 0.0 and not np.any(self._energies):
            text = f"all {count:,} energies are 0 while the forces are not: the file has no energies"
            yield Fault(f"{text}; leave them out with --energy-key none", True)

    def _sizes(self) -> Iterator[Fault]:
        stress, forces = self._stress.rms, self._forces.rms
        if stress > LARGE_STRESS:
            names = explain_size(stress, "stress", 0.3)
            units = " or ".join(f"--units stress={name}" for name in names)
            yield Fault(
                f"the stress is {stress:.3g} eV/Å^3 (root mean square), {160 * stress:.3g} GPa"
                + (f"; declare its unit, perhaps {units}" if units else "")
                + "; virials (eV) are named by --virial-key; --stress-key none leaves it out",
                sure=stress > IMPOSSIBLE_STRESS or self._virial.rms > IMPOSSIBLE_VIRIAL,
            )
        if forces > LARGE_FORCE:
            names = explain_size(forces, "forces", LARGE_FORCE)
            units = " or ".join(f"--units forces={name}" for name in names)
            yield Fault(
                f"the forces are {forces:.3g} eV/Å (root mean square), far more than of thermal motion; "
                f"check their unit{', perhaps ' + units if units else ''}",
                sure=False,
            )

    def _differences(self) -> Iterator[Fault]:
        """Energies against forces and stress of near frames."""
        pairs = self._frames.pairs()
        of_forces, of_stress = slopes(pairs)
        if of_forces is not None:
            yield from self._of_forces(of_forces, pairs)
        if of_stress is not None and _is_wrong(of_stress):
            virial = slopes(pairs, per="volume")[1]
            if virial is not None and _is_clean(virial) and 0.7 < abs(virial.value) < 1.4:
                sign = "" if virial.value < 0 else "-"
                way = f"--stress-key none --virial-key KEY{' --units virial=-eV' if sign else ''}"
                reason = f"as if it were the {sign}virial, in eV: read it by {way}"
            else:
                texts = explain_factor(of_stress.value, "stress", self._stress.rms, _room(of_stress))
                reason = self._reason(_per_atom_first(texts, pairs, 1))
            yield Fault(
                f"energies change with the cell {of_stress.value:.3g} times as the stress says "
                f"({of_stress.num_pairs} pairs of near frames), {reason}",
                sure=True,
            )

    def _of_forces(self, slope: Slope, pairs: list[Pair]) -> Iterator[Fault]:
        if _is_wrong(slope) or self._is_bohr(slope):
            texts = explain_factor(slope.value, "forces", self._forces.rms, _room(slope))
            if self._is_bohr(slope):
                texts = ["length=bohr", *texts]
            yield Fault(
                f"energies change {slope.value:.3g} times as the forces say ({slope.num_pairs} pairs of near "
                f"frames), {self._reason(_per_atom_first(texts, pairs, 0))}",
                sure=True,
            )
            return
        near = [pair for pair in pairs if pair.displacement < LOST_DISPLACEMENT and pair.of_forces]
        if len(near) < LOST_PAIRS or np.median([abs(pair.of_forces) for pair in near]) <= LOST_ENERGY:
            return
        lost = slopes(near)[0]
        if lost is not None and lost.misfit > LOST_MISFIT and abs(lost.value) < RIGHT_SLOPES[0]:
            yield Fault(
                f"energies of {len(near)} pairs of near frames do not change as the forces say; check that "
                "energies and forces are of one calculation, that energies do not hold the kinetic energy, "
                "and that atoms are in one order",
                sure=False,
            )

    def _is_bohr(self, slope: Slope) -> bool:
        """Whether the factor is that of lengths in bohr beside forces per Å, and distances say so, too."""
        within = BOHR_LENGTHS[0] < slope.value < BOHR_LENGTHS[1]
        return within and self._lengths.ratio > LONG and slope.misfit < CLEAR_SLOPES_MISFIT

    def _reason(self, texts: list[str]) -> str:
        if self.declared:
            return f"though units are declared ({self.declared}): perhaps they are what is wrong"
        if not texts:
            return "so the unit or the sign of one of them is wrong; declare it (--units)"
        return f"as with other units: declare them, perhaps --units {' or --units '.join(texts)}"

    def _totals(self) -> Iterator[Fault]:
        """Energies against those of all electrons, which are known to some per cent."""
        if not self._energies:
            return
        counts = self._counts()
        medians = _medians(np.array(self._energies), np.array(self._indices))
        yield from _per_atom(medians, counts)
        light = [k for k, c in enumerate(counts) if np.flatnonzero(c).max() <= 36 and c[3:].any()]
        if not light:
            return
        ratios = medians[light] / (counts[light] @ all_electron_energy(np.arange(119)))
        middle = float(np.median(ratios))
        formulas = {empirical_formula(np.repeat(np.arange(119), counts[k])) for k in light}
        for name in ALL_ELECTRON_UNITS:
            off = np.abs(ratios * Units({"energy": name}).factor("energy") - 1)
            if np.median(off) < 0.03 and off.max() < 0.08:
                text = f"energies are those of all electrons in {name}, within {100 * np.median(off):.1f} %"
                yield Fault(f"{text}: declare it, --units energy={name}", len(formulas) >= 3 or middle > 2)
                return
        if middle > 2:
            text = f"energies are {middle:.3g} times those of all electrons of the atoms; check their unit"
            yield Fault(text, True)

    def _outliers(self) -> Iterator[Fault]:
        """Single energies far from those of the same composition and elements."""
        if len(self._energies) < 10:
            return
        energies, indices = np.array(self._energies), np.array(self._indices)
        counts = self._counts()
        sizes = counts.sum(axis=1)[indices]
        residual = energies / sizes - _robust_elements(energies, indices, counts)
        of_many = np.bincount(indices) >= 5
        residual -= np.where(of_many, _medians(residual, indices), 0.0)[indices]
        spread = 1.4826 * float(np.median(np.abs(residual)))
        far = np.abs(residual) > np.maximum(OUTLIER, OUTLIER_SPREADS * spread)
        rows = np.flatnonzero(far & (np.abs(residual) * sizes > OUTLIER_TOTAL))
        if not len(rows) or len(rows) > 0.1 * len(residual):
            return
        worst = rows[np.argsort(-np.abs(residual[rows] * sizes[rows]))][:SHOWN]
        shown = "; ".join(f"{self._places.name(k)} by {residual[k] * sizes[k]:.4g} eV" for k in worst)
        text = f"{len(rows)} of {len(residual):,} energies are far off the others: {shown}"
        more = "; ..." if len(rows) > SHOWN else ""
        yield Fault(f"{text}{more}. Leave them out, or mend them", False)

    def _states(self) -> Iterator[Fault]:
        """Compositions with several charges or multiplicities, which no model here tells apart."""
        states: dict[tuple[bytes, bytes], list[tuple[float, int]]] = {}
        for elements, counts, state in self._compositions:
            states.setdefault((elements, counts), []).append(state)
        several = {composition: found for composition, found in states.items() if len(found) > 1}
        if not several:
            return
        (elements, counts), found = next(iter(several.items()))
        numbers = np.repeat(np.frombuffer(elements, np.uint8), np.frombuffer(counts, np.int32))
        shown = " and ".join(f"charge {charge:g}, multiplicity {spin}" for charge, spin in sorted(found)[:2])
        yield Fault(
            f"{len(several):,} of {len(states):,} compositions come with several charges or multiplicities, "
            f"such as {symbols(numbers)} with {shown}; the model reads neither, so that one input has "
            "several labels: keep one of them, or keep them apart as sources (NAME=FILE)",
            False,
        )

    def _counts(self) -> NDArray[np.int32]:
        """(C, 119) atoms of each element in each composition, one for each charge and spin."""
        found = np.zeros((len(self._compositions), 119), dtype=np.int32)
        for row, (elements, counts, _) in zip(found, self._compositions, strict=True):
            row[np.frombuffer(elements, np.uint8)] = np.frombuffer(counts, np.int32)
        return found


class _Squares:
    def __init__(self) -> None:
        self.count, self.total = 0, 0.0

    def add(self, values: Floats) -> None:
        self.count, self.total = self.count + values.size, self.total + float(np.square(values).sum())

    @property
    def rms(self) -> float:
        return math.sqrt(self.total / self.count) if self.count else 0.0


def _per_atom(medians: Floats, counts: NDArray[np.int32]) -> Iterator[Fault]:
    """Cells of one formula and different sizes that have one energy."""
    by_formula: dict[str, list[int]] = defaultdict(list)
    for k, count in enumerate(counts):
        by_formula[empirical_formula(np.repeat(np.arange(119), count))].append(k)
    alike = different = 0
    for rows in by_formula.values():
        sizes = counts[rows].sum(axis=1)
        for a in range(1, len(rows)):
            if max(sizes[a], sizes[0]) >= 1.5 * min(sizes[a], sizes[0]):
                one, other = medians[rows[0]], medians[rows[a]]
                same = abs(one - other) < 0.05 * abs(one) and abs(one) > 0.5
                alike, different = alike + same, different + (not same)
    if alike > different:
        text = "cells of one formula and different sizes have one energy, as if it were per atom"
        yield Fault(f"{text}; declare it, --units energy=eV/atom", False)


def _is_clean(slope: Slope) -> bool:
    return slope.num_pairs >= MIN_PAIRS and slope.misfit < SURE_MISFIT


def _is_wrong(slope: Slope) -> bool:
    """A factor that is surely not one."""
    if not _is_clean(slope):
        return _is_clear(slope)
    sharp = slope.misfit < SHARP_MISFIT and BOHR_SLOPES[0] < slope.value < BOHR_SLOPES[1]
    return sharp or not RIGHT_SLOPES[0] <= slope.value <= RIGHT_SLOPES[1]


def _is_clear(slope: Slope) -> bool:
    """A wrong factor whatever the misfit: negative, or far from one, by many standard deviations."""
    if slope.num_pairs < CLEAR_PAIRS or abs(slope.value) < CLEAR_ERRORS * slope.error:
        return False
    if slope.value < 0:
        return slope.misfit < CLEAR_MISFIT
    return slope.misfit < CLEAR_SLOPES_MISFIT and not CLEAR_SLOPES[0] <= slope.value <= CLEAR_SLOPES[1]


def _room(slope: Slope) -> float:
    """By how much the logarithm of a factor may be off that of a unit."""
    return max(TOLERANCE, 0.7 * slope.misfit) if not _is_clean(slope) else TOLERANCE


def _per_atom_first(texts: list[str], pairs: list[Pair], which: int) -> list[str]:
    """Units that explain a factor, of forces (0) or stress (1); energies per atom first, where they do."""
    slope = slopes(pairs, per="atom")[which]
    if slope is None or min(pair.num_atoms for pair in pairs) <= 2:
        return texts
    room = _room(slope) + 0.08 if texts else UNEXPLAINED_ROOM
    return ["energy=eV/atom", *texts] if abs(math.log(max(slope.value, 1e-9))) < room else texts


def _medians(values: Floats, indices: Ints) -> Floats:
    """(C,) median of the values of each index; every index of 0..C - 1 has some."""
    order = np.lexsort((values, indices))
    lengths = np.bincount(indices)
    starts = np.cumsum(lengths) - lengths
    low, high = values[order[starts + (lengths - 1) // 2]], values[order[starts + lengths // 2]]
    return (low + high) / 2


def _robust_elements(energies: Floats, indices: Ints, counts: NDArray[np.int32]) -> Floats:
    """(S,) energy per atom of elements by least absolute deviations, which outliers do not disturb."""
    present = np.flatnonzero(counts.sum(axis=0))
    sizes = counts.sum(axis=1)
    rows = np.arange(0, len(indices), max(1, len(indices) // MAX_ROWS))
    chosen = indices[rows]
    shares = counts[np.ix_(chosen, present)] / sizes[chosen, None]
    values = energies[rows] / sizes[chosen]
    found, _ = least_absolute(shares, values, floor=1e-3)
    return (counts[:, present] @ found / sizes)[indices]
