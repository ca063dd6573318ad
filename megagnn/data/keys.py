"""Names of the tensors in a batch, with their shapes and units, said once.

A batch is a plain ``dict[str, Tensor]``. Letters of shapes: N atoms, B structures, E directed edges.
Units: Å, eV, eV/Å, eV/Å^3 (stress, tension positive). Cell rows are lattice vectors.

An edge points from its source j (sender) to its destination i (receiver): ``edge_index[0] = i``,
``edge_index[1] = j``, sorted by i, then j, then shift, and ``r_ij = x_j + S_ij @ cell - x_i``.
"""

from typing import Final, NamedTuple

# Structure of the graph
ATOMIC_NUMBERS: Final = "atomic_numbers"  # (N,) int64 | atomic numbers, 1..118
POSITIONS: Final = "positions"  # (N, 3) float | Å
CELL: Final = "cell"  # (B, 3, 3) float | Å, rows are lattice vectors; zeros if nothing is periodic
PBC: Final = "pbc"  # (B, 3) bool | periodic along each lattice vector
CHARGE: Final = "charge"  # (B,) float | total charge, e; 0 unless the file says otherwise
MULTIPLICITY: Final = "multiplicity"  # (B,) int64 | of the spin, 2S + 1; 0 where the file says nothing
BATCH: Final = "batch"  # (N,) int64 | structure of each atom
NUM_ATOMS: Final = "num_atoms"  # (B,) int64
GRAPH_PTR: Final = "graph_ptr"  # (B + 1,) int64 | first atom of each structure
EDGE_INDEX: Final = "edge_index"  # (2, E) int64 | row 0 destination i, row 1 source j
CELL_SHIFTS: Final = "cell_shifts"  # (E, 3) float | whole numbers S of lattice vectors
ROW_PTR: Final = "row_ptr"  # (N + 1,) int64 | CSR: edges row_ptr[i]:row_ptr[i + 1] have destination i
SOURCE_PTR: Final = "source_ptr"  # (N + 1,) int64 | CSC: edges source_perm[source_ptr[j]:source_ptr[j + 1]]
SOURCE_PERM: Final = "source_perm"  # (E,) int64 |   have source j (stable sort by source)

# Labels, zero where missing. A model's output dict uses the same first three names.
ENERGY: Final = "energy"  # (B,) float64 | total energy, eV
FORCES: Final = "forces"  # (N, 3) float | eV/Å
STRESS: Final = "stress"  # (B, 3, 3) float | eV/Å^3
DIPOLE: Final = "dipole"  # (B, 3) float | e Å, of molecules, about the origin of the positions
ATOMIC_ENERGIES: Final = "atomic_energies"  # (N,) float64 | eV, of the output only, where asked for
HAS_ENERGY: Final = "has_energy"  # (B,) bool
HAS_FORCES: Final = "has_forces"  # (B,) bool
HAS_STRESS: Final = "has_stress"  # (B,) bool
WEIGHTS: Final = "weights"  # (B, 3) float | of energy, forces and stress in the loss, 1 where nothing is said
FIXED: Final = "fixed"  # (N,) bool | atom held fixed by the labeller

# Where a structure comes from
SOURCE: Final = "source"  # (B,) int64 | index into the data set's source table
LEVEL: Final = "level"  # (B,) int64 | index into its table of levels of theory
STRUCTURE: Final = "structure"  # (B,) int64 | index of the structure in the data set


STAYS: Final = "host:"
"""In the name of a further entry, of a family's own: it stays on the host where the batch goes to a GPU."""


class Label(NamedTuple):
    """A kind of label: a key of batches, of a model's outputs, and an array of stores."""

    bit: int
    """Its bit in the stores' array `labels`."""
    unit: str
    shape: tuple[int, ...] = ()
    """Of one structure, or of one atom."""
    per_atom: bool = False
    stored: str = "<f4"
    """Type on disk; what is stored in double precision stays so in batches."""


LABELS: dict[str, Label] = {
    ENERGY: Label(1, "eV", stored="<f8"),
    FORCES: Label(2, "eV/Å", (3,), per_atom=True),
    STRESS: Label(4, "eV/Å^3, tension positive", (3, 3)),
    DIPOLE: Label(128, "e Å", (3,)),  # bits 8 to 64 are left to labels of one's own
}
"""Every kind of label by its name. A store has arrays of others than the three where a structure has such a
label; batches always have all."""
OTHER_LABELS = tuple(name for name in LABELS if name not in (ENERGY, FORCES, STRESS))


def has(label: str) -> str:
    """Key of the flags, (B,) bool, of the structures that have a label."""
    return f"has_{label}"
