"""From node features to energies; the direct force head is the last layer's `layer.EdgeVector`."""

import torch
from torch import nn

from megagnn.models.egnn.config import EGNNConfig
from megagnn.models.egnn.layer import Activation, FusedAtoms, make_norm, normed_linears
from megagnn.models.parametrisation import laws
from megagnn.ops import node
from megagnn.ops.dual import T
from megagnn.parallel.context import ParallelContext
from megagnn.tensor_parallel.layers import ColumnLinear, RowLinear, gather_channels


class EnergyHead(nn.Module):
    """Atomic energy in units of the output scale: norm, Linear, activation, Linear(-> 1).

    Node features (N, F/tp), sharded, to (N,), replicated. The last Linear starts small: initial energies are
    the references.
    """

    def __init__(self, config: EGNNConfig, context: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        width, self.context = config.width, context
        last = laws(config, width, "output", scale=0.1, zero_bias=True)
        self.fused_atoms = FusedAtoms(config, context)
        self.norm = make_norm(config, context, dtype)
        self.hidden = ColumnLinear(width, width, context, laws(config, width), dtype)
        self.activation = Activation(config)
        self.out = RowLinear(width, 1, context, last, dtype)

    def forward(self, h_NF: T) -> T:
        """See the class."""
        plain_NF = self.fused_atoms.served(h_NF, self.out.weight)
        if plain_NF is not None:
            (u_NF,) = normed_linears(self.norm, plain_NF, [self.hidden])
            energy_N: T = node.silu_linear(u_NF, self.out.weight, self.out.bias).squeeze(-1)  # type: ignore[assignment]
            return energy_N
        normed_NF = gather_channels(self.norm(h_NF), self.context)
        energy_N1: T = self.out(self.activation(self.hidden(normed_NF)))
        return energy_N1.squeeze(-1)
