"""Reference energies that a user gives: a file of elements and energies, for all sources or by source."""

import ast
import json
import math
import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ase.data import atomic_numbers, chemical_symbols

from megagnn.data.record import MAX_ATOMIC_NUMBER
from megagnn.data.references import all_electron_energy

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

EVERY_SOURCE = ""
"""Key of references that hold for every source without its own."""

References = dict[str, dict[str, float]]
"""Source, or EVERY_SOURCE -> chemical symbol -> energy of the free atom, eV."""

LOWEST, HIGHEST = 1.5, 20.0
"""A reference energy below LOWEST times that of all electrons, or above HIGHEST eV, is told: no method gives
it."""


def read_reference_energies(path: str | Path) -> References:
    """Reference energies from a file of TOML, JSON, a Python dict, or lines such as "H -13.6" or "H,-13.6".

    Elements are symbols or atomic numbers, energies are in eV. A table named like a source, `[source]` in
    TOML, holds for that source, and other entries for every source.

    Raises:
        ValueError: a file that is not there or none of these, an unknown element, or an energy that is no
            finite number.
    """
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"cannot read the reference energies in {file} ({error}); give a file of lines such as "
            "'H = -13.6', in eV"
        ) from error
    table = _parse(text)
    if not table:
        raise ValueError(
            f"{file} is no table of reference energies; write TOML, JSON or lines such as 'H = -13.6', in eV"
        )
    found: References = {}
    for name, value in table.items():
        if isinstance(value, Mapping):
            found[str(name)] = {_element(z, file): _energy(z, e, file) for z, e in value.items()}
        else:
            found.setdefault(EVERY_SOURCE, {})[_element(name, file)] = _energy(name, value, file)
    return found


def for_sources(given: References, sources: Collection[str], where: str) -> References:
    """References of each source, those for every source filled in.

    Raises:
        ValueError: a table of a source that is not among them.
    """
    unknown = sorted(set(given) - {EVERY_SOURCE} - set(sources))
    if unknown:
        raise ValueError(
            f"{where} has a table for {unknown[0]!r}, which is no source; sources are {', '.join(sources)}"
        )
    every = given.get(EVERY_SOURCE, {})
    found = {source: {**every, **given.get(source, {})} for source in sources}
    return {source: row for source, row in found.items() if row}


def absurd_references(row: Mapping[str, float]) -> dict[str, float]:
    """Those of some reference energies, symbol -> eV, that no method gives."""
    return {
        symbol: energy
        for symbol, energy in row.items()
        if not LOWEST * float(all_electron_energy(atomic_numbers[symbol])) < energy < HIGHEST
    }


def _parse(text: str) -> dict[Any, Any]:
    for parse in (json.loads, ast.literal_eval, tomllib.loads):
        try:
            found = parse(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        if isinstance(found, dict):
            return found
    rows = [re.split(r"[\s,;:=]+", line.split("#")[0].strip(), maxsplit=1) for line in text.splitlines()]
    pairs = [row for row in rows if row != [""]]
    if any(len(pair) != 2 for pair in pairs):
        return {}
    named = pairs[1:] if pairs and pairs[0][0].lower() in ("element", "symbol", "species", "z") else pairs
    return dict(named)


def _element(name: Any, file: Path) -> str:
    text = str(name).strip()
    number = int(text) if text.isdecimal() else atomic_numbers.get(text, 0)
    if not 1 <= number <= MAX_ATOMIC_NUMBER:
        raise ValueError(
            f"{file}: unknown element {text!r}; name elements by symbol or atomic number, such as H or 1"
        )
    return chemical_symbols[number]


def _energy(name: Any, value: Any, file: Path) -> float:
    try:
        energy = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        energy = math.nan
    if not math.isfinite(energy):
        raise ValueError(f"{file}: the reference energy of {name} must be a number in eV, got {value!r}")
    return energy
