"""The layer as it is usually written in PyTorch: concatenate both atoms and the distance, scatter the sum."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tools.bench.peers.model import Sizes, edge_mlp, node_mlp, vector_mlp

Scatter = Callable[[Tensor, Tensor, int], Tensor]
"""(values (E, K), index (E,), number of rows) -> (N, K)."""


def index_add(values: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """The sum by plain PyTorch."""
    return values.new_zeros(num_rows, values.shape[1]).index_add_(0, index, values)


def torch_scatter_sum(values: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """The sum by torch_scatter."""
    import torch_scatter

    out: Tensor = torch_scatter.scatter(values, index, dim=0, dim_size=num_rows, reduce="sum")
    return out


class UsualLayer(nn.Module):
    """Satorras, Hoogeboom, Welling 2021, eqs. 3-6 in the dialect of docs/model.md, edge by edge."""

    def __init__(self, sizes: Sizes, scatter: Scatter = index_add) -> None:
        super().__init__()
        self.sizes, self.scatter = sizes, scatter
        self.norm = nn.RMSNorm(sizes.width, eps=1e-6)
        self.edge_mlp, self.node_mlp = edge_mlp(sizes), node_mlp(sizes)
        if sizes.vector_branch != "none":
            self.vector_mlp = vector_mlp(sizes)

    def forward(
        self, h: Tensor, r: Tensor, d: Tensor, rho: Tensor, f: Tensor, edge_index: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """See peers.model.Layer."""
        i, j = edge_index[0], edge_index[1]
        n = self.norm(h)
        m = self.edge_mlp(torch.cat([n.index_select(0, i), n.index_select(0, j), rho], dim=1))
        vectors = None
        if self.sizes.vector_branch != "none":
            vectors = self.scatter(r * (self.vector_mlp(m) * f / d), i, len(h)) / self.sizes.mean_neighbours
        messages = self.scatter(m * f, i, len(h)) / self.sizes.mean_neighbours
        update = self.node_mlp(torch.cat([n, messages], dim=1))
        return h + update * self.sizes.node_scale, vectors
