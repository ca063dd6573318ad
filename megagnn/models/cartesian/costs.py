"""What a layer of the Cartesian family sends and keeps.

With t tensor-parallel ranks, u = (t-1)/t, P planes, N atoms, S and S' channels times components of the fields
that a layer reads and writes, all edges divided by channels, elements that a rank sends:

    forward     u P N (S + S') + 4u P N     normed fields gathered, changes scattered, two mean squares
    backward    the same; in the first layer nothing goes to the features where no weights are wanted
    again       the forward, but for the last scatter
    direct forces 6u P N, energy head u P N F + 4u P N forward and u P N F + 2u P N backward

and numbers that it keeps per atom, with c components in all fields and C in those read, Y the parts of the
changes and G gates, of messages Fe wide: S (the state), S (normed, whole on every rank), Fe (C + 2c + Y + G);
a probe neither normed fields nor parts. Weights that are multiplied together lie side by side in copies.
"""

from collections.abc import Iterable

from megagnn.models.cartesian.atoms import parts_of
from megagnn.models.cartesian.config import CartesianConfig
from megagnn.models.cartesian.messages import COMPONENTS, paths_of
from megagnn.models.costs import EdgePlan, How, Kept, Pass, Setting


def reads_of(config: CartesianConfig, number: int) -> tuple[str, ...]:
    """Fields of the state before a layer."""
    return tuple(config.widths) if number else ("h",)


def writes_of(config: CartesianConfig, number: int) -> tuple[str, ...]:
    """Fields that a layer changes: of the last one what outputs read."""
    if number < config.num_layers - 1:
        return tuple(config.widths)
    return ("h", "v") if config.forces == "direct" else ("h",)


def _size(config: CartesianConfig, names: Iterable[str]) -> int:
    return sum(COMPONENTS[name] * config.widths[name] for name in names)


def traffic(config: CartesianConfig, layer: int, plan: EdgePlan, setting: Setting) -> Pass:
    """See `Model.traffic` and the module."""
    s = setting
    unit = s.u * s.planes * s.num_atoms
    square = 2 * unit
    if layer == config.num_layers:
        return Pass(2 * square + unit * config.width, square + unit * config.width)
    reads, writes = reads_of(config, layer), writes_of(config, layer)
    entry, changes = square + unit * _size(config, reads), unit * _size(config, writes)
    forces = 6 * unit if layer == config.num_layers - 1 and config.forces == "direct" else 0
    forward, backward = entry + square + changes + forces, square + changes
    if layer or s.weights_wanted:
        backward += entry
    if s.layers_again:
        backward += forward - (forces or unit * _size(config, writes[-1:]))
    return Pass(forward, backward)


def kept(config: CartesianConfig, layer: int, how: How, ranks: int, plan: EdgePlan) -> Kept:
    """See `Model.kept` and the module. Raises ValueError for `create_graph`."""
    if how == "graph":
        raise ValueError(
            "what the Cartesian family keeps for train.gradient_method = 'create_graph' is not known; plan "
            "'one_backward'"
        )
    planes, F, Fe = 2 if how == "pair" else 1, config.width, config.message_width
    if layer == config.num_layers:
        shared = 5 * config.num_radial + 9 if how == "probe" else planes * (config.num_radial + 3)
        return Kept(planes * (5 if config.recompute_layers else 3) * F / ranks, shared)
    reads, writes, names = reads_of(config, layer), writes_of(config, layer), tuple(config.widths)
    state, components = _size(config, reads), sum(COMPONENTS[name] for name in names)
    read = sum(COMPONENTS[name] for name in reads)
    parts = sum(COMPONENTS[name] * len(parts_of(config.widths, name)) for name in writes)
    paths = len(paths_of(config.paths, reads))
    whole, divided = state, Fe * (read + 2 * components + parts + len(writes)) + state
    if how == "probe":
        whole, divided = 0, Fe * (read + 2 * components + len(writes)) + state
    edges = 0.0
    if config.edge_operation == "unfused":
        divided, edges = divided + 2 * state, planes * 2 * paths * Fe / ranks
    weights = paths * Fe * (config.num_splines or config.num_radial)
    weights += Fe * (2 * sum(config.widths[name] for name in reads) + len(writes) * F)
    weights += Fe * sum(len(parts_of(config.widths, name)) * config.widths[name] for name in writes)
    fixed, atoms = weights / ranks, planes * (whole + divided / ranks)
    work = planes * 3 * F
    if not config.recompute_layers:
        return Kept(atoms, edges, fixed, work, edges)
    return Kept(planes * state / ranks, 0, 0, atoms + work, 2 * edges)
