"""Bytes that a rank sends in a step, by axis, as `parallel.context.Traffic` counts them (docs/planning.md).

    tp    what the family's layers send in each pass (`Model.traffic`)
    pp    what the stages hand on (`ModelWork.expects`), of every micro-batch
    dp    gradients: all-reduced (stage 0), reduce-scattered (1), of every micro-batch (2, 3); weights:
          gathered after the step (1, 2), or by each forward and backward that needs them (3)

Left out are single numbers, such as the gradient's norm, and the padding between parameters of the unsharded
optimizer. Matrices that tensor-parallel ranks divide and Muon or SOAP need whole are in tp.
"""

import math
from fractions import Fraction
from typing import NamedTuple

from megagnn.models.family import pass_elements
from megagnn.optim.flat import FlatLayout
from megagnn.pipeline_parallel.actions import sends
from megagnn.pipeline_parallel.model_work import ModelWork
from megagnn.plan.layout import Layout, Unit


class Sent(NamedTuple):
    """Bytes that one rank sends in a step."""

    tp: float
    pp: float
    gradients: float
    """Along dp."""
    weights: float
    """Along dp."""

    @property
    def dp(self) -> float:
        return self.gradients + self.weights


def sent(layout: Layout, pp_rank: int = 0) -> Sent:
    """See the module; the first rank of the pipeline's along the other axes."""
    gradients, weights = data_parallel_bytes(layout, pp_rank)
    tensor = tensor_parallel_bytes(layout, pp_rank) + matrix_bytes(layout, pp_rank)
    return Sent(tensor, pipeline_bytes(layout, pp_rank), gradients, weights)


def tensor_parallel_bytes(layout: Layout, pp_rank: int = 0) -> float:
    """Along tp, of all micro-batches. In bfloat16 everything counts with four bytes, which is what sums over
    ranks take, and features half of."""
    if layout.tp == 1:
        return 0.0
    numbers = layout.numbers_on(pp_rank)
    layers = [number for number in numbers if number < layout.model.num_layers]
    head, total = len(layers) < len(numbers), Fraction(0)
    for how in layout.hows:
        structures = 9 * layout.sizes.num_structures if layout.model.stress else 0
        positions = 3 * layout.sizes.num_atoms + structures if how == "probe" else 0
        s = layout.setting(how)
        total += sum(pass_elements(layout.model, layout.edge_plan, s, positions, layers, head))
    return float(total) * layout.precision.sums.itemsize * layout.micro_batches


def pipeline_bytes(layout: Layout, pp_rank: int = 0) -> float:
    """Along pp, of all micro-batches."""
    return layout.micro_batches * sum(message_bytes(layout, pp_rank).values())


def message_bytes(layout: Layout, pp_rank: int) -> dict[str, float]:
    """{message: bytes} of one micro-batch that leave a pipeline rank."""
    schedule = layout.schedule
    if schedule is None:
        return {}
    potential = layout.potential(pp_rank, [0])
    work = ModelWork(
        potential, layout.stages, schedule, layout.context, [layout.sizes.batch(layout.precision)]
    )
    found = {}
    for action in schedule.rows[pp_rank]:
        for message in sends(action, schedule.num_stages) if action.micro_batch == 0 else ():
            if schedule.placement[message.target] != pp_rank:
                found[str(message)] = float(sum(e.num_bytes for e in work.expects(message)))
    return found


def largest_message(layout: Layout) -> float:
    """Bytes of the largest message between two stages; 0 without a pipeline."""
    return max(message_bytes(layout, min(1, layout.pp - 1)).values(), default=0.0)


def data_parallel_bytes(layout: Layout, pp_rank: int = 0) -> tuple[float, float]:
    """(gradients, weights) along dp."""
    if layout.dp == 1:
        return 0.0, 0.0
    share, stage = Fraction(layout.dp - 1, layout.dp), layout.stage
    narrow, wide = layout.precision.parameters.itemsize, layout.precision.gradients.itemsize
    units = [(name, unit_size(layout, unit)) for name, unit in layout.units(pp_rank)]
    numel = sum(size for _, size in units)
    if stage == 0:
        return float(2 * share * numel) * (wide if layout.sharded else narrow), 0.0
    backwards = layout.micro_batches if stage >= 2 else 1
    gradients = float(share * numel * backwards) * wide
    if stage < 3:
        return gradients, float(share * numel) * narrow
    again = sum(size for name, size in units if not name.endswith("_embedding"))
    return gradients, float(share * (numel + again) * len(layout.hows) * layout.micro_batches) * narrow


def unit_size(layout: Layout, unit: Unit) -> int:
    """Elements of a unit on a rank as they travel: with the padding of the sharded optimizer's buffers."""
    shapes = [shape.local(layout.tp) for shape in unit]
    if not layout.sharded:
        return sum(map(math.prod, shapes))
    shards = layout.dp if layout.stage > 0 else 1
    return FlatLayout.of(shapes, layout.precision.parameters.itemsize, shards).size


def matrix_bytes(layout: Layout, pp_rank: int = 0) -> float:
    """Along tp, of matrices whose update needs them whole: gradients to the rank that has the state, and the
    update back (docs/sharding.md), on average over the ranks."""
    if layout.tp == 1 or layout.rule.matrices is None:
        return 0.0
    divided = [s for _, unit in layout.units(pp_rank) for s in unit if s.is_matrix and s.dim is not None]
    shards = layout.dp if layout.stage > 0 else 1
    each_way = Fraction(layout.tp - 1, layout.tp) * sum(s.numel for s in divided) / shards / layout.tp
    return float(2 * each_way) * layout.precision.gradients.itemsize
