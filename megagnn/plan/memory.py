"""What a rank holds at the moments of a step, bytes by what they are for (docs/planning.md).

    between steps       weights, gradients and state by the stage of ZeRO, the moving average
    forward             and what its layers keep; in stage 3 the weights of two units
    backward            and what is there while one layer is at work, gradients of one unit on their way
    update              and copies that an update of matrices needs; of what lies in files two units

Of a loss on conservative forces there are two forwards and backwards. In a pipeline a rank keeps what its
schedule says, of as many micro-batches.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from megagnn.models.costs import How
from megagnn.optim.flat import FlatLayout
from megagnn.optim.rule import BATCH_NUMEL
from megagnn.optim.zero.offload import MemoryStorage
from megagnn.optim.zero.reducer import MESSAGES_UNDER_WAY
from megagnn.pipeline_parallel.simulate import peaks
from megagnn.plan.layout import Layout, Unit
from megagnn.plan.traffic import largest_message

PARAMETERS, GRADIENTS, STATE, AVERAGE = "parameters", "gradients", "optimizer state", "weight average"
MESSAGES, ACTIVATIONS = "messages", "activations"
CATEGORIES = (PARAMETERS, GRADIENTS, STATE, AVERAGE, MESSAGES, ACTIVATIONS)
ELSEWHERE = "offloaded"
MATRIX_COPIES = {"adamw": 0, "muon": 5, "soap": 12}
"""Copies of a batch of matrices that an update makes (docs/sharding.md)."""


PACKED = 1.7
"""Buffers of messages of a layer over what it receives, as measured (tools/bench/planning.py)."""
BLOCKS, BLOCKS_AGAIN = 92e6, 80e6
"""The most that blocks of edges and their messages take under the plan `channel`, as measured on two and four
ranks (docs/tensor-parallel.md): the first divided by the ranks, the second where blocks are made again."""


class Moment(NamedTuple):
    """A moment of a step, and what a rank's tensors take then."""

    name: str
    num_bytes: Mapping[str, float]
    """By category; `offloaded` is beside them, on the host or in files."""

    @property
    def total(self) -> float:
        """Of what the device holds."""
        return sum(value for name, value in self.num_bytes.items() if name != ELSEWHERE)


class UnitBytes(NamedTuple):
    """What a unit takes on a rank."""

    whole: float
    """All of its parameters."""
    whole_gradients: float
    shard: float
    """Numbers of this rank's share."""
    kept: Mapping[str, float]
    """Between steps, by category, wherever it lies."""


def unit_bytes(layout: Layout, unit: Unit) -> UnitBytes:
    """See `UnitBytes`; by the buffers of optim/zero/unit.py, or of the unsharded optimizer."""
    narrow, wide = layout.precision.parameters.itemsize, layout.precision.gradients.itemsize
    shards = layout.dp if layout.sharded and layout.stage > 0 else 1
    flat = FlatLayout.of([shape.local(layout.tp) for shape in unit], narrow, shards)
    size, share = flat.size, flat.size / shards
    matrices = layout.rule.matrices
    of_matrices, state = 0.0, 0.0
    for shape in unit if matrices else ():
        if shape.is_matrix and matrices:
            divided = layout.tp if shape.dim is not None else 1
            of_matrices += math.prod(shape.full) / divided / shards
            state += sum(map(math.prod, matrices.state(shape.full).values())) / divided / shards
    state += len(layout.rule.elements.state) * (share - of_matrices)
    if layout.precision.master is not None:
        state += share
    gradients = wide if layout.sharded else narrow
    kept = {
        PARAMETERS: (share if layout.stage == 3 else size) * narrow,
        GRADIENTS: (share if layout.stage >= 2 else size) * gradients,
        STATE: state * wide,
        AVERAGE: share * wide * layout.averages,
    }
    return UnitBytes(size * narrow, size * gradients, share, kept)


def offloaded(layout: Layout) -> tuple[str, ...]:
    """Categories whose buffers `optim.offload` moves away, and leaves no copy of between steps."""
    if layout.config.optim.offload == "none":
        return ()
    away = [STATE, AVERAGE]
    return tuple(away + [GRADIENTS] * (layout.stage >= 2) + [PARAMETERS] * (layout.stage == 3))


