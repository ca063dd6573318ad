"""Reference energies that a run keeps from the checkpoint that it begins with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from ase.data import atomic_numbers, chemical_symbols

from megagnn.data.reference_file import References
from megagnn.models.statistics import Statistics


def known_references(
    old: Statistics, sources: Sequence[str], new_sources: Mapping[str, str], where: str
) -> References:
    """What another model adds for an atom of each element that its source knows, for those of these sources
    that it has.

    Args:
        old: of the checkpoint.
        sources: of the training data.
        new_sources: {new: old}; a source that is not named keeps those of the same name.
        where: name of the checkpoint.

    Raises:
        ValueError: the checkpoint has none of the sources.
    """
    found: References = {}
    for name in sources:
        old_name = new_sources.get(name, name)
        if old_name in old.sources:
            at = old.sources.index(old_name)
            energies = dict(zip(old.elements, old.baseline()[at], strict=True))
            found[name] = {chemical_symbols[z]: energies[z] for z in old.source_elements[at]}
    if not found:
        raise ValueError(
            f"init.references is 'keep', but {where} has no source '{sources[0]}', it has "
            f'{", ".join(old.sources)}; name one by init.new_sources = {{"{sources[0]}" = '
            f'"{old.sources[0]}"}}, or set init.references = "fit"'
        )
    return found


def with_known(
    found: Statistics, old: Statistics, known: References, new_sources: Mapping[str, str]
) -> Statistics:
    """Statistics of which some sources have these references, and know these elements, too.

    found: of the new run, fitted with `known` as given references; its elements are those of both models. The
    old shifts are in `known` already; what the old training data left open stays open.
    """
    references, elements = list(found.references), list(found.source_elements)
    shifts, unspanned = list(found.shifts), list(found.unspanned)
    for index, name in enumerate(found.sources):
        if name not in known:
            continue
        row = {atomic_numbers[symbol]: energy for symbol, energy in known[name].items()}
        fitted = dict(zip(found.elements, found.references[index], strict=True))
        references[index] = tuple(row.get(z, fitted[z]) for z in found.elements)
        elements[index] = tuple(sorted({*found.source_elements[index], *row}))
        shifts[index] = 0.0
        still_open = old.unspanned[old.sources.index(new_sources.get(name, name))] if old.unspanned else ()
        unspanned[index] += tuple(spread(values, old.elements, found.elements) for values in still_open)
    return dataclasses.replace(
        found,
        references=tuple(references),
        source_elements=tuple(elements),
        shifts=tuple(shifts),
        unspanned=tuple(unspanned),
    )


def spread(row: Sequence[float], old: Sequence[int], new: Sequence[int]) -> tuple[float, ...]:
    """Numbers of some elements as numbers of more, zero for the others."""
    found = dict(zip(old, row, strict=True))
    return tuple(found.get(z, 0.0) for z in new)
