"""Plans of the edge operation that come with a batch, made by the process that makes the batch.

What a pass needs beside the edges, their blocks and who works on them and on a GPU each block's edges in the
order of their senders, depends on sizes of the layers alone (`types.EdgeGraph.plan`). Made in a step on a GPU
it takes three copies to the host, and the step waits for each. What a batch does not bring is made there.
"""

from dataclasses import dataclass

from torch import Tensor

from megagnn.data import keys
from megagnn.models.egnn.edge.runner import plan_key
from megagnn.models.egnn.edge.types import EdgeGraph
from megagnn.ops.segment import Segments

_PREFIX = "edge_plan"
_NAMES = (keys.STAYS + "blocks", keys.STAYS + "workers", "order", "runs", "run_begin")


@dataclass(frozen=True)
class EdgePlanner:
    """Adds to a batch on the host the plans of the passes that a training takes.

    Args:
        shape: (M, H) of the W2 product.
        element_size: bytes of the type that the kernels compute in.
        block_edges: as in `EdgeSpec`.
        planes: 1 for passes on values, 2 for those on pairs.
        on_cpu: where the steps run; on_threads: how many there are.
    """

    shape: tuple[int, int]
    element_size: int
    block_edges: int | None
    planes: tuple[int, ...]
    on_cpu: bool
    on_threads: int

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch's further entries."""
        graph, found = edge_graph(batch), {}
        for planes in self.planes:
            key = plan_key(
                self.block_edges,
                self.shape,
                self.element_size,
                graph.destination.num_entries,
                planes,
                self.on_threads if self.on_cpu else None,
            )
            for name, tensor in zip(_NAMES, graph.plan(*key, with_runs=not self.on_cpu), strict=True):
                found[_name(key, name)] = tensor
        return found


def edge_graph(batch: dict[str, Tensor]) -> EdgeGraph:
    """All edges of a batch, with the plans that came with it."""
    index, prefix = batch[keys.EDGE_INDEX], f"{_PREFIX}/"
    graph = EdgeGraph(
        Segments(index[0], batch[keys.ROW_PTR]),
        Segments(index[1], batch[keys.SOURCE_PTR], batch[keys.SOURCE_PERM]),
    )
    first = [name for name in batch if name.startswith(prefix) and name.endswith(_NAMES[0])]
    for name in first:
        block_edges, num_workers = map(int, name.split("/")[1:3])
        key = (block_edges, num_workers)
        graph.bring(key, tuple(batch[_name(key, part)] for part in _NAMES))
    return graph


def _name(key: tuple[int, int], part: str) -> str:
    return f"{_PREFIX}/{key[0]}/{key[1]}/{part}"
