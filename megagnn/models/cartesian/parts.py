"""What layers of the Cartesian family are made of: a norm over all fields, Linears, the energy head."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from megagnn.models.cartesian import messages
from megagnn.models.cartesian.atoms import mean_square, parts_of, scaled
from megagnn.models.cartesian.config import CartesianConfig
from megagnn.models.family import State
from megagnn.models.parts import branch_rate, laws
from megagnn.models.radial import CubicSplines
from megagnn.ops import dual
from megagnn.ops.dual import T
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.parameter import Constant, make_parameter
from megagnn.tensor_parallel.layers import (
    ColumnLinear,
    RMSNorm,
    RowLinear,
    gather_channels,
    scatter_channels,
)

EPSILON = 1e-6


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

    def forward(self, state: State, fused: bool) -> State:
        """See the class; `fused` as in atoms.py."""
        state, square_N1 = mean_square(state, self.widths, self.context, fused)
        return scaled(state, square_N1, EPSILON, self.gains, fused)


def width_key(field: str) -> str:
    """The key that the width of a field has in messages."""
    return {"h": "model.width", "v": "model.vector_width", "t": "model.tensor_width"}[field]


class RowSum(nn.Module):
    """Sum of a Linear of each of an atom's parts, which lie side by side, with one bias: sharded
    (..., parts in/tp) to sharded (..., out/tp).
    """

    def __init__(
        self, config: CartesianConfig, field: str, context: ParallelContext, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.context, self.parts = context, parts_of(config.widths, field)
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

    def forward(self, inputs: Any) -> Any:
        """See the class."""
        weight = torch.cat([self.weights[part] for part in self.parts], 1)
        if self.context.tp_size == 1:
            return dual.linear(inputs, weight, self.bias)
        return dual.add_bias(scatter_channels(dual.linear(inputs, weight), self.context), self.bias)


def splines_of(config: CartesianConfig) -> CubicSplines | None:
    """The splines that take the place of Bessel functions, if any do."""
    if not config.num_splines:
        return None
    return CubicSplines(config.num_splines, config.num_radial, config.cutoff)


class PathWeights(nn.Module):
    """The weights of each path and channel, (P, Fe/tp, R), of K splines (P, Fe/tp, K); sharded.

    They are multiplied by the path's constant and by `scale`.
    """

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
        splines = splines_of(config)
        shape = (len(paths), config.message_width, config.num_splines or config.num_radial)
        law = laws(config, config.num_radial, "input", rate=branch_rate(config))
        initial = splines.initial(law.weight) if splines else law.weight
        self.weight = make_parameter(shape, 1, context, initial, dtype, "model.edge_width", law.weight_rate)
        factors_P11 = torch.tensor(messages.factors(paths), dtype=torch.float64).view(-1, 1, 1) * scale
        self.register_buffer("factors_P11", factors_P11.to(dtype), persistent=False)

    def forward(self) -> Tensor:
        """See the class."""
        return self.weight * self.factors_P11


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
