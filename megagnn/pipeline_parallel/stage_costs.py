"""Measured costs of layers, and the stages of a run."""

import dataclasses
from collections.abc import Callable, Sequence

import torch

from megagnn.data import keys
from megagnn.models.config import ModelConfig
from megagnn.models.family import PlanChoice
from megagnn.models.potential import build_potential
from megagnn.models.precision import Precision
from megagnn.models.statistics import Statistics
from megagnn.objective.loss import Loss, step_counts
from megagnn.parallel.config import ParallelConfig
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.world import broadcast_object
from megagnn.pipeline_parallel.actions import Action, Schedule
from megagnn.pipeline_parallel.executor import Executor
from megagnn.pipeline_parallel.model_work import Batch, ModelWork
from megagnn.pipeline_parallel.stage import Stage, layer_costs, stages_of, stages_of_sizes

REPEATS = 3  # of which the shortest counts; one more goes before them


def run_stages(
    model: ModelConfig,
    parallel: ParallelConfig,
    statistics: Statistics,
    num_stages: int,
    context: ParallelContext,
    step: Callable[[], Sequence[Batch]],
    loss: Loss,
    precision: Precision,
    earlier: Sequence[int] = (),
) -> list[Stage]:
    """The stages that the section [parallel] asks for, the same on every rank; all ranks must call it.

    Measured are the ranks of the first tensor-parallel group, whose main rank's times count; the others wait.

    Args:
        step: makes this rank's micro-batches of a step, of which the one with the most edges is measured.
        earlier: layers of the stages of the run that this one continues: kept where they are as many, because
            another cut rounds sums over stages in another way.

    Raises:
        ValueError: more stages than layers, or `parallel.stages` that do not fit.
    """
    if parallel.stages is not None:
        return stages_of_sizes(parallel.stages, model.num_layers, num_stages)
    if parallel.stage_costs == "modelled":
        return stages_of(layer_costs(model, statistics.mean_neighbours), num_stages)
    if len(earlier) == num_stages and sum(earlier) == model.num_layers:
        return stages_of_sizes(earlier, model.num_layers, num_stages)
    costs: list[float] = []
    if context.dp_rank == context.pp_rank == 0:
        batch = max(step(), key=lambda batch: batch[keys.EDGE_INDEX].shape[1])
        costs = measured_costs(model, statistics, batch, loss, context, precision, parallel.plan)
    return stages_of(broadcast_object(costs, context), num_stages)


def measured_costs(
    config: ModelConfig,
    statistics: Statistics,
    batch: Batch,
    loss: Loss,
    context: ParallelContext,
    precision: Precision | torch.dtype = torch.float32,
    plan: PlanChoice = "auto",
) -> list[float]:
    """(L,) seconds of a micro-batch in each layer, forwards and backwards; the embedding is in the first
    layer's, the energy head in the last one's.

    Layers differ only by their place: the first, the last, and those between them. So a model of three layers
    is measured, which fits where the whole does not. All ranks of a tensor-parallel group must call it.
    """
    num_measured = min(config.num_layers, 3)
    small = dataclasses.replace(config, num_layers=num_measured)
    alone = dataclasses.replace(context, dp_size=1, dp_rank=0, pp_size=1, pp_rank=0)
    potential = build_potential(small, statistics, 0, precision, alone, plan).to(context.device)
    schedule = layer_by_layer(num_measured, config.forces == "conservative")
    stages = [Stage(range(k, k + 1), num_measured) for k in range(num_measured)]
    executor, counts = Executor(schedule, alone), step_counts([batch], alone)
    executor.synchronised = True
    best: dict[Action, float] = {}
    for repeat in range(REPEATS + 1):
        executor.run(ModelWork(potential, stages, schedule, alone, [batch], loss, counts))
        for event in executor.events if repeat else ():
            seconds = event.end - event.start
            best[event.action] = min(seconds, best.get(event.action, seconds))
    sums = [sum(s for action, s in best.items() if action.stage == k) for k in range(num_measured)]
    return [sums[0], *sums[1:-1] * (config.num_layers - 2), sums[-1]][-config.num_layers :]


def layer_by_layer(num_layers: int, conservative: bool) -> Schedule:
    """One micro-batch through as many stages as there are layers, all on one rank."""
    down, up = range(num_layers), range(num_layers)[::-1]
    row = [Action(k, "F", 0) for k in down] + [Action(k, "B", 0) for k in up]
    if conservative:
        first = [Action(k, "f", 0) for k in down] + [Action(k, "b", 0) for k in up]
        row = [*first, Action(0, "R", 0), *row]
    return Schedule("layer by layer", (0,) * num_layers, 1, (tuple(row),))
