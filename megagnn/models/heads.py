"""From node features to energies; the direct force head is the last layer's `layer.EdgeVector`."""

import torch
from torch import Tensor, nn

from megagnn.config import ModelConfig
from megagnn.models.layer import make_activation, make_norm


class EnergyHead(nn.Module):
    """Atomic energy in units of the output scale: norm, Linear, activation, Linear(-> 1); (N, F) -> (N,)."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = make_norm(config, dtype)
        self.hidden = nn.Linear(config.width, config.width, dtype=dtype)
        self.activation = make_activation(config)
        self.out = nn.Linear(config.width, 1, dtype=dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The last Linear starts small: initial energies are the references."""
        self.out.weight.mul_(0.1)
        self.out.bias.zero_()

    def forward(self, h_NF: Tensor) -> Tensor:
        """See the class."""
        energy_N1: Tensor = self.out(self.activation(self.hidden(self.norm(h_NF))))
        return energy_N1.squeeze(-1)