def course(
    layout: Layout, pp_rank: int = 0, host_is_device: bool = False, message: float | None = None
) -> list[Moment]:
    """The moments of a step on a pipeline rank.

    message: bytes of the largest between stages, where they are known already.
    host_is_device: whether what is offloaded to the host lies in the memory that is counted, as without GPUs.
    """
    units = [unit_bytes(layout, unit) for _, unit in layout.units(pp_rank)]
    stays = {name: sum(unit.kept[name] for unit in units) for name in (PARAMETERS, GRADIENTS, STATE, AVERAGE)}
    resting = dict(stays)
    if not (layout.config.optim.offload == "host" and host_is_device):
        away = offloaded(layout)
        resting = {name: 0.0 if name in away else value for name, value in stays.items()}
        resting[ELSEWHERE] = sum(stays[name] for name in away)
    resting[ACTIVATIONS] = layout.sizes.batch_bytes * (layout.micro_batches if layout.pp > 1 else 1)
    moments = [Moment("between steps", resting)]
    moments += _passes(
        layout, pp_rank, resting, units, largest_message(layout) if message is None else message
    )
    return [*moments, Moment("update", _plus(resting, **_update(layout, pp_rank, units)))]


def peak(moments: Sequence[Moment]) -> Moment:
    """The moment at which most is held."""
    return max(moments, key=lambda moment: moment.total)


def worst_course(layout: Layout, host_is_device: bool = False) -> tuple[int, list[Moment]]:
    """(pipeline rank, moments) of the rank that holds most."""
    message = largest_message(layout)
    courses = [(rank, course(layout, rank, host_is_device, message)) for rank in _different_ranks(layout)]
    return max(courses, key=lambda found: peak(found[1]).total)


def _different_ranks(layout: Layout) -> list[int]:
    """Pipeline ranks that may hold most: those at the ends, and of the others the first and the widest."""
    if layout.pp <= 4:
        return list(range(layout.pp))
    inner = range(1, layout.pp - 1)
    widest = max(inner, key=lambda rank: len(layout.numbers_on(rank)))
    return sorted({0, 1, widest, layout.pp - 1})


def _passes(
    layout: Layout, pp_rank: int, resting: Mapping[str, float], units: Sequence[UnitBytes], message: float
) -> list[Moment]:
    numbers, size = layout.numbers_on(pp_rank), layout.precision.parameters.itemsize
    whole = _largest_pair([unit.whole for unit in units]) if layout.stage == 3 else 0.0
    unit_gradients = max(unit.whole_gradients for unit in units) if layout.stage >= 2 else 0.0
    matrix = max(
        s.numel / (layout.tp if s.dim is not None else 1) for _, u in layout.units(pp_rank) for s in u
    )
    names: dict[How, str] = {"plain": "", "graph": "", "probe": "forces: ", "pair": "pairs: "}
    found = []
    for how in layout.hows:
        held, work = held_bytes(layout, numbers, how), work_bytes(layout, numbers, how)
        if layout.schedule is not None:
            held = _pipeline_peak(layout, pp_rank, numbers)
        on_the_way = {} if how == "probe" else {GRADIENTS: unit_gradients, MESSAGES: _reduced(layout, units)}
        single = 0.0 if how == "probe" else 2 * matrix * size
        # between stages: those that were sent and are not known to have arrived, and one ahead
        messages = _tensor_messages(layout, numbers, how) + 2 * layout.pp * message
        forward = {PARAMETERS: whole, ACTIVATIONS: held, MESSAGES: messages}
        found.append(Moment(f"{names[how]}forward", _plus(resting, **forward)))
        at_work = _plus(forward, **_plus(on_the_way, **{ACTIVATIONS: work + single}))
        found.append(Moment(f"{names[how]}backward", _plus(resting, **at_work)))
    return found


def held_bytes(layout: Layout, numbers: Sequence[int], how: How) -> float:
    """What a forward through these layers leaves."""
    atoms, edges = layout.sizes.num_atoms, layout.sizes.num_edges
    kept = [layout.kept(number, how) for number in numbers]
    total = sum(k.per_atom * atoms + k.per_edge * edges + k.fixed for k in kept)
    return total * layout.precision.parameters.itemsize


