"""Reference energies that a run keeps from the checkpoint that it begins with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from megagnn.data import keys
from megagnn.data.dataset import StructureDataset
from megagnn.models.statistics import Statistics


def kept_references(
    found: Statistics,
    old: Statistics,
    new_sources: Mapping[str, str],
    dataset: StructureDataset,
    where: str,
) -> Statistics:
    """Statistics whose sources have the references, and know the elements, of another model's sources.

    Elements that the old source lacks are fitted by least squares to what the kept ones leave over of the
    training energies.

    Args:
        found: of the new run, fitted; its elements are those of both models.
        old: of the checkpoint.
        new_sources: {new: old}; a source that is not named keeps those of the same name.
        where: name of the checkpoint.

    Raises:
        ValueError: a source that the checkpoint does not have.
    """
    rows, elements = [], []
    for index, name in enumerate(found.sources):
        old_name = new_sources.get(name, name)
        if old_name not in old.sources:
            raise ValueError(
                f"init.references is 'keep', but {where} has no source '{name}', it has "
                f'{", ".join(old.sources)}; name one by init.new_sources = {{"{name}" = '
                f'"{old.sources[0]}"}}, or set init.references = "fit"'
            )
        at = old.sources.index(old_name)
        kept = {z: old.references[at][old.elements.index(z)] for z in old.source_elements[at]}
        missing = [z for z in found.source_elements[index] if z not in kept]
        kept |= _fitted(missing, kept, dataset, index)
        rows.append(tuple(kept.get(z, 0.0) for z in found.elements))
        elements.append(tuple(sorted(kept)))
    return dataclasses.replace(found, references=tuple(rows), source_elements=tuple(elements))


def _fitted(
    missing: list[int], kept: Mapping[int, float], dataset: StructureDataset, source: int
) -> dict[int, float]:
    """{atomic number: eV} of elements that are not kept; per atom, so that large structures do not rule."""
    if not missing:
        return {}
    shares, energies = [], []
    for index in range(len(dataset)):
        record = dataset.record(index)
        if record[keys.SOURCE] != source or keys.ENERGY not in record:
            continue
        numbers = record[keys.ATOMIC_NUMBERS]
        left = record[keys.ENERGY] - sum(kept.get(int(z), 0.0) for z in numbers)
        shares.append([np.count_nonzero(numbers == z) / len(numbers) for z in missing])
        energies.append(left / len(numbers))
    if not energies:
        return dict.fromkeys(missing, 0.0)
    solution, *_ = np.linalg.lstsq(np.array(shares), np.array(energies), rcond=None)
    return dict(zip(missing, solution.tolist(), strict=True))
