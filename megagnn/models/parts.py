"""Parts of layers for several families: the edges of a batch, distances, initial weights and rates.

[Note: maximal update] Adam's steps have the size of the rate whatever the gradient is, so one learning rate
for all widths F moves a sum over F inputs by F times the rate: no rate suits both a Linear of F inputs and
one of a few. After Yang et al., "Tensor Programs V", arXiv:2203.03466, table 3, in each step all features
move by an amount that does not depend on F with

    kind    inputs -> outputs  initial variance  rate  what it is here
    input   fixed  -> F        1/inputs          1     embeddings, biases, gains, phi_e's part of the distance
    hidden  F      -> F        1/F               1/F   Linears of phi_e, phi_x, phi_h, the energy head's first
    output  F      -> fixed    1/F^2             1/F   the last Linears of phi_x, of forces and energies

relative to `base_width`, at which it is the standard parametrisation. Rates are on the parameters
(parallel/parameter.py) and in the groups of the optimizer (optim/optimizer.py); the forward pass knows
nothing of them.

Muon and SOAP take 1/sqrt(F) for hidden matrices. Features move alike at every width where the spectral norm
of an update of an (m, n) matrix goes as sqrt(m/n) (Yang, Simon, Bernstein, arXiv:2310.17813, condition 1). A
gradient has few directions, along which the signs of Adam's step add up: its norm goes as F. That of Muon's
step is 0.2 sqrt(F) (optim/rules/muon.py). In the eigenbasis of SOAP those few directions have entries of
one, which would need no share at all, and the many others entries of noise, whose norm is sqrt(F); together
they move features by about F^0.5 at one rate (measured, docs/scaling.md). Where a Linear of concatenated
inputs is held as several matrices, their updates add to a factor that the width does not change. All this is
for matrices whose sides both go with the width: one that keeps its outputs while its inputs grow would need
1/F.

In depth, L node updates of weight 1/sqrt(L) ([Note: depth scaling] in models/egnn/layer.py) move in one
direction once they are trained, and add up to sqrt(L) times one: the rate of what makes them goes by
1/sqrt(L) (Yang et al., "Tensor Programs VI", arXiv:2310.02244, table 1), relative to `base_layers`, under
every rule whose steps have the size of the rate. Coordinate updates weigh 1/L and need nothing.
"""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from megagnn.data import keys
from megagnn.models.config import ModelConfig
from megagnn.ops import Segments, dual
from megagnn.ops.dual import T
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.parameter import Constant, Normal, Uniform
from megagnn.tensor_parallel.layers import LinearLaws, share

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


Kind = Literal["input", "hidden", "output"]


def laws(
    config: ModelConfig,
    in_features: int,
    kind: Kind = "hidden",
    scale: float = 1.0,
    zero_bias: bool = False,
    rate: float = 1.0,
    width: int | None = None,
) -> LinearLaws:
    """A Linear of so many inputs: N(0, scale^2/inputs) without bias, or PyTorch's even law (He et al. 2015).

    Under `mup` also what [Note: maximal update] says of its kind. rate: of the branch that it is in. width:
    the model's, where the inputs are a share or a multiple of it.
    """
    std = in_features**-0.5
    ratio = 1.0
    if kind != "input" and config.parametrisation == "mup":
        ratio = (width or in_features) / config.base_width
    matrix_rate = rate * ratio**-0.5 if kind == "hidden" else None
    size = scale * std * (ratio**-0.5 if kind == "output" else 1.0)
    if config.initialisation == "lecun":
        return LinearLaws(Normal(size), Constant(0.0), rate / ratio, rate, matrix_rate)
    # U(-a, a) with a = sqrt(3) gain std and PyTorch's gain of sqrt(1/3), for weight and bias alike
    bias = Constant(0.0) if zero_bias else Uniform(std)
    return LinearLaws(Uniform(size), bias, rate / ratio, rate, matrix_rate)


def refuse_edge_plan(plan: str, family: str) -> None:
    """Raises ValueError for the plan `edge` in a family whose edges are divided by channels."""
    if plan == "edge":
        raise ValueError(
            f"parallel.plan = 'edge' divides products of channels on edges, of which {family} has none; use "
            "'auto' or 'channel'"
        )


def branch_rate(config: ModelConfig) -> float:
    """Share of the learning rate that the layers' messages and node updates have for their depth."""
    if config.parametrisation == "standard" or not config.depth_scaling:
        return 1.0
    return (config.base_layers / config.num_layers) ** 0.5