def work_bytes(layout: Layout, numbers: Sequence[int], how: How) -> float:
    """What is there beside it while the widest of these layers is at work."""
    atoms, edges = layout.sizes.num_atoms, layout.sizes.num_edges
    kept = [layout.kept(number, how) for number in layout.different(numbers)]
    widest = max(k.work_per_atom * atoms + k.work_per_edge * edges + k.work_fixed for k in kept)
    return widest * layout.precision.parameters.itemsize


def _pipeline_peak(layout: Layout, pp_rank: int, numbers: Sequence[int]) -> float:
    """The most that the schedule makes a rank keep: f what a probe leaves, F what its backward needs."""
    assert layout.schedule is not None
    chunks = len(layout.stages_on(pp_rank))
    last = layout.hows[-1]
    weights = {"f": held_bytes(layout, numbers, "probe") / chunks} if layout.conservative else {}
    weights["F"] = held_bytes(layout, numbers, last) / chunks
    row = replace(layout.schedule, rows=(layout.schedule.rows[pp_rank],))
    return peaks(row, weights)[0]  # type: ignore[arg-type]


def _reduced(layout: Layout, units: Sequence[UnitBytes]) -> float:
    """Messages of gradients under way; what travels in place takes no memory."""
    if layout.dp == 1:
        return 0.0
    bucket = 2**20 * layout.config.parallel.bucket_megabytes
    if not layout.sharded:
        return 0.0 if layout.config.optim.implementation == "own" else bucket
    if layout.stage == 0:
        return 0.0
    message = min(bucket / 2, max(unit.whole_gradients for unit in units))
    received = message * (layout.dp - 1) / layout.dp
    leaving = message if layout.stage >= 2 else 0.0
    return MESSAGES_UNDER_WAY * (received + leaving)


def _tensor_messages(layout: Layout, numbers: Sequence[int], how: How) -> float:
    """What the layer that sends most receives forward, and packs; `channel` sends its edges in blocks."""
    if layout.tp == 1:
        return 0.0
    s, different = layout.setting(how), layout.different(numbers)
    elements = max(
        float(layout.family.traffic(layout.model, k, layout.edge_plan, s).forward) for k in different
    )
    whole = elements / float(s.u) * layout.precision.sums.itemsize
    if layout.edge_plan == "edge":
        return PACKED * whole
    again = getattr(layout.model, "edge_memory", "save") == "recompute"
    return min(PACKED * whole, BLOCKS_AGAIN if again else BLOCKS / layout.tp)


def _update(layout: Layout, pp_rank: int, units: Sequence[UnitBytes]) -> dict[str, float]:
    found: dict[str, float] = {}
    rule = layout.config.optim.rule
    if rule not in MATRIX_COPIES:
        raise ValueError(
            f"plans know what an update takes by {', '.join(MATRIX_COPIES)}, got optim.rule = {rule!r}; add "
            "its copies of a batch of matrices to MATRIX_COPIES in megagnn/plan/memory.py"
        )
    copies = MATRIX_COPIES[rule]
    if copies:
        shards = layout.dp if layout.stage > 0 else 1
        matrices = [[s.numel for s in u if s.is_matrix] for _, u in layout.units(pp_rank)]
        most, largest = max(map(sum, matrices)), max(max(m, default=0) for m in matrices)
        window = min(sum(map(sum, matrices)), max(most, MemoryStorage.window))
        wide = layout.precision.gradients.itemsize
        batch = min(window, max(BATCH_NUMEL, largest))
        found[STATE] = wide * (window / shards / layout.tp + copies * batch)
    for name in offloaded(layout):  # a unit at work and the one after it
        found[name] = found.get(name, 0.0) + _largest_pair([unit.kept[name] for unit in units])
    return found


def _largest_pair(sizes: Sequence[float]) -> float:
    return max((a + b for a, b in zip(sizes, [*sizes[1:], 0.0], strict=True)), default=0.0)


def _plus(base: Mapping[str, float], **more: float) -> dict[str, float]:
    return {name: base.get(name, 0.0) + more.get(name, 0.0) for name in {**base, **more}}
