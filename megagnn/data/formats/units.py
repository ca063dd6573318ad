"""Units of labels in files, and their factors to those of a store (eV, Å; stress with tension positive)."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import ase
import numpy as np
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
DIPOLES = {"eå": 1.0, "e*å": 1.0, "ebohr": units.Bohr, "e*bohr": units.Bohr, "au": units.Bohr}
DIPOLES |= {"debye": units.Debye, "d": units.Debye}
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
    "dipole": "e*Å, e*bohr, Debye",
}
"""Quantity -> units that can be declared, in words."""
SIGNED = ("forces", "stress", "virial")

QUANTITIES = {
    "energy": "energy",
    "free_energy": "energy",
    "energies": "energy",
    "atomic_energies": "energy",
    "forces": "forces",
    "stress": "stress",
    "stresses": "stress",
    "virial": "virial",
    "virials": "virial",
}
"""Usual name of a label -> its quantity, see KNOWN."""
PER_ATOM = ("energies", "atomic_energies")
WITHOUT_UNIT = ("magmom", "magmoms", "charges")

LIKELY = {
    "energy": "eV Ha Ry kcal/mol kJ/mol meV",
    "forces": "eV/Å Ha/bohr Ry/bohr kcal/mol/Å eV/bohr kJ/mol/Å kJ/mol/nm Ha/Å kcal/mol/bohr meV/Å",
    "stress": "eV/Å^3 kBar GPa bar MPa Ha/bohr^3 Ry/bohr^3",
}
"""Quantity -> units that labels may have without a word, the likelier ones first."""

TOLERANCE = 0.15
"""Tolerance of the logarithm of a factor: slopes of right data lie within 0.89 and 1.08."""

SHOWN = 3
"""Explanations of a factor that are told at the most."""


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
    elif quantity == "dipole":
        found = DIPOLES.get(plain)
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


def convert_frame(atoms: ase.Atoms, units: Units, foreign: bool) -> None:
    """Convert positions, cell and labels under usual names, in place: among results, `info` and arrays.

    What nobody says the unit of is left out where lengths are others than Å, or the format has units of its
    own: momenta, and results such as a dipole. Labels under names of their own stay as they are.

    Args:
        units: those of the frame.
        foreign: whether the format has units of its own.
    """
    length = units.factor("length")
    if length != 1.0:
        atoms.set_cell(atoms.cell.array * length)
        atoms.positions *= length
    if length != 1.0 or foreign:
        atoms.arrays.pop("momenta", None)
        if atoms.calc is not None:
            known = (*QUANTITIES, *WITHOUT_UNIT)
            atoms.calc.results = {k: v for k, v in atoms.calc.results.items() if k in known}
    results = {} if atoms.calc is None else atoms.calc.results
    for place in (results, atoms.info, atoms.arrays):
        _convert(place, units, len(atoms))


def _convert(place: MutableMapping[str, Any], units: Units, num_atoms: int) -> None:
    for name in QUANTITIES.keys() & place.keys():
        factor = units.factor(QUANTITIES[name], 1 if name in PER_ATOM else num_atoms)
        if factor == 1.0 or place[name] is None:
            continue
        try:
            values = np.asarray(place[name], dtype=np.float64) * factor
        except (TypeError, ValueError):
            continue  # words under the name of a label
        place[name] = float(values.item()) if values.size == 1 else values


def explain_factor(slope: float, quantity: str, rms: float, tolerance: float = TOLERANCE) -> list[str]:
    """Units of energies and of forces or stress that explain how energies change against them.

    Args:
        slope: energy differences over what the labels say, in the numbers of the file.
        quantity: "forces" or "stress".
        rms: of the labels, in the numbers of the file; sizes that no data have are sorted out.
        tolerance: of the logarithm of the factor.

    Returns:
        As `--units` takes them, the likeliest first.
    """
    sign = "-" if slope < 0 else ""
    usual = {"forces": (0.02, 30.0), "stress": (1e-4, 1.0)}[quantity]
    found = []
    for rank, label in enumerate(LIKELY[quantity].split()):
        value = _factor(quantity, label)
        for order, energy in enumerate(LIKELY["energy"].split()):
            if abs(math.log(abs(slope) * _factor("energy", energy) / value)) > tolerance:
                continue
            # a program has one energy unit; else one of the two quantities is as it should be
            one_system = label.startswith(energy)
            if not (one_system or energy == "eV" or rank == 0):
                continue
            sized = usual[0] <= rms * value <= usual[1]
            text = ",".join(
                [f"energy={energy}"] * (energy != "eV") + [f"{quantity}={sign}{label}"] * bool(rank or sign)
            )
            found.append((not sized, not one_system, rank + order, text))
    texts = [text for *_, text in sorted(found) if text]
    return texts[:1] if abs(math.log(abs(slope))) < tolerance else texts[:SHOWN]  # a sign explains it alone


def explain_size(rms: float, quantity: str, largest: float) -> list[str]:
    """Units in which labels of an impossible size would be at most `largest`, the likeliest first."""
    values = {name: _factor(quantity, name) for name in LIKELY[quantity].split()}
    return [name for name, value in values.items() if value < 1 and rms * value <= largest][:2]
