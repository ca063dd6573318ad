"""The canonical record of one labelled structure, and the rules each must meet before it enters a store.

Every reader yields such records and every writer takes them. A broken label found by a rule costs a message;
found in training it costs a run. Isolated atoms, which no other atom or image sees, have reference energies.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ase.data import chemical_symbols, covalent_radii
from numpy.typing import ArrayLike, NDArray

from megagnn.data import keys
from megagnn.data.arrays import Bools, Floats, Ints
from megagnn.data.neighbours import neighbour_list, periodic_cell

MAX_ATOMIC_NUMBER = 118

ISOLATED_DISTANCE = 6.0
"""Å. A single atom farther than this from its images is taken for isolated: cutoffs of models are mostly
smaller, and no crystal has one atom to a cell and nearest neighbours so far away."""

NEARLY_ISOLATED, NEARLY_RADII = 4.5, 3.0
"""Å, and covalent radii: single atoms farther than both from their images are in no crystal."""

ISOLATED_PREFIX = "isolated atom "
"""Groups of isolated atoms are named apart: H and H2 share the empirical formula, and not the side."""


@dataclass(frozen=True)
class Structure:
    """One structure with its labels; N atoms.

    Attributes:
        atomic_numbers: (N,) uint8.
        positions: (N, 3) float64, Å; need not lie inside the cell.
        cell: (3, 3) float64, Å, rows are lattice vectors; zeros if nothing is periodic.
        pbc: (3,) bool, periodic along each lattice vector.
        energy: total energy in eV (never per atom), or None.
        forces: (N, 3) float64, eV/Å, or None. Forces of fixed atoms are kept as the engine gave them.
        stress: (3, 3) float64, eV/Å^3, tension positive, or None.
        group: split key: molecule, slab or trajectory id. Structures of one group never land on two sides of
            a split, whatever their source.
        source: name of the data set the structure comes from.
        level: name of the level of theory of its labels.
        fixed: (N,) bool, atoms held fixed by the labeller, or None if none is.
        split: index into SPLITS of the side it was on in the store it comes from, or None.
        notes: what the reader left out or changed, in words; counted in the provenance.
        weights: of its energy, forces and stress in the loss, each 1 unless the file says otherwise.
        config_type: what kind of structure the file says it is, such as "IsolatedAtom"; empty for none.
        file: name of the file it was read from; empty where there is one file only.
        converged: False if the file says that the engine's electronic steps did not converge.
        charge: total charge, e.
        multiplicity: of the spin, 2S + 1; 0 where the file says nothing.
        others: labels of other kinds (`keys.OTHER_LABELS`) by their names.
    """

    atomic_numbers: NDArray[np.uint8]
    positions: Floats
    cell: Floats
    pbc: Bools
    energy: float | None = None
    forces: Floats | None = None
    stress: Floats | None = None
    group: str = ""
    source: str = "default"
    level: str = "unknown"
    fixed: Bools | None = None
    split: int | None = None
    notes: tuple[str, ...] = ()
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    config_type: str = ""
    file: str = ""
    converged: bool = True
    charge: float = 0.0
    multiplicity: int = 0
    others: Mapping[str, Floats] = field(default_factory=dict)

    @property
    def labels(self) -> dict[str, Any]:
        three = {keys.ENERGY: self.energy, keys.FORCES: self.forces, keys.STRESS: self.stress}
        return {name: value for name, value in {**three, **self.others}.items() if value is not None}

    @property
    def num_atoms(self) -> int:
        return len(self.atomic_numbers)

    @property
    def electronic_state(self) -> tuple[float, int]:
        """Charge and multiplicity, the lowest possible one where none is said; what a model does not see.

        Charges that are no whole numbers, as sums of charges that a model gives to atoms, differ from frame
        to frame and tell no states apart: all are one, 0.5.
        """
        charge = float(self.charge)
        odd = round(int(np.sum(self.atomic_numbers, dtype=np.int64)) - charge) % 2
        if not charge.is_integer():
            charge, odd = 0.5, 0
        return charge, self.multiplicity or 1 + odd


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
    for rule, message in _broken(structure, rules):
        raise StructureError(rule, f"{where}: {message}")


def _broken(s: Structure, rules: Rules) -> Iterator[tuple[str, str]]:
    """Each rule that a structure breaks, and what to say of it; a rule holds for what meets those before."""
    yield from _broken_by_atoms(s)
    if s.energy is None and s.forces is None:
        yield "unlabelled", "has neither energy nor forces; a label is needed"
    for name, label in s.labels.items():
        if not np.isfinite(label).all():
            text = f"{name} holds NaN or infinity; leave the frame out, or leave the label out if the engine"
            yield "finite_labels", f"{text} did not compute it"
    if not (np.isfinite(s.charge) and 0 <= s.multiplicity < 1 << 15):
        text = f"must be a finite number of e and a whole number, got {s.charge} and {s.multiplicity}"
        yield "state", f"charge and multiplicity {text}; mend them, or leave the frame out"
    try:
        periodic_cell(np.asarray(s.cell, dtype=np.float64), np.asarray(s.pbc, dtype=bool))
    except ValueError as error:
        yield "lattice", str(error)
    if s.stress is not None and not np.all(s.pbc):
        text = "has a stress but is not periodic in three directions, so no cell volume it could be per"
        yield "lattice", f"{text}; leave the stress out"
    if rules.min_distance > 0:
        (i, j), distances = edge_lengths(s, rules.min_distance)
        if len(distances):
            k = int(np.argmin(distances))
            yield (
                "min_distance",
                f"atoms {i[k]} and {j[k]} overlap: {distances[k]:.4f} Å apart (periodic images counted), the "
                f"limit is {rules.min_distance:g} Å; leave the frame out, or lower the limit (min_distance)",
            )
    largest = 0.0 if s.forces is None else float(np.linalg.norm(s.forces, axis=1).max())
    if largest > rules.max_force:
        yield (
            "max_force",
            f"the largest force is {largest:.4g} eV/Å, above the limit of {rules.max_force:g} eV/Å; check "
            "units and convergence, leave it out, or raise the limit (max_force)",
        )


def _broken_by_atoms(s: Structure) -> Iterator[tuple[str, str]]:
    num_atoms = len(s.atomic_numbers)
    if num_atoms == 0:
        yield "empty", "the structure is empty (0 atoms); remove it"
    shapes: dict[str, tuple[Any, tuple[int, ...]]] = {
        "positions": (s.positions, (num_atoms, 3)),
        "cell": (s.cell, (3, 3)),
        "pbc": (s.pbc, (3,)),
        "forces": (s.forces, (num_atoms, 3)),
        "stress": (s.stress, (3, 3)),
        "fixed": (s.fixed, (num_atoms,)),
    }
    for name, value in s.others.items():
        if name not in keys.LABELS:
            raise ValueError(f"unknown label '{name}'; known are {', '.join(keys.LABELS)} (data/keys.py)")
        label = keys.LABELS[name]
        shapes[name] = (value, (num_atoms, *label.shape) if label.per_atom else label.shape)
    for name, (array, shape) in shapes.items():
        if array is not None and np.shape(array) != shape:
            yield "shape", f"{name} must have shape {shape} for {num_atoms} atoms, got {np.shape(array)}"
    numbers = np.asarray(s.atomic_numbers, dtype=np.int64)
    for unknown in numbers[(numbers < 1) | (numbers > MAX_ATOMIC_NUMBER)]:
        known = f"known are 1 to {MAX_ATOMIC_NUMBER} (dummy atoms must be removed)"
        yield "element", f"unknown element with atomic number {unknown}; {known}"
    if not np.isfinite(s.positions).all():
        yield "finite_positions", "positions hold NaN or infinity; leave the frame out"


def edge_lengths(s: Structure, cutoff: float) -> tuple[Ints, Floats]:
    """(2, E) edges of a structure as of `neighbour_list`, and their lengths (E,), Å."""
    edge_index, shifts = neighbour_list(s.positions, s.cell, s.pbc, cutoff)
    i, j = edge_index
    cell = periodic_cell(np.asarray(s.cell, dtype=np.float64), np.asarray(s.pbc, dtype=bool))
    vectors = s.positions[j] + shifts @ cell - s.positions[i]
    return edge_index, np.linalg.norm(vectors, axis=1)


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
    """The same of the record of a structure; an ion has no reference energy to give, and is none."""
    s = structure
    return not s.charge and is_isolated(s.num_atoms, s.positions, s.cell, s.pbc, s.config_type, distance)


def is_nearly_isolated(structure: Structure) -> bool:
    """Whether a single atom is farther from its images than in any crystal."""
    s = structure
    if s.num_atoms != 1 or s.charge:
        return False
    distance = max(NEARLY_ISOLATED, NEARLY_RADII * float(covalent_radii[int(s.atomic_numbers[0])]))
    return is_isolated(1, s.positions, s.cell, s.pbc, s.config_type, distance)


def isolated_group(structure: Structure) -> str:
    """The group of an isolated atom: all of one element, of any source, lie on one side."""
    return ISOLATED_PREFIX + chemical_symbols[int(structure.atomic_numbers[0])]
