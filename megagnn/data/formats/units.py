"""Units of labels in files, and their factors to those of a store (eV, Å; stress with tension positive)."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field

from ase import units

ENERGIES = {
    "ev": 1.0,
    "mev": 1e-3,
    "ha": units.Hartree,
    "hartree": units.Hartree,
    "ry": units.Rydberg,
    "rydberg": units.Rydberg,
    "kcal/mol": units.kcal / units.mol,
    "kj/mol": units.kJ / units.mol,
}
LENGTHS = {"å": 1.0, "a": 1.0, "ang": 1.0, "angstrom": 1.0, "bohr": units.Bohr, "nm": 10.0, "pm": 0.01}
PRESSURES = {
    "gpa": units.GPa,
    "mpa": 1e-3 * units.GPa,
    "pa": units.Pascal,
    "kbar": 1e3 * units.bar,
    "kb": 1e3 * units.bar,
    "bar": units.bar,
    "atm": 101325 * units.Pascal,
}
KNOWN = {
    "energy": "eV, meV, Ha, Ry, kcal/mol, kJ/mol, any of them with /atom",
    "forces": "an energy by a length, as eV/Å, Ha/bohr, kcal/mol/Å, with a minus sign for gradients",
    "stress": "eV/Å^3, GPa, MPa, kBar, bar, Pa, atm, Ha/bohr^3, with a minus where compression is positive",
    "virial": "eV, meV, Ha, Ry, kcal/mol, kJ/mol, with a minus sign where tension is positive",
    "length": "Å, bohr, nm, pm",
}
"""Quantity -> units that can be declared, in words."""
SIGNED = ("forces", "stress", "virial")


@dataclass(frozen=True)
class Units:
    """Units declared for some quantities; the others are those of a store.

    Attributes:
        of: quantity (see KNOWN) -> unit as written.
    """

    of: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for quantity, text in self.of.items():
            _factor(quantity, text)

    def factor(self, quantity: str, num_atoms: int = 1) -> float:
        """What a value of this quantity is multiplied with; an energy per atom is of `num_atoms` atoms.

        A virial follows the unit of energies (without "/atom") unless it has its own.
        """
        text = self.of.get(quantity)
        if text is None and quantity == "virial" and "energy" in self.of:
            text = _plain(self.of["energy"]).removesuffix("/atom")
        if text is None:
            return 1.0
        per_atom = quantity == "energy" and _plain(text).endswith("/atom")
        return _factor(quantity, text) * (num_atoms if per_atom else 1)

    def over(self, own: Units) -> Units:
        """These units, and where they say nothing the file's own."""
        return Units({**own.of, **self.of})


def parse_units(text: str) -> Units:
    """Units from "energy=Ha,forces=Ha/bohr,stress=-kBar".

    Raises:
        ValueError: not such a list, or a quantity or unit that is not known.
    """
    of: dict[str, str] = {}
    for part in text.split(","):
        quantity, equals, unit = part.strip().partition("=")
        if not equals or not unit or quantity in of:
            raise ValueError(
                f"--units takes each quantity once, as in energy=Ha,forces=Ha/bohr,stress=-kBar; got {text!r}"
            )
        of[quantity] = unit.strip()
    return Units(of)


def _plain(text: str) -> str:
    """One spelling: lower case, no powers, one letter for Å."""
    text = unicodedata.normalize("NFKC", text).lower().replace("³", "3").replace(" ", "")
    return text.replace("**", "").replace("^", "").replace("ångström", "å").replace("ångstrom", "å")


def _factor(quantity: str, text: str) -> float:
    if quantity not in KNOWN:
        raise ValueError(f"--units: unknown quantity {quantity!r}; known are {', '.join(KNOWN)}")
    plain = _plain(text)
    sign = 1.0
    if plain.startswith("-") and quantity in SIGNED:
        plain, sign = plain[1:], -1.0
    first, _, last = plain.rpartition("/")
    found: float | None
    if quantity == "energy":
        found = ENERGIES.get(plain.removesuffix("/atom"))
    elif quantity == "virial":
        found = ENERGIES.get(plain)
    elif quantity == "length":
        found = LENGTHS.get(plain)
    elif quantity == "forces":
        found = ENERGIES[first] / LENGTHS[last] if first in ENERGIES and last in LENGTHS else None
    elif plain in PRESSURES:
        found = PRESSURES[plain]
    else:
        known = first in ENERGIES and last.endswith("3") and last[:-1] in LENGTHS
        found = ENERGIES[first] / LENGTHS[last[:-1]] ** 3 if known else None
    if found is None:
        raise ValueError(f"--units: unknown unit {text!r} of {quantity}; known are {KNOWN[quantity]}")
    return sign * found
