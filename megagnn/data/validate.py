"""Rules every structure must meet before it enters a store.

A broken label found here costs a message; found in training it costs a run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megagnn.data.neighbours import neighbour_list, periodic_cell
from megagnn.data.record import MAX_ATOMIC_NUMBER, Structure


@dataclass(frozen=True)
class Rules:
    """Limits that depend on the data.

    Attributes:
        min_distance: Å, smallest distance allowed between two atoms, images included; 0 skips the check.
        max_force: eV/Å, largest force on one atom allowed.
    """

    min_distance: float = 0.5
    max_force: float = 100.0

    def __post_init__(self) -> None:
        if not self.min_distance >= 0:
            raise ValueError(
                f"min_distance must be 0 (no check) or a positive number of Å, got {self.min_distance}"
            )
        if not self.max_force > 0:
            raise ValueError(f"max_force must be a positive number of eV/Å, got {self.max_force}")


FORMAL_RULES = Rules(min_distance=0.0, max_force=float("inf"))
"""Only what a store cannot hold at all; the physics was the caller's to judge."""


class StructureError(ValueError):
    """A structure broke a rule. ``rule`` is its short name, by which rejections are counted."""

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(message)
        self.rule = rule


def check_structure(structure: Structure, rules: Rules = FORMAL_RULES, where: str = "structure") -> None:
    """Raise unless the structure meets every rule.

    Args:
        structure: to be checked.
        rules: limits on distances and forces.
        where: where it comes from, such as "data.xyz, frame 12"; begins the message.

    Raises:
        StructureError: (a ValueError) naming the place, the rule, what was got and the way out.
    """
    _check_atoms(structure, where)
    _check_labels(structure, where)
    _check_lattice(structure, where)
    if rules.min_distance > 0:
        _check_distances(structure, rules.min_distance, where)
    if structure.forces is not None:
        largest = float(np.linalg.norm(structure.forces, axis=1).max())
        if largest > rules.max_force:
            raise StructureError(
                "max_force",
                f"{where}: the largest force is {largest:.4g} eV/Å, above the limit of {rules.max_force:g} "
                "eV/Å; check units and convergence, leave it out, or raise the limit (max_force)",
            )


def _check_atoms(s: Structure, where: str) -> None:
    num_atoms = len(s.atomic_numbers)
    if num_atoms == 0:
        raise StructureError("empty", f"{where}: the structure is empty (0 atoms); remove it")
    shapes = {
        "positions": (s.positions, (num_atoms, 3)),
        "cell": (s.cell, (3, 3)),
        "pbc": (s.pbc, (3,)),
        "forces": (s.forces, (num_atoms, 3)),
        "stress": (s.stress, (3, 3)),
        "fixed": (s.fixed, (num_atoms,)),
    }
    for name, (array, shape) in shapes.items():
        if array is not None and np.shape(array) != shape:
            raise StructureError(
                "shape",
                f"{where}: {name} must have shape {shape} for {num_atoms} atoms, got {np.shape(array)}",
            )
    numbers = np.asarray(s.atomic_numbers, dtype=np.int64)
    unknown = numbers[(numbers < 1) | (numbers > MAX_ATOMIC_NUMBER)]
    if len(unknown):
        raise StructureError(
            "element",
            f"{where}: unknown element with atomic number {int(unknown[0])}; known are 1 to "
            f"{MAX_ATOMIC_NUMBER} (dummy atoms must be removed)",
        )
    if not np.isfinite(s.positions).all():
        raise StructureError(
            "finite_positions", f"{where}: positions hold NaN or infinity; leave the frame out"
        )


def _check_labels(s: Structure, where: str) -> None:
    if s.energy is None and s.forces is None:
        raise StructureError("unlabelled", f"{where}: has neither energy nor forces; a label is needed")
    for name, label in (("energy", s.energy), ("forces", s.forces), ("stress", s.stress)):
        if label is not None and not np.isfinite(label).all():
            raise StructureError(
                "finite_labels",
                f"{where}: {name} holds NaN or infinity; leave the frame out, or leave the label out if the "
                "engine did not compute it",
            )


def _check_lattice(s: Structure, where: str) -> None:
    try:
        periodic_cell(np.asarray(s.cell, dtype=np.float64), np.asarray(s.pbc, dtype=bool))
    except ValueError as error:
        raise StructureError("lattice", f"{where}: {error}") from error
    if s.stress is not None and not np.all(s.pbc):
        raise StructureError(
            "lattice",
            f"{where}: has a stress but is not periodic in three directions, so no cell volume it could be "
            "per; leave the stress out",
        )


def _check_distances(s: Structure, min_distance: float, where: str) -> None:
    edge_index, shifts = neighbour_list(s.positions, s.cell, s.pbc, min_distance)
    if edge_index.shape[1] == 0:
        return
    i, j = edge_index
    distances = np.linalg.norm(s.positions[j] + shifts @ s.cell - s.positions[i], axis=1)
    k = int(np.argmin(distances))
    raise StructureError(
        "min_distance",
        f"{where}: atoms {i[k]} and {j[k]} overlap: {distances[k]:.4f} Å apart (periodic images counted), "
        f"the limit is {min_distance:g} Å; leave the frame out, or lower the limit (min_distance)",
    )
