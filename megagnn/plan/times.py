"""How long a step takes, what it makes, and what it costs (docs/planning.md).

Products run at their share of the peak; what is not a product takes as long as what the layers keep is on its
way to memory and back. Messages of tensor parallelism are waited for; those of data parallelism
travel beside the last backward, and what is left of them is waited for; those of pipelines as the simulator
has them. The update reads and writes all state once, from where it lies.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from megagnn.models.family import layer_works, step_flops
from megagnn.optim.rule import ELEMENT_OPERATIONS
from megagnn.pipeline_parallel.actions import Kind
from megagnn.pipeline_parallel.simulate import CONSERVATIVE, ORDINARY, RECOMPUTED, Costs, simulate
from megagnn.plan.cluster import Cluster
from megagnn.plan.layout import Layout
from megagnn.plan.memory import offloaded, unit_bytes
from megagnn.plan.traffic import Sent, largest_message, sent

ORDINARY_RECOMPUTED: Mapping[Kind, float] = {**ORDINARY, "B": 3, "I": 2}
GRAPH_UNITS = {False: 12, True: 6}
"""Products of a step by create_graph in units of a forward's: with edges in blocks, and as plain tensors."""


@dataclass(frozen=True)
class Times:
    """Of one step, s, on the pipeline rank that has most to do."""

    compute: float
    """All actions of a rank, one after another."""
    tensor: float
    """Messages of tensor parallelism."""
    bubble: float
    """Waiting for other stages, their messages included."""
    data: float
    """Messages of data parallelism that nothing hides."""
    update: float
    flops: float
    """Of the whole step, as sweeps count them: without what is computed again."""
    executed: float
    """Floating-point operations of one rank, with it."""
    sent: Sent

    @property
    def step(self) -> float:
        return self.compute + self.tensor + self.bubble + self.data + self.update


@dataclass(frozen=True)
class Rates:
    """What a step makes and costs."""

    atoms_per_second: float
    structures_per_second: float
    watt_hours: float
    price: float | None
    """In the cluster's currency."""
    of_peak: float
    """Share of the devices' peak that the model's own operations are."""


def phase_units(layout: Layout) -> Mapping[Kind, float]:
    """Products of each kind of action in units of a forward's."""
    if layout.hows == ("graph",):
        unfused = getattr(layout.model, "edge_operation", "unfused") == "unfused"
        total = GRAPH_UNITS[unfused] + (2 if layout.recomputes else 0)
        return {"F": 2, "B": total - 2, "I": 1, "W": 1}
    if layout.conservative:
        return RECOMPUTED if layout.recomputes else CONSERVATIVE
    return ORDINARY_RECOMPUTED if layout.recomputes else ORDINARY


def step_units(layout: Layout) -> float:
    """Of a whole step, in which a backward is whole (B) or in its two parts."""
    units = phase_units(layout)
    return sum(units.get(kind, 0) for kind in ("f", "b", "F", "B"))


def forward_flops(layout: Layout, numbers: list[int]) -> tuple[float, float]:
    """(of edges, of atoms) operations of one forward of a batch through these layers on a rank."""
    works, sizes = layer_works(layout.model), layout.sizes
    edges = sum(works[k].per_edge for k in numbers) * sizes.num_edges
    atoms = sum(works[k].per_atom for k in numbers) * sizes.num_atoms
    return 2 * edges / layout.tp, 2 * atoms / layout.tp


def forward_seconds(layout: Layout, numbers: list[int], cluster: Cluster) -> float:
    """Of one forward of a batch. Products of edges run in the type of sums, beside bfloat16 float32."""
    edges, atoms = forward_flops(layout, numbers)
    precision = layout.precision
    names = [str(dtype).removeprefix("torch.") for dtype in (precision.edge, precision.parameters)]
    products = edges / cluster.rate(names[0]) + atoms / cluster.rate(names[1])
    return products + moved_bytes(layout, numbers) / cluster.memory_rate


def moved_bytes(layout: Layout, numbers: list[int]) -> float:
    """Written and read by a forward: what its layers would keep if nothing were computed again."""
    model = replace(layout.model, recompute_layers=False)
    if hasattr(model, "edge_memory"):
        model = replace(model, edge_memory="save")
    plain = replace(layout, config=replace(layout.config, model=model))
    how, sizes = layout.hows[0] if layout.hows[0] != "graph" else "probe", layout.sizes
    kept = [plain.kept(k, how) for k in numbers]
    numel = sum(k.per_atom * sizes.num_atoms + k.per_edge * sizes.num_edges + 2 * k.fixed for k in kept)
    return 2 * numel * layout.precision.parameters.itemsize


def times(layout: Layout, cluster: Cluster) -> Times:
    """See `Times`."""
    stages = [[*s.layers, *[s.num_layers] * s.is_last] for s in layout.stages]
    forward = [forward_seconds(layout, numbers, cluster) for numbers in stages]
    m, units = layout.micro_batches, step_units(layout)
    ranks = range(layout.pp)
    on_rank = [sum(forward[layout.stages.index(s)] for s in layout.stages_on(r)) for r in ranks]
    heavy = max(ranks, key=on_rank.__getitem__)
    messages = sent(layout, heavy)
    compute = units * m * on_rank[heavy]
    numbers = layout.numbers_on(heavy)
    tensor = _tensor_seconds(layout, cluster, numbers, messages)
    executed = m * units * sum(forward_flops(layout, numbers))
    whole = layout.dp * m
    flops = step_flops(layout.model, whole * layout.sizes.num_atoms, whole * layout.sizes.num_edges)
    return Times(
        compute,
        tensor,
        _bubble(layout, cluster, forward, tensor / (units * m), compute + tensor),
        _data_seconds(layout, cluster, heavy, messages, units * on_rank[heavy]),
        _update_seconds(layout, cluster, heavy),
        flops,
        executed,
        messages,
    )


