"""Which units would explain a factor between labels: names as `--units` takes them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ase import units

BOHR, HARTREE, RYDBERG = units.Bohr, units.Hartree, units.Rydberg
KCAL, KJ = units.kcal / units.mol, units.kJ / units.mol

ENERGY = {"eV": 1.0, "Ha": HARTREE, "Ry": RYDBERG, "kcal/mol": KCAL, "kJ/mol": KJ, "meV": 1e-3}
FORCES = {
    "eV/Å": 1.0,
    "Ha/bohr": HARTREE / BOHR,
    "Ry/bohr": RYDBERG / BOHR,
    "kcal/mol/Å": KCAL,
    "eV/bohr": 1 / BOHR,
    "kJ/mol/Å": KJ,
    "kJ/mol/nm": KJ / 10,
    "Ha/Å": HARTREE,
    "kcal/mol/bohr": KCAL / BOHR,
    "meV/Å": 1e-3,
}
STRESS = {
    "eV/Å^3": 1.0,
    "kBar": 1e3 * units.bar,
    "GPa": units.GPa,
    "bar": units.bar,
    "MPa": units.GPa / 1e3,
    "Ha/bohr^3": HARTREE / BOHR**3,
    "Ry/bohr^3": RYDBERG / BOHR**3,
}
"""Names -> value in eV and Å; the likelier ones first."""

TOLERANCE = 0.15
"""Tolerance of the logarithm of a factor: slopes of right data lie within 0.89 and 1.08."""

SHOWN = 3


def explain_factor(
    slope: float, labels: Mapping[str, float], name: str, rms: float, tolerance: float = TOLERANCE
) -> list[str]:
    """Units of energies and of forces or stress that explain how energies change against them.

    Args:
        slope: energy differences over what the labels say, in the numbers of the file.
        labels: FORCES or STRESS; name: "forces" or "stress".
        rms: of the labels, in the numbers of the file; sizes that no data have are sorted out.
        tolerance: of the logarithm of the factor.

    Returns:
        As `--units` takes them, the likeliest first.
    """
    sign = "-" if slope < 0 else ""
    usual = {"forces": (0.02, 30.0), "stress": (1e-4, 1.0)}[name]
    found = []
    for rank, (label, value) in enumerate(labels.items()):
        for order, (energy, unit) in enumerate(ENERGY.items()):
            if abs(math.log(abs(slope) * unit / value)) > tolerance:
                continue
            # a program has one energy unit; else one of the two quantities is as it should be
            one_system = label.startswith(energy)
            if not (one_system or energy == "eV" or rank == 0):
                continue
            sized = usual[0] <= rms * value <= usual[1]
            text = ",".join(
                [f"energy={energy}"] * (energy != "eV") + [f"{name}={sign}{label}"] * bool(rank or sign)
            )
            found.append((not sized, not one_system, rank + order, text))
    texts = [text for *_, text in sorted(found) if text]
    return texts[:1] if abs(math.log(abs(slope))) < tolerance else texts[:SHOWN]  # a sign explains it alone


def explain_size(rms: float, labels: Mapping[str, float], largest: float) -> list[str]:
    """Units in which labels of an impossible size would be at most `largest`, the likeliest first."""
    return [name for name, value in labels.items() if value < 1 and rms * value <= largest][:2]
