"""Names of species in files: elements as a rule, else what the user's map says they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from ase.data import atomic_numbers
from numpy.typing import NDArray

ISOTOPES = {"D": "H", "T": "H"}


def parse_species(text: str) -> dict[str, str]:
    """Map of species to elements from "OW=O,HW=H" or, for types 1, 2, ..., from "Si,O".

    Raises:
        ValueError: a mixture of both, a name given twice, or something that is not an element.
    """
    parts = [part.strip() for part in text.split(",")]
    pairs = [part.partition("=") for part in parts]
    named = [bool(equals) for _, equals, _ in pairs]
    if any(named) and not all(named):
        raise ValueError(
            f"--species takes NAME=ELEMENT,... or a list of elements of types 1, 2, ...; got {text!r}"
        )
    items = [
        (name.strip(), element.strip()) if equals else (str(index), name.strip())
        for index, (name, equals, element) in enumerate(pairs, 1)
    ]
    for name, element in items:
        if atomic_numbers.get(element, 0) < 1 or not name:
            raise ValueError(f"--species: {element!r} is not an element; write NAME=ELEMENT as in OW=O,HW=H")
    if len(dict(items)) < len(items):
        raise ValueError(f"--species names a species twice; got {text!r}")
    return dict(items)


def number_of(name: str, species: Mapping[str, str]) -> int | None:
    """Atomic number of a species by its name in the file (0 for the dummy X), or None if it is unknown."""
    if name in species:
        return int(atomic_numbers[species[name]])
    number = atomic_numbers.get(name, atomic_numbers.get(name.capitalize()))
    return None if number is None else int(number)


def numbers_of(names: Sequence[str], species: Mapping[str, str]) -> NDArray[np.int64]:
    """(N,) atomic numbers of species by their names in the file.

    Raises:
        ValueError: names that are no elements, with the way out.
    """
    numbers = [number_of(name, species) for name in names]
    unknown = [name for name, number in zip(names, numbers, strict=True) if number is None]
    if unknown:
        raise ValueError(unknown_species(unknown))
    return np.array(numbers, dtype=np.int64)


def unknown_species(names: Iterable[str], what: str = "--species") -> str:
    """What to say about species that are no elements, with the way out."""
    unknown = list(dict.fromkeys(names))
    isotopes = [name for name in unknown if name in ISOTOPES]
    example = ",".join(f"{name}={ISOTOPES.get(name, _likely(name))}" for name in unknown[:4])
    reason = "numbers are not taken for elements, for they may be types" if unknown[0].isdigit() else ""
    reason = "isotopes are not told apart from their element" if isotopes else reason
    return (
        f"unknown species {', '.join(unknown)}{f' ({reason})' if reason else ''}; say which elements they "
        f"are, as in {what} {example}"
    )


def _likely(name: str) -> str:
    """An element a name may stand for, for the example in a message."""
    if name.isdigit():
        number = int(name)
        return next((symbol for symbol, z in atomic_numbers.items() if z == number), "Si")
    letters = "".join(c for c in name if c.isalpha())
    for length in (2, 1):
        symbol = letters[:length].capitalize()
        if (
            len(letters) >= length
            and (length == 1 or letters[1:2].islower())
            and atomic_numbers.get(symbol, 0) > 0
        ):
            return symbol
    return "C"