def rates(layout: Layout, cluster: Cluster, t: Times) -> Rates:
    """See `Rates`."""
    batches, ranks = layout.dp * layout.micro_batches, layout.num_ranks
    hours = t.step / 3600
    price = None if cluster.device_hour is None else cluster.device_hour * ranks * hours
    name = str(layout.precision.parameters).removeprefix("torch.")
    peak = 1e12 * getattr(cluster.device, name) * ranks
    return Rates(
        batches * layout.sizes.num_atoms / t.step,
        batches * layout.sizes.num_structures / t.step,
        cluster.watts(ranks) * hours,
        price,
        t.flops / t.step / peak,
    )


def link_bytes(layout: Layout, cluster: Cluster, messages: Sent) -> dict[str, dict[str, float]]:
    """{link: {axis: bytes that a rank sends over it in a step}}, the link "node" or "network"."""
    groups = {"tp": (layout.tp, 1), "pp": (layout.pp, layout.tp), "dp": (layout.dp, layout.pp * layout.tp)}
    found: dict[str, dict[str, float]] = {"node": {}, "network": {}}
    for axis, (size, stride) in groups.items():
        if value := getattr(messages, axis):
            within = cluster.is_within_node(size, stride, layout.num_ranks)
            found["node" if within else "network"][axis] = value
    return found


def _tensor_seconds(layout: Layout, cluster: Cluster, numbers: list[int], messages: Sent) -> float:
    if layout.tp == 1:
        return 0.0
    passes = 2 * len(layout.hows) * layout.micro_batches * len(numbers)
    # about eight messages a layer and pass (docs/tensor-parallel.md), each of so many hops
    link = cluster.link(layout.tp, 1, layout.num_ranks)
    return link.seconds(messages.tp, 8 * passes * math.log2(layout.tp))


def _bubble(layout: Layout, cluster: Cluster, forward: list[float], tensor: float, busy: float) -> float:
    """What a rank waits for other stages; of a long row of micro-batches the middle repeats."""
    schedule = layout.schedule
    if schedule is None:
        return 0.0
    link = cluster.link(layout.pp, layout.tp, layout.num_ranks)
    stage = [seconds + tensor / len(layout.stages_on(0)) for seconds in forward]
    found = simulate(
        schedule, Costs(phase_units(layout), stage, latency=link.seconds(largest_message(layout)))
    )
    return max(0.0, found.makespan - busy * schedule.num_micro_batches / layout.micro_batches)


def _data_seconds(
    layout: Layout, cluster: Cluster, pp_rank: int, messages: Sent, batch_seconds: float
) -> float:
    """What of the messages along dp nothing hides."""
    if layout.dp == 1:
        return 0.0
    link = cluster.link(layout.dp, layout.pp * layout.tp, layout.num_ranks)
    hops, units = math.log2(layout.dp), len(layout.units(pp_rank))
    gradients = link.seconds(messages.gradients, 2 * hops * units)
    backward = 0.6 * batch_seconds * (layout.micro_batches if layout.stage >= 2 else 1)
    exposed = max(gradients - backward, gradients / units)
    weights = link.seconds(messages.weights, hops * units) if messages.weights else 0.0
    if layout.stage < 3:
        return exposed + weights
    busy = batch_seconds * layout.micro_batches
    together = max(0.0, gradients + weights - busy)  # one link serves both
    return max(together, exposed, weights / (units * layout.micro_batches))


def _update_seconds(layout: Layout, cluster: Cluster, pp_rank: int) -> float:
    """All that is kept once from memory, what is offloaded twice over its link, and products of matrices."""
    kept = [unit_bytes(layout, unit).kept for _, unit in layout.units(pp_rank)]
    away = offloaded(layout)
    here = sum(value for unit in kept for name, value in unit.items() if name not in away)
    moved = sum(value for unit in kept for name, value in unit.items() if name in away)
    rate = {"none": 1.0, "host": cluster.node.host_gbps, "disk": cluster.node.disk_gbps}
    products = update_flops(layout, pp_rank) / cluster.rate("float32")
    return products + 2 * here / cluster.memory_rate + 2 * moved / (1e9 * rate[layout.config.optim.offload])


def update_flops(layout: Layout, pp_rank: int) -> float:
    """Operations of products in the update of a rank's share of the matrices; 0 for AdamW."""
    matrices, shards = layout.rule.matrices, layout.dp if layout.stage > 0 else 1
    if matrices is None:
        return 0.0
    found = [s for _, unit in layout.units(pp_rank) for s in unit if s.is_matrix]
    costs = [matrices.cost(s.full) / (layout.tp if s.dim is not None else 1) for s in found]
    return ELEMENT_OPERATIONS * sum(costs) / shards
