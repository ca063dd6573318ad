"""Linear, embedding and norm over tensor-parallel ranks; on one rank the ordinary ones.

Node features are *sharded* by channels: each rank holds (N, F/tp). Inputs and results are tensors or `Dual`
ones, whose value and tangent travel in one message. Kinds: [Note: four kinds] in parallel/collectives.py.
After Shoeybi et al., "Megatron-LM", arXiv:1909.08053, section 3, with the all-reduce of its row-parallel
product halved into a reduce-scatter here and an all-gather where the next product needs all channels, as in
Korthikanti et al., arXiv:2205.05198, section 4.2.2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megagnn.ops import dual
from megagnn.ops.dispatch import accumulator_type
from megagnn.ops.dual import T
from megagnn.parallel import collectives
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.parameter import Constant, Initial, Normal, make_parameter


@dataclass(frozen=True)
class LinearLaws:
    """How a Linear's weight and bias begin, and their shares of the learning rate."""

    weight: Initial
    bias: Initial
    weight_rate: float = 1.0
    bias_rate: float = 1.0
    matrix_rate: float | None = None
    """The weight's under an update rule of matrices (parallel/parameter.py)."""


def gather_channels(x: T, context: ParallelContext) -> T:
    """Sharded (..., F/tp) to shared (..., F)."""
    return _together(x, context, lambda t: collectives.gather(t, -1, context))


def scatter_channels(x: T, context: ParallelContext) -> T:
    """Partial (..., F) to sharded (..., F/tp)."""
    return _together(x, context, lambda t: collectives.reduce_scatter(t, -1, context))


def reduce_partial(x: T, context: ParallelContext) -> T:
    """Partial to replicated."""
    return _together(x, context, lambda t: collectives.reduce(t, context))


def share(x: T, context: ParallelContext) -> T:
    """Replicated to shared."""
    return _together(x, context, lambda t: collectives.copy(t, context))


def _together(x: T, context: ParallelContext, function: dual.Map) -> T:
    """A collective of a tensor, or of both planes of a Dual in one message."""
    if context.tp_size == 1:
        return x
    return dual.Dual.of_planes(function(x.planes)) if isinstance(x, dual.Dual) else function(x)


class ColumnLinear(nn.Module):
    """x W^T + b with the outputs divided: shared (..., in) to sharded (..., out/tp)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        context: ParallelContext,
        laws: LinearLaws,
        dtype: torch.dtype,
        bias: bool = True,
        name: str = "model.width",
    ) -> None:
        super().__init__()
        shape = (out_features, in_features)
        self.weight = make_parameter(
            shape, 0, context, laws.weight, dtype, name, laws.weight_rate, laws.matrix_rate
        )
        self.bias = None
        if bias:
            self.bias = make_parameter(shape[:1], 0, context, laws.bias, dtype, name, laws.bias_rate)

    def forward(self, x: T) -> T:
        return dual.linear(x, self.weight, self.bias)


class RowLinear(nn.Module):
    """x W^T + b with the inputs divided: sharded (..., in/tp) to sharded (..., out/tp).

    With `out_features = 1`, which cannot be divided, the result and the bias are replicated, and of bfloat16
    the product is made, summed over ranks and given in float32. `names` are those of both widths in messages.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        context: ParallelContext,
        laws: LinearLaws,
        dtype: torch.dtype,
        bias: bool = True,
        names: tuple[str, str] = ("model.width", "model.width"),
    ) -> None:
        super().__init__()
        self.context, self.scattered = context, out_features > 1
        shape = (out_features, in_features)
        self.weight = make_parameter(
            shape, 1, context, laws.weight, dtype, names[0], laws.weight_rate, laws.matrix_rate
        )
        self.bias = None
        if bias:
            dim = 0 if self.scattered else None
            self.bias = make_parameter(shape[:1], dim, context, laws.bias, dtype, names[1], laws.bias_rate)

    def forward(self, x: T) -> T:
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if not self.scattered:
            wide = accumulator_type(x.dtype)
            x, weight, bias = x.to(wide), weight.to(wide), None if bias is None else bias.to(wide)
        if self.context.tp_size == 1:
            return dual.linear(x, weight, bias)
        partial = dual.linear(x, weight)
        summed = (scatter_channels if self.scattered else reduce_partial)(partial, self.context)
        return dual.add_bias(summed, bias)


class Embedding(nn.Module):
    """A row of the table for each index, the channels divided: (N,) int64 to sharded (N, F/tp).

    A row of the table has as many gradients as there are atoms of its kind: they are added in float32 where
    the table is bfloat16.
    """

    def __init__(self, num_rows: int, width: int, context: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = make_parameter((num_rows, width), 1, context, Normal(1.0), dtype, "model.width")

    def forward(self, index_N: Tensor) -> Tensor:
        table = self.weight.to(accumulator_type(self.weight.dtype))
        return nn.functional.embedding(index_N, table).to(self.weight.dtype)


class RMSNorm(nn.Module):
    """h / sqrt(mean(h^2) + eps) times a gain per channel (Zhang and Sennrich 2019, eq. 4), sharded.

    Of bfloat16 features the mean square, its sum over ranks and the root are float32.
    """

    def __init__(
        self,
        width: int,
        context: ParallelContext,
        dtype: torch.dtype,
        eps: float = 1e-6,
        rate: float = 1.0,
    ) -> None:
        super().__init__()
        self.width, self.context, self.eps = width, context, eps
        self.gain_F = make_parameter((width,), 0, context, Constant(1.0), dtype, "model.width", rate)

    def forward(self, h_NF: T) -> T:
        sum_N1 = reduce_partial(dual.square_sum(h_NF), self.context)
        inverse_N1 = share(dual.rsqrt(sum_N1 * (1.0 / self.width) + self.eps), self.context)
        return dual.scale_rows(h_NF, inverse_N1, self.gain_F)
