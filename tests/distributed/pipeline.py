"""Pipelines on any layout against one process doing the plain thing, for the parity tests."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megagnn.data import keys
from megagnn.objective.loss import Loss, step_counts
from megagnn.optim.bucket_reducer import GradientReducer
from megagnn.optim.config import OptimConfig
from megagnn.optim.optimizer import make_optimizer, make_sharded_optimizer
from megagnn.optim.zero.optimizer import ShardedOptimizer
from megagnn.parallel import messages
from megagnn.parallel.config import ParallelConfig
from megagnn.parallel.context import ParallelContext, grid_context
from megagnn.parallel.parameter import layout_of
from megagnn.parallel.world import sum_over_dp
from megagnn.pipeline_parallel.pipeline import Pipeline, schedule_for
from tests.distributed import parity
from tests.distributed.pairwise import pairwise
from tests.distributed.parity import UNEVEN, Configuration, Result, batch_of, errors, whole_gradients
from tests.distributed.whole import gather_whole
from tests.models.physics import randomised, statistics_of

NUM_MICRO_BATCHES = 4

CONFIGURATIONS = {
    "stress": Configuration({"stress": True, "num_layers": 4}, "huber"),
    "fixed": Configuration({"stress": True, "update_coordinates": False, "num_layers": 4}, "mae"),
    "forces": Configuration({"num_layers": 5, "distance_feature": "gaussian"}, "mse"),
    "satorras": Configuration({"preset": "satorras", "stress": True, "num_layers": 4}, "mse"),
    "direct": Configuration({"forces": "direct", "num_layers": 4}, "huber"),
    "energies": Configuration({"forces": "none", "num_layers": 4}, "mse"),
}
FAMILIES = {
    "painn": Configuration({"family": "painn", "stress": True, "num_layers": 4}, "huber"),
    "painn-direct": Configuration({"family": "painn", "forces": "direct", "num_layers": 4}, "mae", "norm"),
    "cartesian": Configuration({"family": "cartesian", "stress": True, "num_layers": 4}, "huber"),
    "cartesian-direct": Configuration(
        {"family": "cartesian", "paths": "lean", "num_splines": 8, "forces": "direct", "num_layers": 4},
        "mae",
        "norm",
    ),
    "cartesian-pairs": Configuration(
        {"family": "cartesian", "pair_splines": 6, "level_embedding": False, "stress": True, "num_layers": 4},
        "huber",
    ),
    "egnn-pairs-direct": Configuration(
        {"pair_splines": 6, "forces": "direct", "num_layers": 4}, "mae", "norm"
    ),
}
"""Run by tests/models/test_parity.py."""
SCHEDULES = {
    True: ("two-pass", "conservative", "conservative-zb"),
    False: ("gpipe", "1f1b", "interleaved", "zb-h1"),
}


class Cell(NamedTuple):
    """How a model is run."""

    pp: int
    others: tuple[int, int]
    """(tp, dp)"""
    schedule: str
    configuration: str
    optimizer: str
    """`flat`, or `zero` and its stage."""
    recomputation: str
    plan: str = "auto"

    def __str__(self) -> str:
        return " ".join([f"pp{self.pp}-tp{self.others[0]}-dp{self.others[1]}", *self[2:]])

    @property
    def world_size(self) -> int:
        """Ranks of the layout."""
        return self.pp * self.others[0] * self.others[1]


AXES: tuple[tuple[Any, ...], ...] = (
    (1, 2, 4),
    ((1, 1), (2, 1), (1, 2)),
    SCHEDULES[True] + SCHEDULES[False],
    tuple(CONFIGURATIONS),
    ("flat", "zero1", "zero2", "zero3"),
    ("none", "block", "layer", "both"),
)


def allowed(cell: tuple[Any, ...]) -> bool:
    """Schedules of the model's kind of step, and as many layers as stages."""
    pp, (tp, dp), schedule, configuration, _, _ = cell
    conservative = CONFIGURATIONS[configuration].model.get("forces", "conservative") == "conservative"
    if schedule not in SCHEDULES[conservative]:
        return False
    return pp * tp * dp in (1, 2, 4) and not (schedule == "interleaved" and pp == 4)


def all_cells() -> list[tuple[Any, ...]]:
    """The whole matrix."""
    return [cell for cell in product(*AXES) if allowed(cell)]


def few_cells() -> list[tuple[Any, ...]]:
    """Every two values together, but for those that are near others."""
    left_out = {"zero1", "block", "layer"}
    return pairwise([cell for cell in all_cells() if not left_out & set(cell[-2:])])


def with_plan(cell: tuple[Any, ...], index: int) -> Cell:
    """Plans of the edge products by turns, where there are any."""
    return Cell(*cell, plan=("channel", "edge")[index % 2] if cell[1][0] > 1 else "auto")


@cache
def reference(configuration: str) -> Result:
    """One process, all structures at once, derivatives of derivatives."""
    what = (CONFIGURATIONS | FAMILIES)[configuration]
    potential = randomised(what.model_config("unfused", "none"))
    return parity.run(potential, "create_graph", what, ParallelContext())


