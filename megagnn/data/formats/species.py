"""Names of species in files: elements as a rule, else what the user's map says they are."""

from collections.abc import Mapping, Sequence

import numpy as np
from ase.data import atomic_numbers

from megagnn.data.arrays import Ints
from megagnn.data.formats.options import UnreadableError

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


def numbers_of(names: Sequence[str], species: Mapping[str, str], flag: str = "--species") -> Ints:
    """(N,) atomic numbers of species by their names in the file.

    Raises:
        UnreadableError: (a ValueError) names that are no elements, with the way out by `flag`.
    """
    numbers = {name: number_of(name, species) for name in dict.fromkeys(names)}
    unknown = [name for name, number in numbers.items() if number is None]
    if unknown:
        raise UnreadableError(_unknown_species(unknown, flag))
    return np.array([numbers[name] for name in names], dtype=np.int64)


def _unknown_species(unknown: list[str], flag: str) -> str:
    """What to say about species that are no elements, with the way out."""
    isotopes = [name for name in unknown if name in ISOTOPES]
    example = ",".join(f"{name}={ISOTOPES.get(name, _likely(name))}" for name in unknown[:4])
    reason = "numbers are not taken for elements, for they may be types" if unknown[0].isdigit() else ""
    reason = "isotopes are not told apart from their element" if isotopes else reason
    return (
        f"unknown species {', '.join(unknown)}{f' ({reason})' if reason else ''}; say which elements they "
        f"are, as in {flag} {example}"
    )


def _likely(name: str) -> str:
    """An element a name may stand for, for the example in a message."""
    if name.isdigit():
        number = int(name)
        return next((symbol for symbol, z in atomic_numbers.items() if z == number), "Si")
    letters = "".join(c for c in name if c.isalpha())
    for length in (2, 1):
        symbol = letters[:length].capitalize()
        likely = len(letters) >= length and (length == 1 or letters[1:2].islower())
        if likely and atomic_numbers.get(symbol, 0) > 0:
            return symbol
    return "C"
