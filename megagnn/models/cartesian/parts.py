"""What layers of the Cartesian family are made of: a norm over all fields, Linears, the energy head."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from megagnn.models.cartesian import messages
from megagnn.models.cartesian.config import CartesianConfig
from megagnn.models.cartesian.messages import COMPONENTS, added
from megagnn.models.family import State
from megagnn.models.parts import branch_rate, laws
from megagnn.ops import dual
from megagnn.ops.dual import T
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.parameter import Constant, make_parameter
from megagnn.tensor_parallel.layers import (
    ColumnLinear,
    RMSNorm,
    RowLinear,
    gather_channels,
    reduce_partial,
    scatter_channels,
    share,
)

EPSILON = 1e-6
PARTS = {"h": ("gated", "vv", "tt"), "v": ("gated", "tv"), "t": ("gated", "vv", "tt")}
"""What the last Linears of a layer read, by field: the features times a gate, and products of two."""


def parts_of(config: CartesianConfig, field: str) -> tuple[str, ...]:
    """`PARTS` of a field, without products of tensors where there are none."""
    return tuple(part for part in PARTS[field] if "t" in config.widths or part in ("gated", "vv"))


def mean_square(state: Mapping[str, T], widths: Mapping[str, int], context: ParallelContext) -> Any:
    """Mean over the fields of the mean square of their components: sharded fields to replicated (N, 1)."""
    terms: list[Any] = []
    for name, x in state.items():
        square = dual.square_sum(x)
        square = square if name == "h" else square.sum(-2)
        terms.append(square * (1.0 / (len(state) * COMPONENTS[name] * widths[name])))
    return reduce_partial(added(terms), context)


def scale_atoms(field: str, x: Any, factor_N1: Any) -> Any:
    """Features like those of a field times a number for each atom, in the type of the features."""
    return (x * (factor_N1 if field == "h" else factor_N1.unsqueeze(-1))).to(x.dtype)


class MergedNorm(nn.Module):
    """Fields over the root of the mean square of all, times a gain per channel; sharded."""

    def __init__(
        self, config: CartesianConfig, names: Iterable[str], context: ParallelContext, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.widths, self.context, rate = config.widths, context, branch_rate(config)
        self.gains = nn.ParameterDict(
            {
                name: make_parameter(
                    (self.widths[name],), 0, context, Constant(1.0), dtype, width_key(name), rate
                )
                for name in names
            }
        )

    def forward(self, state: State) -> State:
        """See the class."""
        square_N1 = mean_square(state, self.widths, self.context) + EPSILON
        inverse_N1 = share(dual.rsqrt(square_N1), self.context)
        return {name: scale_atoms(name, x, inverse_N1) * self.gains[name] for name, x in state.items()}


def width_key(field: str) -> str:
    """The key that the width of a field has in messages."""
    return {"h": "model.width", "v": "model.vector_width", "t": "model.tensor_width"}[field]


class RowSum(nn.Module):
    """Sum of a Linear of each input, with one bias: sharded (..., in/tp) each to sharded (..., out/tp).

    Over ranks one message for all.
    """

    def __init__(
        self, config: CartesianConfig, field: str, context: ParallelContext, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.context, self.parts = context, parts_of(config, field)
        inputs, outputs = config.message_width, config.widths[field]
        law = laws(config, len(self.parts) * inputs, rate=branch_rate(config), width=config.width)
        shape, how = (outputs, inputs), (law.weight_rate, law.matrix_rate)
        self.weights = nn.ParameterDict(
            {
                part: make_parameter(shape, 1, context, law.weight, dtype, "model.edge_width", *how)
                for part in self.parts
            }
        )
        self.bias = None
        if field == "h":
            self.bias = make_parameter(
                (outputs,), 0, context, law.bias, dtype, width_key(field), law.bias_rate
            )

    def forward(self, inputs: Mapping[str, Any]) -> Any:
        """See the class."""
        partial = added([dual.linear(inputs[part], self.weights[part]) for part in self.parts])
        return dual.add_bias(scatter_channels(partial, self.context), self.bias)


class PathWeights(nn.Module):
    """The weights of each path and channel, (P, Fe/tp, R), times the path's constant and `scale`; sharded."""

    factors_P11: Tensor

    def __init__(
        self,
        config: CartesianConfig,
        paths: Mapping[int, messages.Path],
        scale: float,
        context: ParallelContext,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        shape = (len(paths), config.message_width, config.num_radial)
        law = laws(config, config.num_radial, "input", rate=branch_rate(config))
        self.weight = make_parameter(
            shape, 1, context, law.weight, dtype, "model.edge_width", law.weight_rate
        )
        factors_P11 = torch.tensor(messages.factors(paths), dtype=torch.float64).view(-1, 1, 1) * scale
        self.register_buffer("factors_P11", factors_P11.to(dtype), persistent=False)

    def forward(self) -> Tensor:
        """See the class."""
        return self.weight * self.factors_P11


def to_matrix(t: T, basis: Tensor) -> T:
    """Components (N, 5, F) to matrices (N, 3, 3, F)."""
    flat = basis.flatten(1).mT
    return dual.linear_map(t, lambda x: (flat @ x).unflatten(-2, (3, 3)))


def from_matrix(m: T, basis: Tensor) -> T:
    """Components (N, 5, F) of the symmetric traceless part of matrices (N, 3, 3, F)."""
    flat = basis.flatten(1)
    return dual.linear_map(m, lambda x: flat @ x.flatten(-3, -2))


class EnergyHead(nn.Module):
    """Atomic energy in units of the output scale: norm, Linear, SiLU, Linear(-> 1).

    Scalars (N, F/tp), sharded, to (N,), replicated. The last Linear starts small: initial energies are the
    references.
    """

    def __init__(self, config: CartesianConfig, context: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        width, self.context = config.width, context
        last = laws(config, width, "output", scale=0.1, zero_bias=True)
        self.norm = RMSNorm(width, context, dtype)
        self.hidden = ColumnLinear(width, width, context, laws(config, width), dtype)
        self.out = RowLinear(width, 1, context, last, dtype)

    def forward(self, h_NF: T) -> T:
        """See the class."""
        n_NF = gather_channels(self.norm(h_NF), self.context)
        energy_N1: T = self.out(dual.silu(self.hidden(n_NF)))
        return energy_N1.squeeze(-1)
