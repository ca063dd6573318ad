"""Charge and spin of a structure, as files of other programs tell them."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

CHARGES = ("total_charge", "charge")
MULTIPLICITIES = ("multiplicity", "spin_multiplicity", "mult")
SPINS = ("spin", "total_spin")
"""Keys of `info`, the plainer first. A spin is the multiplicity 2S + 1, as OMol25 has it, or 2S."""

ROUNDING = 1e-3
"""e, by which a total charge may be off a whole number where a program adds up charges of atoms."""

SPIN_LEFT_OUT = "spin left out: it is no whole number"
IMPOSSIBLE = "the number of electrons allows no such multiplicity with this charge"
SEVERAL = "charge and multiplicity left out: the file tells several"

TOLD = {
    "gaussian-out": (r"Charge\s*=\s*(-?\d+)\s+Multiplicity\s*=\s*(\d+)",),
    "orca-output": (
        r"Total Charge\s+Charge\s+\.+\s*(-?\d+)",
        r"Multiplicity\s+Mult\s+\.+\s*(\d+)",
    ),
}
"""ASE's name of a format -> what an output says of charge and multiplicity."""


def electronic_state(
    info: Mapping[str, Any], numbers: NDArray[np.integer]
) -> tuple[float, int, tuple[str, ...]]:
    """Total charge, e, multiplicity (0 where nothing is said), and notes.

    One of 2S + 1 and 2S has the parity that the number of electrons asks for, and a `spin` is that one; 0 is
    also what sets of crystals write for nothing.

    Args:
        info: what a file says of a frame.
        numbers: (N,) atomic numbers.

    Raises:
        ValueError: a charge that is not finite.
    """
    charge, multiplicity, spin = (_first(info, names) for names in (CHARGES, MULTIPLICITIES, SPINS))
    charge = charge or 0.0
    if not np.isfinite(charge):
        raise ValueError(f"the total charge must be a finite number of e, got {charge}")
    if abs(charge - round(charge)) < ROUNDING:
        charge = float(round(charge))
    electrons = float(np.sum(numbers, dtype=np.int64)) - charge
    notes: tuple[str, ...] = ()
    if multiplicity is None and spin:
        multiplicity = spin if electrons % 1 or (electrons + spin) % 2 else spin + 1
    if multiplicity and not (multiplicity % 1 == 0 and 1 <= multiplicity < 1 << 15):
        multiplicity, notes = None, (SPIN_LEFT_OUT,)
    elif multiplicity and not electrons % 1 and (electrons + multiplicity) % 2 == 0:
        notes = (IMPOSSIBLE,)
    return charge, int(multiplicity or 0), notes


def _first(info: Mapping[str, Any], names: Iterable[str]) -> float | None:
    for name in names:
        value = info.get(name)
        if isinstance(value, np.ndarray) and value.size == 1:
            value = value.item()
        if isinstance(value, (int, float, np.number)) and not isinstance(value, bool):
            return float(value)
    return None


def formal_charge(smiles: str) -> int:
    """Sum of the charges of the atoms in brackets, as in [NH3+:1], [Fe++] or [O-2].

    Weininger, J. Chem. Inf. Comput. Sci. 28, 31 (1988).
    """
    total = 0
    for signs, count in re.findall(r"\[[^\]]*?([+-]+)(\d*)(?::\d+)?\]", smiles):
        total += (1 if signs[0] == "+" else -1) * (int(count) if count else len(signs))
    return total


def state_of_output(lines: Iterable[str], ase_format: str) -> tuple[dict[str, int], tuple[str, ...]]:
    """`charge` and `multiplicity` of a program's output, if it tells one of each, and notes."""
    found: dict[str, set[int]] = {"charge": set(), "multiplicity": set()}
    for line in lines:
        for pattern, names in zip(TOLD[ase_format], _names(ase_format), strict=True):
            if match := re.search(pattern, line):
                for name, value in zip(names, match.groups(), strict=True):
                    found[name].add(int(value))
    if max(map(len, found.values())) > 1:
        return {}, (SEVERAL,)
    return {name: values.pop() for name, values in found.items() if values}, ()


def _names(ase_format: str) -> tuple[tuple[str, ...], ...]:
    both = ("charge", "multiplicity")
    return (both,) if len(TOLD[ase_format]) == 1 else tuple((name,) for name in both)
