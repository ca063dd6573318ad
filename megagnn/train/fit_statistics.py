"""Fitting the statistics of a training split: what `models.statistics.Statistics` holds."""

import numpy as np

from megagnn.data import keys
from megagnn.data.baseline import Baseline
from megagnn.data.dataset import StructureDataset
from megagnn.models.statistics import Statistics

ZERO_FORCES = (
    "all forces of the training structures are exactly 0, so they give no scale of the output (1 eV/Å in a "
    "new model); if they were never computed, prepare the data with --forces-key none and set "
    "loss.force_weight = 0"
)


def compute_statistics(
    dataset: StructureDataset, baseline: Baseline | None = None, told: list[str] | None = None
) -> Statistics:
    """Elements, per-element references, mean number of neighbours and output scale of a training split.

    The output scale is the root mean square of the force components (Batatia et al., MACE, NeurIPS 2022), or,
    without forces, of the energies per atom that the references leave over.

    Args:
        baseline: references and shifts, where they are known already: `dataset.baseline()`.
        told: what looks wrong in the labels is appended, in words.
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
    )