def build(cell: Cell, context: ParallelContext) -> Pipeline:
    """This rank's part, with the weights of the whole model that `reference` has."""
    config = (CONFIGURATIONS | FAMILIES)[cell.configuration].model_config("fused", cell.recomputation)
    schedule = schedule_for(cell.schedule, config.forces, context.pp_size, NUM_MICRO_BATCHES)
    plan: Any = cell.plan
    pipeline = Pipeline(config, statistics_of(config), schedule, context, precision=torch.float64, plan=plan)
    whole = dict(randomised(config, context=context, plan=plan).model.named_parameters())
    with torch.no_grad():
        for name, parameter in pipeline.potential.model.named_parameters():
            parameter.copy_(whole[name])
    return pipeline


def micro_batches(context: ParallelContext) -> list[dict[str, Tensor]]:
    """This rank's structures dealt out; with two data-parallel ranks some micro-batches are empty."""
    share = UNEVEN[context.dp_size][context.dp_rank]
    return [batch_of(share[k::NUM_MICRO_BATCHES]) for k in range(NUM_MICRO_BATCHES)]


def optimizer_of(cell: Cell, pipeline: Pipeline, context: ParallelContext) -> tuple[Any, Any]:
    """The optimizer and its reducer."""
    model, config = pipeline.potential.model, OptimConfig()
    if cell.optimizer == "flat":
        flat = make_optimizer(model, config)
        return flat, GradientReducer(model.parameters(), context, 1000)
    stage = int(cell.optimizer[-1])
    parallel = ParallelConfig(zero_stage=stage, bucket_megabytes=1000 / 2**20)
    sharded = make_sharded_optimizer(model, config, parallel, context)
    return sharded, sharded.reducer


def measure(cell: Cell, context: ParallelContext) -> dict[str, Any]:
    """Errors of this rank: of the loss, the gradient norm, what `predict` says and its own gradients."""
    pipeline, what = build(cell, context), (CONFIGURATIONS | FAMILIES)[cell.configuration]
    optimizer, reducer = optimizer_of(cell, pipeline, context)
    batches, loss = micro_batches(context), Loss(what.loss_config())
    counts = step_counts(batches, context)
    optimizer.zero_grad()
    total, _ = pipeline.accumulate(batches, loss, counts, reducer)
    sum_over_dp(total, context)
    gradients = gradients_of(pipeline, optimizer, context)
    expected = reference(cell.configuration)
    norm = torch.stack([g.square().sum() for g in expected.gradients.values()]).sum().sqrt()
    found = {"gradient norm": abs(optimizer.gradient_norm(context).item() / norm.item() - 1)}
    mine = replace_gradients(expected, list(gradients))
    share = UNEVEN[context.dp_size][context.dp_rank]
    got = Result(predictions(pipeline, batches, share), total.item(), gradients)
    return {"errors": {**found, **errors(got, mine, share)}, "names": list(gradients)}


def replace_gradients(result: Result, names: list[str]) -> Result:
    """Those of some parameters alone; what vanishes in theory is still measured against the norm of all."""
    return result._replace(gradients={name: result.gradients[name] for name in names})


def predictions(
    pipeline: Pipeline, batches: list[dict[str, Tensor]], share: tuple[int, ...]
) -> dict[str, Tensor]:
    """Of this rank's structures, in their order."""
    reference_energy = pipeline.potential.model.reference_energy
    outputs = pipeline.predict(batches)
    parts: dict[int, dict[str, Tensor]] = {}
    for k, (batch, output) in enumerate(zip(batches, outputs, strict=True)):
        output[keys.ENERGY] -= reference_energy(batch)
        sizes = batch[keys.NUM_ATOMS].tolist()
        for place, number in enumerate(share[k::NUM_MICRO_BATCHES]):
            parts[number] = {
                key: value.split(sizes)[place] if key == keys.FORCES else value[place : place + 1]
                for key, value in output.items()
            }
    return {key: torch.cat([parts[number][key] for number in share]) for key in outputs[0]}


def gradients_of(pipeline: Pipeline, optimizer: Any, context: ParallelContext) -> dict[str, Tensor]:
    """Whole gradients of the parameters that this rank has a share in, by name."""
    if not isinstance(optimizer, ShardedOptimizer):
        return whole_gradients(pipeline.potential, context)
    found = {}
    for unit in optimizer.units:
        shards = messages.start_all_gather(unit.grad_shard.clone(), context, "dp").wait()
        views = unit.layout.views(shards.reshape(-1))
        for member, view in zip(unit.members, views, strict=True):
            found[f"model.{member.name}"] = gather_whole(
                view.contiguous(), layout_of(member.parameter), context
            )
    return found


def on_rank(context: ParallelContext, cells: list[Cell]) -> list[dict[str, Any]]:
    """What `measure` finds in each cell; the cells' layouts are all of this number of ranks."""
    contexts = {}
    for pp, (tp, dp) in dict.fromkeys(cell[:2] for cell in cells):
        contexts[pp, (tp, dp)] = grid_context(dp, pp, tp) if context.world_size > 1 else context
    found = []
    for cell in cells:
        try:
            found.append(measure(cell, contexts[cell[:2]]))
        except Exception as error:
            raise RuntimeError(f"in the cell {cell}") from error
    return found
