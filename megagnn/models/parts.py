"""What layers of several families are made of: the edges of a batch, distances, activations."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megagnn.data import keys
from megagnn.ops import Segments, dual
from megagnn.ops.dual import T
from megagnn.parallel.context import ParallelContext
from megagnn.tensor_parallel.layers import share

# Added in quadrature to every distance, in Å: d = sqrt(|r|^2 + eps^2) has finite derivatives where two atoms
# coincide, and differs from |r| by 5e-7 Å at 1 Å.
DISTANCE_EPSILON = 1e-3


@dataclass(frozen=True)
class Graph:
    """The edges of a batch, sorted by receiver: what layers of generic operations share."""

    destination: Segments
    """Receiver i of each edge."""
    source: Segments
    """Sender j of each edge."""
    r_EC: Tensor | dual.Dual
    """x_j + shift_ij - x_i, Å, (E, 3)."""


def graph_of(batch: dict[str, Any], context: ParallelContext) -> Graph:
    """All edges of a batch; positions and cells are shared, so their gradients are summed over tp ranks."""
    index = batch[keys.EDGE_INDEX]
    destination = Segments(index[0], batch[keys.ROW_PTR])
    source = Segments(index[1], batch[keys.SOURCE_PTR], batch[keys.SOURCE_PERM])
    cell_B33, x_NC = share(batch[keys.CELL], context), share(batch[keys.POSITIONS], context)
    shift_EC = dual.lattice_shift(cell_B33, batch[keys.CELL_SHIFTS], batch[keys.BATCH][index[0]])
    return Graph(destination, source, dual.edge_difference(x_NC, x_NC, shift_EC, destination, source))


def edge_distances(r_EC: T) -> T:
    """sqrt(|r|^2 + eps^2), Å: (E, 3) to (E,); every derivative is finite where two atoms coincide."""
    return dual.distance(r_EC, DISTANCE_EPSILON)
