"""Isolated atoms: single atoms that no other atom or image sees, whose energy is a reference energy."""

from __future__ import annotations

import numpy as np
from ase.data import chemical_symbols, covalent_radii
from numpy.typing import ArrayLike

from megagnn.data.neighbours import neighbour_list
from megagnn.data.record import Structure

ISOLATED_DISTANCE = 6.0
"""Å. A single atom farther than this from its images is taken for isolated: cutoffs of models are mostly
smaller, and no crystal has one atom to a cell and nearest neighbours so far away."""

NEARLY_ISOLATED, NEARLY_RADII = 4.5, 3.0
"""Å, and covalent radii: single atoms farther than both from their images are in no crystal."""

ISOLATED_PREFIX = "isolated atom "
"""Groups of isolated atoms are named apart: H and H2 share the empirical formula, and not the side."""


def is_isolated(
    num_atoms: int, positions: ArrayLike, cell: ArrayLike, pbc: ArrayLike, config_type: str, distance: float
) -> bool:
    """Whether a structure is a single atom that is said to be isolated or without an image within a distance.

    Args:
        num_atoms: of the structure; positions (N, 3), Å, cell (3, 3), Å, pbc (3,) as in `Structure`.
        config_type: what the file calls it; "IsolatedAtom", in any case and with or without an underscore,
            holds in a small box, too.
        distance: Å.
    """
    if num_atoms != 1:
        return False
    if config_type.lower().replace("_", "") == "isolatedatom" or not np.any(pbc):
        return True
    return neighbour_list(positions, cell, pbc, distance)[0].shape[1] == 0


def is_isolated_atom(structure: Structure, distance: float = ISOLATED_DISTANCE) -> bool:
    """The same of the record of a structure."""
    s = structure
    return is_isolated(s.num_atoms, s.positions, s.cell, s.pbc, s.config_type, distance)


def is_nearly_isolated(structure: Structure) -> bool:
    """Whether a single atom is farther from its images than in any crystal."""
    s = structure
    if s.num_atoms != 1:
        return False
    distance = max(NEARLY_ISOLATED, NEARLY_RADII * float(covalent_radii[int(s.atomic_numbers[0])]))
    return is_isolated(1, s.positions, s.cell, s.pbc, s.config_type, distance)


def isolated_group(structure: Structure) -> str:
    """The group of an isolated atom: all of one element, of any source, lie on one side."""
    return ISOLATED_PREFIX + chemical_symbols[int(structure.atomic_numbers[0])]
