"""Statistics of a training split that a model is built on: elements, references, scales; their fit."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from megagnn.data import keys
from megagnn.data.baseline import Baseline
from megagnn.data.dataset import StructureDataset
from megagnn.models.pair_fit import PairFit, fit_pairs


@dataclass(frozen=True)
class Statistics:
    """Constants of a model, fitted on the training split only; plain values, which JSON holds exactly."""

    elements: tuple[int, ...]
    """Atomic numbers that the training split holds, ascending."""
    sources: tuple[str, ...]
    """Names of the data sources, in the order of the index `source` of a batch."""
    levels: tuple[str, ...]
    """Names of the levels of theory, in the order of the index `level` of a batch."""
    source_elements: tuple[tuple[int, ...], ...]
    """Atomic numbers that each source holds: the others have no reference energy there."""
    source_levels: tuple[tuple[int, ...], ...]
    """Indices of the levels of theory that each source holds."""
    references: tuple[tuple[float, ...], ...]
    """Least-squares energy of each element in each source, eV, (num_sources, num_elements)."""
    mean_energy: tuple[float, ...]
    """Mean total energy per atom in each source, eV: the baseline that knows nothing of composition."""
    mean_neighbours: float
    """Mean number of edges per atom, A of docs/model.md."""
    output_scale: float
    """Unit of the network's outputs: root mean square of the training forces, eV/Å (or eV for energies)."""
    shifts: tuple[float, ...] = ()
    """Mean energy per atom in each source above references that are fixed, eV; 0 where they are fitted, and
    everywhere if empty (data/baseline.py)."""
    unspanned: tuple[tuple[tuple[float, ...], ...], ...] = ()
    """For each source, directions of composition of which the training energies tell nothing: orthonormal
    rows over `elements`; empty if there are none."""
    pair_weights: tuple[tuple[tuple[float, ...], ...], ...] = ()
    """Pair potentials: of each level of theory and pair of elements (pair_fit.py) the weights of splines, eV;
    of one level where it holds for all, and empty without them."""
    pair_constants: tuple[tuple[float, ...], ...] = ()
    """What they have subtracted for an atom of each element in each source, eV."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Statistics":
        return TypeAdapter(cls).validate_python(values)

    def baseline(self) -> tuple[tuple[float, ...], ...]:
        """Energy of an atom of each element in each source before the network, eV: reference and shift."""
        shifts = self.shifts or (0.0,) * len(self.sources)
        return tuple(
            tuple(energy + shift for energy in row)
            for row, shift in zip(self.references, shifts, strict=True)
        )

    def span_fault(self, numbers: Iterable[int], source_index: int) -> str:
        """Why the energy of a composition means little in a source, in words; empty if it means something.

        numbers: atomic numbers of the atoms, all of them known (see `check_elements`).
        """
        rows = self.unspanned[source_index] if self.unspanned else ()
        counts = Counter(int(z) for z in numbers)
        atoms = [counts[z] for z in self.elements]
        size = sum(n * n for n in atoms) ** 0.5
        offs = [abs(sum(a * b for a, b in zip(row, atoms, strict=True))) for row in rows]
        if not rows or max(offs) <= 1e-6 * size:
            return ""
        if len(rows) == len(self.source_elements[source_index]):
            return (
                f"the source '{self.sources[source_index]}' was trained without energies, so energies have "
                "no zero; only forces and differences at one composition mean something"
            )
        return (
            f"the training energies of the source '{self.sources[source_index]}' do not determine the "
            f"reference energies of {_symbols(sorted(counts))} apart, so the energy of this composition "
            "means little beside others; forces, and differences at one composition, are sound"
        )

    def check_elements(
        self, numbers: Iterable[int], source_index: int, where: str, way_out: str | None = None
    ) -> None:
        """Raises ValueError if an atomic number is not among the elements of a source.

        where: how the message calls what holds it. way_out: what it advises, instead of leaving it out.
        """
        known = self.source_elements[source_index]
        unknown = sorted({int(z) for z in numbers} - set(known))
        if unknown:
            raise ValueError(
                f"{where} holds {_symbols(unknown)}, which the model has never seen in the source "
                f"'{self.sources[source_index]}'; there it knows {_symbols(known)}: "
                f"{way_out or 'leave these structures out'}, or train on data with these elements"
            )

    def source_index(self, name: str | None) -> int:
        """Index of a source by name; None where there is only one. Raises ValueError listing them."""
        if name is None and len(self.sources) == 1:
            return 0
        if name not in self.sources:
            got = "none was given" if name is None else f"got '{name}'"
            raise ValueError(
                f"source must be one of the model's sources {list(self.sources)}, {got}: each has its own "
                "reference energies"
            )
        return self.sources.index(name)

    def level_index(self, name: str | None, source: str | None = None) -> int:
        """Index of a level of theory by name; None where `source` has only one."""
        indices = self.source_levels[self.source_index(source)]
        known = [self.levels[index] for index in indices]
        if name is None and len(known) == 1:
            return indices[0]
        if name not in known:
            got = "none was given" if name is None else f"got '{name}'"
            raise ValueError(f"level must be one of the source's levels of theory {known}, {got}")
        return self.levels.index(name)


def _symbols(numbers: Any) -> str:
    from ase.data import chemical_symbols

    return ", ".join(chemical_symbols[z] if z < len(chemical_symbols) else f"element {z}" for z in numbers)


ZERO_FORCES = (
    "all forces of the training structures are exactly 0, so they give no scale of the output (1 eV/Å in a "
    "new model); if they were never computed, prepare the data with --forces-key none and set "
    "loss.force_weight = 0"
)


def with_pairs_of(known: Statistics, found: Statistics) -> Statistics:
    """Statistics with the pair potentials of others, if they have any, and the output scale beside these."""
    if not known.pair_weights:
        return found
    return replace(
        found,
        output_scale=known.output_scale,
        pair_weights=known.pair_weights,
        pair_constants=known.pair_constants,
    )


def compute_statistics(
    dataset: StructureDataset,
    baseline: Baseline | None = None,
    told: list[str] | None = None,
    pair_splines: int = 0,
    by_level: bool = True,
) -> Statistics:
    """Elements, per-element references, mean number of neighbours and output scale of a training split.

    The output scale is the root mean square of the force components (Batatia et al., MACE, NeurIPS 2022), or,
    without forces, of the energies per atom that the references leave over; with pair potentials, of what
    these leave of them.

    Args:
        baseline: references and shifts, where they are known already: `dataset.baseline()`.
        told: what looks wrong in the labels is appended, in words.
        pair_splines: splines of pair potentials, which are fitted as well; 0 for none.
        by_level: pair potentials for each level of theory.
    """
    known = dataset.baseline() if baseline is None else baseline
    source_elements, energies = dataset.source_elements(), known.references + known.shifts[:, None]
    elements = np.unique(np.concatenate(source_elements))
    num_sources = len(dataset.sources)
    num_components, force_squares = dataset.force_squares()
    if told is not None and num_components and force_squares == 0:
        told.append(ZERO_FORCES)
    count, total, squares = np.zeros(num_sources), np.zeros(num_sources), 0.0
    source_levels: list[set[int]] = [set() for _ in range(num_sources)]
    for index in range(len(dataset)):
        record = dataset.record(index)
        source, numbers = record[keys.SOURCE], record[keys.ATOMIC_NUMBERS]
        source_levels[source].add(record[keys.LEVEL])
        if keys.ENERGY in record:
            count[source] += 1
            total[source] += record[keys.ENERGY] / len(numbers)
            squares += ((record[keys.ENERGY] - energies[source, numbers].sum()) / len(numbers)) ** 2
    scale = float(np.sqrt(force_squares / num_components if num_components else squares / count.sum()))
    pairs: PairFit | None = None
    if pair_splines:
        pairs = fit_pairs(dataset, elements, energies, pair_splines, by_level)
        scale = pairs.forces_left if num_components else pairs.energies_left
    return Statistics(
        elements=tuple(elements.tolist()),
        sources=dataset.sources,
        levels=dataset.levels,
        source_elements=tuple(tuple(found.tolist()) for found in source_elements),
        source_levels=tuple(tuple(sorted(found)) for found in source_levels),
        references=tuple(tuple(row[elements].tolist()) for row in known.references),
        mean_energy=tuple((total / np.maximum(count, 1)).tolist()),
        mean_neighbours=max(1.0, float(dataset.num_edges.sum() / dataset.num_atoms.sum())),
        output_scale=scale if scale > 0 else 1.0,
        shifts=tuple(known.shifts.tolist()),
        unspanned=tuple(tuple(map(tuple, rows[:, elements].tolist())) for rows in known.unspanned),
        pair_weights=tuple(tuple(map(tuple, rows)) for rows in pairs.weights.tolist()) if pairs else (),
        pair_constants=tuple(map(tuple, pairs.constants.tolist())) if pairs else (),
    )
