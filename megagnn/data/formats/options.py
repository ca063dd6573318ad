"""What a reader of any format is told: names, keys of labels, how structures are grouped for the split."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import reduce
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols
from numpy.typing import NDArray

GROUPINGS = ("auto", "formula", "file", "frame")


@dataclass(frozen=True)
class ReadOptions:
    """Options of `read_structures`.

    Attributes:
        source: name of the data set; None takes the name of the file without its endings.
        level: name of the level of theory of the labels; None leaves "unknown", or what the file says.
        group_by: "auto", "formula", "file", "frame" or "info:KEY"; see `group_name`.
        energy_key, forces_key, stress_key: names of the labels in the file; None takes the usual ones, "none"
            reads no such label.
    """

    source: str | None = None
    level: str | None = None
    group_by: str = "auto"
    energy_key: str | None = None
    forces_key: str | None = None
    stress_key: str | None = None

    def __post_init__(self) -> None:
        if self.group_by not in GROUPINGS and not (self.group_by.startswith("info:") and self.group_by[5:]):
            raise ValueError(
                f"unknown grouping {self.group_by!r}; known are {', '.join(GROUPINGS)} and info:KEY"
            )

    @property
    def label_keys(self) -> dict[str, str | None]:
        """Label -> its key, None where none was given."""
        return {"energy": self.energy_key, "forces": self.forces_key, "stress": self.stress_key}

    def check_label_keys(self, usual: Collection[str], where: str) -> None:
        """Refuse to pair labels named by a key with labels that merely have the usual name.

        A file with REF_energy and REF_forces often holds `forces` too, of another method.

        Args:
            usual: labels of a frame found under their usual names.
            where: the frame, for the message.

        Raises:
            ValueError: some label has a key, and another has none but would be found under its usual name.
        """
        keys = self.label_keys
        given = [name for name, key in keys.items() if key is not None]
        unnamed = [name for name, key in keys.items() if key is None and name in usual]
        if given and unnamed:
            flags = " ".join(f"--{name}-key {name}" for name in unnamed)
            raise ValueError(
                f"{where}: {' and '.join(given)} would be read by the key given, but "
                f"{' and '.join(unnamed)} under the usual name, perhaps of another method; name all keys, "
                f"with {flags} if they belong together (none for a label to leave out, as in "
                f"--{unnamed[0]}-key none)"
            )

    def source_name(self, path: Path) -> str:
        """The source's name for structures of a file."""
        return self.source if self.source is not None else path.name.split(".")[0]


def group_name(
    group_by: str,
    *,
    path: Path,
    frame: int,
    numbers: NDArray[np.integer],
    info: Mapping[str, Any],
    auto: str | None = None,
) -> str:
    """The group of a structure: structures of one group, of any source, stay on one side of a split.

    "auto" takes what the format itself tells about the origin of a frame (``auto``); where it tells nothing,
    the empirical formula. Frames of a trajectory have one composition and so have conformations of a
    molecule, so neither can be torn apart; supercells of a crystal share the *empirical* formula too. That
    groups more than need be (isomers), which costs some freedom in the split and never an honest test. Two
    things it cannot see: a trajectory whose composition changes, and one slab under different adsorbates.
    Those need "file" or "info:KEY". A value of KEY means the same group in every file of one call.

    Args:
        group_by: "auto", "formula", "file" (every file is one trajectory), "frame" (no frame is related to
            any other), or "info:KEY" (the value of KEY).
        path, frame: where the structure was read.
        numbers: (N,) atomic numbers.
        info: what the file says about the frame, for "info:KEY".
        auto: the format's own idea of a group, or None.

    Raises:
        ValueError: the frame has no KEY.
    """
    if group_by == "file":
        return str(path)
    if group_by == "frame":
        return f"{path}:{frame}"
    if group_by.startswith("info:"):
        key = group_by[5:]
        if key not in info:
            raise ValueError(
                f"{path}, frame {frame}: has no key {key!r} to group by; keys there are "
                f"{', '.join(info) or 'none'}"
            )
        return str(info[key])
    if group_by == "auto" and auto is not None:
        return auto
    return empirical_formula(numbers)


def empirical_formula(numbers: NDArray[np.integer]) -> str:
    """Composition divided by its greatest common divisor, by atomic number: H2O for any amount of water."""
    elements, counts = np.unique(np.asarray(numbers, dtype=np.int64), return_counts=True)
    divisor = reduce(gcd, counts.tolist(), 0) or 1
    symbols = [chemical_symbols[z] if 0 <= z < len(chemical_symbols) else f"Z{z}" for z in elements.tolist()]
    parts = [
        f"{s}{n // divisor}" if n > divisor else s for s, n in zip(symbols, counts.tolist(), strict=True)
    ]
    return "".join(parts)


STRESS_DROPPED = "stress left out: not periodic in three directions"


def usable_stress(
    stress: NDArray[np.float64] | None, pbc: NDArray[np.bool_]
) -> tuple[NDArray[np.float64] | None, tuple[str, ...]]:
    """A stress label, or None and a note where its volume holds vacuum (slabs, chains, molecules).

    The thickness of the vacuum is an arbitrary choice of whoever set up the cell, and so is such a stress.
    """
    if stress is None or np.all(pbc):
        return stress, ()
    return None, (STRESS_DROPPED,)
