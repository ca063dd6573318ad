"""Parts of the edge operation by name, its weights, and the graph cut into blocks."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megagnn.ops.segment import Segments

FEATURES = ("bessel", "gaussian", "distance", "squared")
DIRECTIONS = ("unit", "vector", "plus_one")
ACTIVATIONS = ("silu", "relu")
NUM_INPUTS, NUM_WEIGHTS = 4, 8
_OPS = torch.ops.megagnn


@dataclass(frozen=True)
class EdgeSpec:
    """What the operation computes: the equations of megagnn/models/egnn/edge/message.py."""

    feature: Literal["bessel", "gaussian", "distance", "squared"] = "bessel"
    """rho: see `radial.distance_features`."""
    direction: Literal["unit", "vector", "plus_one"] = "unit"
    """t(d): 1/d, 1 or 1/(d+1)."""
    activation: Literal["silu", "relu"] = "silu"
    bounded: bool = False
    """tanh on the scalar of the vector branch."""
    epsilon: float = 1e-3
    """d = sqrt(|r|^2 + epsilon^2), Å."""
    cutoff: float = 5.0
    """c of the Bessel basis, Å."""
    spread: float = 1.0
    """w of the Gaussian basis, Å."""
    memory: Literal["recompute", "save"] = "recompute"
    """Recompute the blocks in the backward, or keep what their products gave: (M + K) numbers per edge."""
    block_edges: int | None = None
    """Edges of a block; None takes what fits the cache."""


class EdgeWeights(NamedTuple):
    """Weights of the operation; those of the vector branch and absent parts are None."""

    centres_R: Tensor | None
    """Frequencies of the Bessel basis, 1/Å, or centres of the Gaussian one, Å; a constant."""
    w1c_HR: Tensor
    w2_MH: Tensor
    b2_M: Tensor
    w3_KM: Tensor | None = None
    b3_K: Tensor | None = None
    w4_K: Tensor | None = None
    b4_1: Tensor | None = None


@dataclass(frozen=True)
class EdgeGraph:
    """Both ends of the edges, and how they are cut into blocks.

    destination: Segments of the receivers; the edges must be sorted by them.
    source: Segments of the senders.
    """

    destination: Segments
    source: Segments
    _plans: dict[tuple[int, int], tuple[Tensor, ...]] = field(default_factory=dict, init=False, repr=False)

    def bring(self, key: tuple[int, int], plan: tuple[Tensor, ...]) -> None:
        """Take a plan that was made before, of `key` edges a block and workers."""
        self._plans[key] = plan

    def plan(self, block_edges: int, num_workers: int, with_runs: bool | None = None) -> tuple[Tensor, ...]:
        """Blocks and workers, with `with_runs` also the blocks' edges by source, else three empty tensors;
        [Note: plan] in csrc. Made once.

        with_runs: by default where the graph is on a GPU.
        """
        key = (block_edges, num_workers)
        if key not in self._plans:
            on_gpu = not self.destination.index.is_cpu
            self._plans[key] = self._make(*key, on_gpu if with_runs is None else with_runs)
        return self._plans[key]

    def _make(self, block_edges: int, num_workers: int, with_runs: bool) -> tuple[Tensor, ...]:
        if self.destination.perm is not None:
            raise ValueError(
                "edge_message: edges must be sorted by destination, got destination segments with a perm"
            )
        ends = [t.cpu() for t in (self.destination.index, self.source.index, self.destination.ptr)]
        blocks, workers = _OPS.edge_plan(*ends, self.source.num_rows, block_edges, num_workers)
        return blocks, workers, *(self._runs(blocks) if with_runs else (blocks.new_empty(0),) * 3)

    def _runs(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each block's edges in the order of their sources; each block's first run; each run's first edge."""
        block_edges = blocks.view(-1, 4)[:, 1] - blocks.view(-1, 4)[:, 0]
        block_E = torch.repeat_interleave(block_edges.to(self.source.index.device))
        key_E, order_E = (block_E * self.source.num_rows + self.source.index).sort(stable=True)
        _, run_E, counts = key_E.unique_consecutive(return_inverse=True, return_counts=True)
        run_begin = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        first_edges = torch.cat([block_edges.new_zeros(1), block_edges.cumsum(0)]).to(run_E.device)
        runs = torch.cat([run_E, run_E.new_tensor([len(counts)])])[first_edges]
        return order_E, runs, run_begin
