"""The layer as a `MessagePassing` of torch_geometric.

Its sum is `scatter_add` on a CPU, sorted or not: torch_geometric takes `segment_csr` only where it
is given row pointers and no index, which is slower here and loses second derivatives.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing

from tools.bench.peers.model import Sizes, edge_mlp, node_mlp, vector_mlp


class GeometricLayer(MessagePassing):
    """Satorras, Hoogeboom, Welling 2021, eqs. 3-6 in the dialect of docs/model.md."""

    def __init__(self, sizes: Sizes) -> None:
        # edge_index holds destination, then source
        super().__init__(aggr="sum", flow="target_to_source", node_dim=0)
        self.sizes = sizes
        self.norm = nn.RMSNorm(sizes.width, eps=1e-6)
        self.edge_mlp, self.node_mlp = edge_mlp(sizes), node_mlp(sizes)
        if sizes.vector_branch != "none":
            self.vector_mlp = vector_mlp(sizes)

    def forward(
        self, h: Tensor, r: Tensor, d: Tensor, rho: Tensor, f: Tensor, edge_index: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """See peers.model.Layer."""
        n = self.norm(h)
        messages, vectors = self.propagate(edge_index, h=n, r=r, d=d, rho=rho, f=f)
        update = self.node_mlp(torch.cat([n, messages], dim=-1))
        return h + update * self.sizes.node_scale, vectors

    def message(
        self, h_i: Tensor, h_j: Tensor, r: Tensor, d: Tensor, rho: Tensor, f: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Enveloped messages (E, F) and vectors (E, 3)."""
        m = self.edge_mlp(torch.cat([h_i, h_j, rho], dim=-1))
        vectors = r * (self.vector_mlp(m) * f / d) if self.sizes.vector_branch != "none" else None
        return m * f, vectors

    def aggregate(
        self,
        inputs: tuple[Tensor, Tensor | None],
        index: Tensor,
        ptr: Tensor | None = None,
        dim_size: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Sums of both over the neighbours, divided by their mean number."""
        messages, vectors = (
            None if x is None else super(GeometricLayer, self).aggregate(x, index, ptr, dim_size)
            for x in inputs
        )
        divisor = self.sizes.mean_neighbours
        return messages / divisor, None if vectors is None else vectors / divisor
