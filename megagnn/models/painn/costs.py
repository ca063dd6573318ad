"""What a layer of PaiNN sends and keeps.

With t tensor-parallel ranks, u = (t-1)/t, P planes and N atoms, all edges divided by channels, a rank sends
8u P N F elements forward (gathers of h twice, of hidden features twice, of |p|, and 3 F of v) and as many
backward, in the first layer 2u P N F less where no weights are wanted; an energy head of hidden width K
u P N K, and 2u P N forward. What is kept was counted by the allocator, in features of an atom and an edge:
21 and 10, of pairs 44 and 20, of a probe 13 and 14, and while a layer is at work 8 or 14 more of its edges.
"""

from megagnn.models.costs import EdgePlan, How, Kept, Pass, Setting
from megagnn.models.painn.config import PaiNNConfig

_EDGES = {"plain": (10, 4, 8), "probe": (14, 5, 2), "pair": (20, 8, 14)}
"""(of a layer, of the first, which has no vectors, at work)."""
_ATOMS = {"plain": 21, "probe": 13, "pair": 44}


def head_width(config: PaiNNConfig) -> int:
    """Hidden width of the energy head."""
    return config.head_width or config.width // 2


def traffic(config: PaiNNConfig, layer: int, plan: EdgePlan, setting: Setting) -> Pass:
    """See `Model.traffic` and the module."""
    s = setting
    unit = s.u * s.planes * s.num_atoms
    if layer == config.num_layers:
        return Pass(unit * (head_width(config) + 2), unit * head_width(config))
    forces = 6 * unit if layer == config.num_layers - 1 and config.forces == "direct" else 0
    gathers = 8 * unit * config.width
    backward = gathers - (0 if layer or s.weights_wanted else 2 * unit * config.width)
    return Pass(gathers + forces, backward + (gathers if s.layers_again else 0))


def kept(config: PaiNNConfig, layer: int, how: How, ranks: int, plan: EdgePlan) -> Kept:
    """See `Model.kept` and the module. Raises ValueError for `create_graph`."""
    if how == "graph":
        raise ValueError(
            "what PaiNN keeps for train.gradient_method = 'create_graph' is not known; plan 'one_backward'"
        )
    planes, F = 2 if how == "pair" else 1, config.width
    if layer == config.num_layers:
        head = 10 if planes == 2 and config.recompute_layers else 3 * planes
        return Kept(head * F / ranks, planes * (config.num_radial + 4))
    later, first, work = (number * F / ranks for number in _EDGES[how])
    gathered = 8 * planes * F
    atoms, edges = gathered + (_ATOMS[how] * F - gathered) / ranks, later if layer else first
    if not config.recompute_layers:
        return Kept(atoms, edges, 0, 0, work)
    inputs = (10 if planes == 2 else 4) if layer else planes
    return Kept(inputs * F / ranks, 0, 0, atoms, edges + work)
