"""What a layer of the EGNN keeps from its forward to its backward.

With the letters of traffic_model.py, t ranks and P planes, numbers per atom and per edge on one rank:

    fused, values       F + 2 H + M + 2 D + 1                    M + K     pre-activations (c, g); none where
    fused, pairs        4 F + 4 H + 2 M + 4 D + 4                2 (M + K)     blocks are recomputed
    unfused, values     3 F + M + 2 D + 1                        2 (H + M + K) + 3 R + 5
    unfused, pairs      4 F + 2 M + 4 D + 4                      4 (H + M + K) + 9 R + 1
    layer again         P (F + 3), with recomputed blocks P (F + M + 6); the layer itself while it is at work
    create_graph        16 F fused, with 5 F^2 of weights' gradients; 13 F unfused; layers again 12 F and 9 F;
                        all widths alike

Over tensor-parallel ranks the normed features are whole on each, all else of atoms and edges is a t-th, and
`edge` keeps p of its own rows and all of q. A layer with a coordinate branch also keeps its edge vectors, and
without a branch there is no K. tests/models/test_kept.py holds all this against what the allocator counts.
"""

from megagnn.models.costs import EdgePlan, How, Kept
from megagnn.models.egnn.config import EGNNConfig
from megagnn.models.egnn.layer import fuses_edges
from megagnn.models.egnn.traffic_model import Widths, has_vector

_HEAD = {"plain": (2, 2), "probe": (1, 2), "pair": (8, 10), "graph": (5, 7)}
"""Features of an atom in embedding and energy head, and where layers run again."""
_FIRST = {"plain": (4, 7), "probe": (11, 14), "pair": (8, 20), "graph": (15, 18)}
"""Numbers of an edge that all layers share, and where layers run again."""


def kept(config: EGNNConfig, layer: int, how: How, ranks: int, plan: EdgePlan) -> Kept:
    """See `Model.kept` and the module."""
    w, planes, t = Widths.of(config), 2 if how == "pair" else 1, ranks
    if layer == config.num_layers:
        return Kept(
            _HEAD[how][config.recompute_layers] * w.F / t + 5 * planes, _FIRST[how][config.recompute_layers]
        )
    again, fused = config.recompute_layers, fuses_edges(config)
    blocks_again = fused and config.edge_memory == "recompute"
    K, moves = (w.K if has_vector(config, layer) else 0), 3 * planes * (config.num_layers - 1 > layer)
    if how == "graph":
        atoms = ((12 if again else 16) if fused else (9 if again else 13)) * w.F / t
        edges = _graph_edges(w, K, fused, again, blocks_again)
        fixed = 5 * w.F**2 / t if fused else 0
        return Kept(atoms, edges / t + moves, fixed, 0, 0 if fused else 3 * w.F / t)
    whole, divided, edges = _layer(w, K, how, fused, blocks_again)
    atoms = whole + (divided if t == 1 else divided + (planes - 1) * w.F) / t + planes
    if t > 1 and plan == "edge":
        atoms += planes * w.H
    work = {"plain": 1, "probe": 1, "pair": 6}[how] * w.F
    widest = {"plain": 1, "probe": 1, "pair": 13}[how] * w.F / t
    weights = 2 * w.weights(K > 0) if t > 1 and plan == "edge" else 0  # whole ones, and their gradients
    if not again:
        return Kept(atoms, edges / t + moves, 0, work, 0 if fused else widest, weights)
    inputs = planes * (w.F / t + 3) + (planes * (w.M / t + 3) if blocks_again else 0)
    return Kept(inputs, moves, 0, max(work, atoms), edges / t + (0 if fused else widest), weights)


def _layer(w: Widths, K: int, how: How, fused: bool, blocks_again: bool) -> tuple[float, float, float]:
    """Per atom what is whole and what is divided over tensor-parallel ranks, and per edge."""
    if fused:
        edges = 0 if blocks_again else w.M + K
        if how == "pair":
            return 2 * w.F, 2 * w.F + 4 * w.H + 2 * w.M + 4 * w.D, 2 * edges
        return w.F, 2 * w.H + w.M + 2 * w.D, edges
    if how == "probe":
        return w.F, w.D, w.H + 2 * w.M + K + 2 * w.R + 6
    if how == "pair":
        return 2 * w.F, 2 * w.F + 2 * w.M + 4 * w.D, 4 * (w.H + w.M + K) + 9 * w.R + 1
    return w.F, 2 * w.F + w.M + 2 * w.D, 2 * (w.H + w.M + K) + 3 * w.R + 5


def _graph_edges(w: Widths, K: int, fused: bool, again: bool, blocks_again: bool) -> float:
    if fused:
        return 0 if again or blocks_again else w.M + K
    return (11 if again else 13) * (w.H + w.M + K) / 3 + 8 * w.R
