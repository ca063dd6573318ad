"""Reference energies that a run keeps from the checkpoint that it begins with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from ase.data import chemical_symbols

from megagnn.data.reference_file import References
from megagnn.models.statistics import Statistics


def known_references(
    old: Statistics, sources: Sequence[str], new_sources: Mapping[str, str], where: str
) -> References:
    """What another model adds for an atom of each element that its source knows, for each of these sources.

    Args:
        old: of the checkpoint.
        sources: of the training data.
        new_sources: {new: old}; a source that is not named keeps those of the same name.
        where: name of the checkpoint.

    Raises:
        ValueError: a source that the checkpoint does not have.
    """
    found: References = {}
    for name in sources:
        old_name = new_sources.get(name, name)
        if old_name not in old.sources:
            raise ValueError(
                f"init.references is 'keep', but {where} has no source '{old_name}', it has "
                f'{", ".join(old.sources)}; name one by init.new_sources = {{"{name}" = '
                f'"{old.sources[0]}"}}, or set init.references = "fit"'
            )
        at = old.sources.index(old_name)
        energies = dict(zip(old.elements, old.baseline()[at], strict=True))
        found[name] = {chemical_symbols[z]: energies[z] for z in old.source_elements[at]}
    return found


def with_known(
    found: Statistics, old: Statistics, known: References, new_sources: Mapping[str, str]
) -> Statistics:
    """Statistics whose sources have these references, and know these elements, too.

    found: of the new run, fitted with `known` as given references; its elements are those of both models. The
    shifts are in `known` already; what the old training data left open stays open.
    """
    rows, elements, unspanned = [], [], []
    for index, name in enumerate(found.sources):
        at = old.sources.index(new_sources.get(name, name))
        by_symbol = {z: known[name][chemical_symbols[z]] for z in old.source_elements[at]}
        fitted = dict(zip(found.elements, found.references[index], strict=True))
        rows.append(tuple(by_symbol.get(z, fitted[z]) for z in found.elements))
        elements.append(tuple(sorted({*found.source_elements[index], *by_symbol})))
        still = [spread(row, old.elements, found.elements) for row in (old.unspanned or [()] * (at + 1))[at]]
        unspanned.append((*still, *(found.unspanned[index] if found.unspanned else ())))
    return dataclasses.replace(
        found,
        references=tuple(rows),
        source_elements=tuple(elements),
        shifts=(0.0,) * len(found.sources),
        unspanned=tuple(unspanned),
    )


def spread(row: Sequence[float], old: Sequence[int], new: Sequence[int]) -> tuple[float, ...]:
    """Numbers of some elements as numbers of more, zero for the others."""
    found = dict(zip(old, row, strict=True))
    return tuple(found.get(z, 0.0) for z in new)
