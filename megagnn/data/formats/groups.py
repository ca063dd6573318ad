"""Names of groups: what stays on one side of a split."""

import hashlib
from collections.abc import Mapping
from functools import reduce
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols
from numpy.typing import NDArray

from megagnn.data.arrays import Floats
from megagnn.data.split import FRAME_PREFIX

GROUPINGS = ("auto", "formula", "file", "frame")
CONTENT_RESOLUTION = 1e-4
"""Å, to which the marks are rounded that name a frame."""

NUM_MARKS = 3
"""Numbers that positions and cell are reduced to: three of them, rounded to a ten-thousandth, tell 10^15
frames apart, and few numbers seldom lie where rounding turns over."""


def group_name(
    group_by: str,
    *,
    path: Path,
    frame: int,
    numbers: NDArray[np.integer],
    positions: NDArray[np.floating],
    cell: NDArray[np.floating],
    info: Mapping[str, Any],
    file_content: str = "",
    auto: str | None = None,
) -> str:
    """The group of a structure: structures of one group, of any source, stay on one side of a split.

    "auto" takes what the format itself tells about the origin of a frame (``auto``), or else the empirical
    formula. Frames of a trajectory have one composition and so have conformations of a molecule, so neither
    can be torn apart; supercells of a crystal share the *empirical* formula too. That groups more than need
    be (isomers), which costs some freedom in the split and never an honest test. Two things it cannot see: a
    trajectory whose composition changes, and one slab under different adsorbates. Those need "file" or
    "info:KEY". A value of KEY means the same group in every file of one call.

    "frame" and "file" name groups by the structures themselves, without labels: files of the same name in two
    folders do not collide, and one structure labelled by two methods stays one group.

    Args:
        group_by: "auto", "formula", "file" (every file is one trajectory), "frame" (no frame is related to
            any other), or "info:KEY" (the value of KEY in `info`, which is what the file says of the frame).
        path, frame: where the structure was read, for messages.
        numbers: (N,) atomic numbers; positions: (N, 3), Å; cell: (3, 3), Å.
        file_content: name of all frames of the file by their content, or empty.

    Raises:
        ValueError: the frame has no KEY.
    """
    if group_by == "file":
        return f"file {file_content or content_name(numbers, positions, cell)}"
    if group_by == "frame":
        return FRAME_PREFIX + content_name(numbers, positions, cell)
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


def content_name(
    numbers: NDArray[np.integer], positions: NDArray[np.floating], cell: NDArray[np.floating]
) -> str:
    """A name of a structure made of its species, positions and cell, whatever its labels.

    Positions and cell are reduced to NUM_MARKS weighted sums, which are rounded. Frames that differ by more
    than some 1e-4 Å have different names. Those that differ by the rounding of a file with eight decimals
    have one name but for one frame in a hundred or fewer, whose sums lie where rounding turns over; with six
    decimals but for some per cent. Single precision, which a store keeps, is taken of all.
    """
    digest = hashlib.sha256(np.asarray(numbers, dtype="<i8").tobytes())
    for array in (positions, cell):
        values = np.nan_to_num(np.asarray(array, dtype=np.float32).astype(np.float64)).ravel()
        marks = _mark_weights(len(values)) @ values / CONTENT_RESOLUTION
        digest.update(np.rint(marks).clip(-9e18, 9e18).astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def _mark_weights(length: int) -> Floats:
    """(NUM_MARKS, length) in [-1, 1), spread evenly (Weyl), the same in every release of every library."""
    squares = np.arange(1, length + 1, dtype=np.float64) ** 2
    irrational = np.sqrt(np.array([2.0, 3.0, 5.0]))[:NUM_MARKS, None]
    return 2 * ((squares * irrational) % 1.0) - 1


def empirical_formula(numbers: NDArray[np.integer]) -> str:
    """Composition divided by its greatest common divisor, by atomic number: H2O for any amount of water."""
    elements, counts = np.unique(np.asarray(numbers, dtype=np.int64), return_counts=True)
    divisor = reduce(gcd, counts.tolist(), 0) or 1
    return symbols(np.repeat(elements, counts // divisor))


def symbols(numbers: NDArray[np.integer]) -> str:
    """Composition by atomic number: H4O2 for two molecules of water."""
    elements, counts = np.unique(np.asarray(numbers, dtype=np.int64), return_counts=True)
    names = [chemical_symbols[z] if 0 <= z < len(chemical_symbols) else f"Z{z}" for z in elements.tolist()]
    return "".join(f"{s}{n}" if n > 1 else s for s, n in zip(names, counts.tolist(), strict=True))
