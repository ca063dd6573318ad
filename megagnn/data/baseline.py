"""What is known of energies before training: reference energies, given, of isolated atoms or fitted.

Where references are fixed, all energies of bonds lie on one side of them, some eV per atom below. A network
that begins near zero would first have to learn that constant, so each source has a *shift* per atom, as in
MACE (Batatia et al., NeurIPS 2022, scale and shift). Fitted references hold it already.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from ase.data import atomic_numbers, chemical_symbols
from numpy.typing import NDArray

from megagnn.data import keys
from megagnn.data.arrays import Bools, Floats, Ints
from megagnn.data.reference_file import References, absurd_references
from megagnn.data.references import NUM_ELEMENTS, ReferenceFit, blocks, fit_references
from megagnn.data.store import Store

Part = tuple[Store, Ints, Ints]
"""A store, the structures of it that count, and the number of each of its sources among all sources."""

SAME_ATOM_ENERGY = 0.01
"""eV. Energies of one isolated atom that differ by more are not of one method, or not of one spin."""


@dataclass(frozen=True)
class Baseline:
    """Energies known before training.

    Attributes:
        references: (num_sources, 119) float64, eV.
        shifts: (num_sources,) eV per atom, to be added to the references; exactly 0 where all are fitted.
        unspanned: see `ReferenceFit`.
        fixed: (num_sources, 119) bool, which references are not fitted.
        isolated: one bool array for each part, which of its structures are isolated atoms.
        told: what a user should know of them, in words.
    """

    references: Floats
    shifts: Floats
    unspanned: tuple[Floats, ...]
    fixed: Bools
    isolated: tuple[Bools, ...]
    told: tuple[str, ...]


def fit_baseline(
    parts: Sequence[Part],
    sources: Sequence[str],
    given: References | None = None,
    isolated: Sequence[Bools] | None = None,
) -> Baseline:
    """References of training structures: those given first, then those of isolated atoms; the rest fitted.

    Args:
        parts: training structures only.
        sources: names of all sources.
        given: references by source; those in the headers of the stores are added by `given_references`.
        isolated: (S_store,) for each part, which structures of its store are isolated atoms; sought if not
            given.

    Raises:
        ValueError: see `fit_references`.
    """
    alone = [store.isolated_atoms() for store, *_ in parts] if isolated is None else isolated
    rows = [_Rows(*part, found) for part, found in zip(parts, alone, strict=True)]
    elements = elements_of(parts, len(sources))
    fixed = np.full((len(sources), NUM_ELEMENTS), np.nan)
    told: list[str] = []
    for index, source in enumerate(sources):
        of_atoms = _isolated_energies(rows, index)
        row = dict((given or {}).get(source, {}))
        told += _told_of_fixed(source, row, of_atoms, elements[index])
        fixed[index, [*of_atoms]] = [min(energies) for energies in of_atoms.values()]
        fixed[index, [atomic_numbers[symbol] for symbol in row]] = list(row.values())
    numbers = np.concatenate([part.numbers(part.fitted) for part in rows])
    lengths = np.concatenate([part.store.num_atoms[part.fitted] for part in rows])
    energies = np.concatenate([part.store.arrays["energy"][part.fitted] for part in rows])
    of_source = np.concatenate([part.source_of(part.fitted) for part in rows])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    fit = fit_references(numbers, offsets, energies, of_source, len(sources), fixed=fixed, elements=elements)
    is_fixed = np.zeros_like(fixed, dtype=np.bool_)
    shifts = np.zeros(len(sources))
    summed = sum_over_atoms(fit.energies, numbers, offsets, of_source)
    for index, source in enumerate(sources):
        is_fixed[index, elements[index]] = ~np.isnan(fixed[index, elements[index]])
        mine = of_source == index
        if is_fixed[index].any() and mine.any():
            shifts[index] = np.mean((energies[mine] - summed[mine]) / lengths[mine])
        told += _told_of_open(source, fit, index, bool(mine.any()), elements[index])
    isolated = tuple(part.isolated for part in rows)
    return Baseline(fit.energies, shifts, fit.unspanned, is_fixed, isolated, tuple(told))


def given_references(stores: Sequence[Store], own: Mapping[str, Mapping[str, float]] | None) -> References:
    """Reference energies by source: those in the headers of stores, and before them a user's own.

    Raises:
        ValueError: two stores give one element of one source two energies, and the user none.
    """
    found: References = {source: dict(row) for source, row in (own or {}).items()}
    origin: dict[tuple[str, str], Store] = {}
    for store in stores:
        for source, row in store.header.references.items():
            mine = found.setdefault(source, {})
            for symbol, energy in row.items():
                other = origin.get((source, symbol))
                if other is not None and abs(mine[symbol] - energy) > SAME_ATOM_ENERGY:
                    raise ValueError(
                        f"the reference energy of {symbol} in source {source!r} is {mine[symbol]:g} eV in "
                        f"{other.path} and {energy:g} eV in {store.path}; prepare them with one "
                        "(--reference-energies), or as two sources"
                    )
                if symbol not in mine:
                    mine[symbol], origin[source, symbol] = energy, store
    return found


class _Rows:
    """The training structures of one store: which are isolated atoms, and which enter the fit."""

    def __init__(self, store: Store, chosen: Ints, numbers: Ints, alone: Bools) -> None:
        self.store, self._numbers = store, numbers
        self.isolated: Bools = alone[chosen]
        labelled = store.labelled(keys.ENERGY, chosen)
        self.fitted, self.atoms = labelled[~alone[labelled]], labelled[alone[labelled]]

    def source_of(self, rows: Ints) -> Ints:
        return self._numbers[self.store.source[rows]]

    def numbers(self, rows: Ints) -> NDArray[np.uint8]:
        """Atomic numbers of structures, one after the other; in blocks, for an index is of 8 bytes."""
        found = [self.store.of_atoms("atomic_numbers", rows[block]) for block in blocks(len(rows))]
        return np.concatenate([np.zeros(0, dtype=np.uint8), *found])


def elements_of(parts: Sequence[Part], num_sources: int) -> list[Ints]:
    """Atomic numbers that the structures of each source hold, ascending."""
    seen = np.zeros((num_sources, NUM_ELEMENTS), dtype=np.bool_)
    for store, chosen, numbers in parts:
        for rows in blocks(len(chosen)):
            source = np.repeat(numbers[store.source[chosen[rows]]], store.num_atoms[chosen[rows]])
            seen[source, store.of_atoms("atomic_numbers", chosen[rows])] = True
    return [np.flatnonzero(row) for row in seen]


def sum_over_atoms(references: Floats, numbers: NDArray[np.uint8], offsets: Ints, sources: Ints) -> Floats:
    """(S,) sum of reference energies (num_sources, 119) over the atoms of each structure, eV."""
    found = [np.zeros(0)]
    for block in blocks(len(sources)):
        lengths = np.diff(offsets[block.start : block.stop + 1])
        atoms = slice(offsets[block.start], offsets[block.stop])
        energies = references[np.repeat(sources[block], lengths), numbers[atoms]]
        rows = np.repeat(np.arange(len(lengths)), lengths)
        found.append(np.bincount(rows, energies, minlength=len(lengths)).astype(np.float64))
    return np.concatenate(found)


def _isolated_energies(rows: Sequence[_Rows], source: int) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for part in rows:
        mine = part.atoms[part.source_of(part.atoms) == source]
        for z, energy in zip(part.numbers(mine).tolist(), part.store.arrays["energy"][mine], strict=True):
            found.setdefault(z, []).append(float(energy))
    return found


def _told_of_fixed(
    source: str, given: dict[str, float], of_atoms: dict[int, list[float]], elements: Ints
) -> Iterator[str]:
    for z, energies in sorted(of_atoms.items()):
        symbol = chemical_symbols[z]
        if max(energies) - min(energies) > SAME_ATOM_ENERGY:
            yield (
                f"{source}: isolated atoms of {symbol} have energies from {min(energies):.6g} to "
                f"{max(energies):.6g} eV; the lowest is taken for the reference"
            )
        if symbol in given and abs(given[symbol] - min(energies)) > SAME_ATOM_ENERGY:
            yield (
                f"{source}: the reference energy given for {symbol}, {given[symbol]:.6g} eV, is not that of "
                f"its isolated atom, {min(energies):.6g} eV; the one given is taken"
            )
    missing = [
        chemical_symbols[z] for z in elements if chemical_symbols[z] not in given and z not in of_atoms
    ]
    if given and missing:
        yield f"{source}: reference energies are given, but none for {', '.join(missing)}, which are fitted"
    present = {s: e for s, e in given.items() if atomic_numbers[s] in elements}
    alone = {chemical_symbols[z]: min(e) for z, e in of_atoms.items() if chemical_symbols[z] not in given}
    for symbol, energy in absurd_references({**alone, **present}).items():
        yield (
            f"{source}: the reference energy of {symbol}, {energy:.6g} eV, is not that of any atom; check "
            "its unit"
        )


def _told_of_open(
    source: str, fit: ReferenceFit, index: int, has_energies: bool, elements: Ints
) -> Iterator[str]:
    directions = fit.unspanned[index]
    if not len(directions):
        return
    if not has_energies and len(directions) == len(elements):
        yield f"{source}: no training structure has an energy, so the energies of a model are without a zero"
        return
    symbols = ", ".join(chemical_symbols[z] for z in np.flatnonzero(np.abs(directions).max(axis=0) > 1e-8))
    yield (
        f"{source}: the energies do not determine the reference energies of {symbols}, which come in one "
        "proportion only or without energy; values of usual size are taken, and energies of other "
        "compositions mean little. Give reference energies (--reference-energies FILE) or isolated atoms"
    )
