"""What is checked of all structures that `prepare` reads, beyond the rules that each of them must meet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
from ase.data import chemical_symbols
from numpy.typing import NDArray

from megagnn.data.copies import Copies
from megagnn.data.isolated import NEARLY_ISOLATED, is_nearly_isolated
from megagnn.data.plausibility import LabelCheck
from megagnn.data.record import Structure

FEW = 0.1
"""Share of a source: single atoms that are more are its crystals."""


class Audit:
    """Collects while structures are read; then `check` their labels and, once they are split, `copies`.

    Args:
        declared: units that the user declared, quantity -> unit.
    """

    def __init__(self, declared: Mapping[str, str] | None = None) -> None:
        self._declared = declared or {}
        self._labels: dict[str, LabelCheck] = {}
        self._copies = Copies()
        self._isolated = bytearray()
        self._counts: Counter[str] = Counter()
        self._single: dict[str, Counter[str]] = {}

    def add(self, structure: Structure, isolated: bool, file: str, frame: int) -> None:
        """One structure in the order of the store: whether it is an isolated atom, and where it is from."""
        self._isolated.append(isolated)
        self._copies.add(structure, file, frame)
        self._counts[structure.source] += 1
        if not isolated and is_nearly_isolated(structure):
            symbol = chemical_symbols[int(structure.atomic_numbers[0])]
            self._single.setdefault(structure.source, Counter())[symbol] += 1
        if not isolated:
            if structure.source not in self._labels:
                self._labels[structure.source] = LabelCheck(structure.source, self._declared)
            self._labels[structure.source].add(structure, file, frame)

    def check(self, accept: bool) -> list[str]:
        """What is wrong with labels, in words.

        Args:
            accept: take sure faults for suspicions.

        Raises:
            ValueError: labels that are surely wrong.
        """
        faults = [fault for check in self._labels.values() for fault in check.faults()]
        sure = [fault.text for fault in faults if fault.sure]
        if sure and not accept:
            raise ValueError(
                "; ".join(sure)
                + ". Nothing was written; if the labels are right as they are, --accept-labels "
                "writes them"
            )
        return [fault.text for fault in faults] + self._copies.with_two_energies() + self._nearly_isolated()

    def _nearly_isolated(self) -> list[str]:
        """Few single atoms beside other structures, in a box that no crystal has, in words."""
        return [
            f"{source}: {symbols.total()} single atoms ({', '.join(symbols)}) are farther from "
            "their images than in any crystal, but nearer than --isolated-distance, so no isolated atoms; "
            f"if they are meant as such, give --isolated-distance {NEARLY_ISOLATED:g} or, in the file, "
            "config_type=IsolatedAtom"
            for source, symbols in self._single.items()
            if symbols.total() <= FEW * self._counts[source]
        ]

    def copies(self, sides: NDArray[np.integer]) -> list[str]:
        """Test and validation structures that are copies of training structures, in words."""
        return self._copies.in_training(sides, np.frombuffer(bytes(self._isolated), dtype=np.bool_))
