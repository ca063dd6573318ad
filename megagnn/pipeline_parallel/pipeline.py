"""A potential whose layers are divided over ranks: gradients of a step's micro-batches, and predictions."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from megagnn.data import keys
from megagnn.models.config import ModelConfig
from megagnn.models.family import Model, PlanChoice
from megagnn.models.potential import Potential, build_potential
from megagnn.models.precision import Precision
from megagnn.models.statistics import Statistics
from megagnn.objective.gradient_methods import Reducer
from megagnn.objective.loss import Loss, LossCounts
from megagnn.objective.terms import TERMS
from megagnn.optim.zero.reducer import ShardedReducer
from megagnn.parallel import messages
from megagnn.parallel.context import ParallelContext
from megagnn.pipeline_parallel.actions import Action, Kind, Schedule
from megagnn.pipeline_parallel.executor import Executor
from megagnn.pipeline_parallel.model_work import Batch, ModelWork, Sharding
from megagnn.pipeline_parallel.registry import find
from megagnn.pipeline_parallel.schedules.conservative import two_pass
from megagnn.pipeline_parallel.stage import Stage, check_owners, layer_costs, part_of, stages_of
from megagnn.pipeline_parallel.timeline import Record, record
from megagnn.pipeline_parallel.validate import validate

WINDOW = 4  # batches for each stage that are predicted together: at most a fifth of the time is idle


def schedule_for(name: str, forces: str, num_ranks: int, num_micro_batches: int) -> Schedule:
    """The schedule of this name for a model, proved.

    Raises:
        ValueError: no such schedule, one of the other kind of step, or sizes that it does not take.
    """
    entry = find(name, forces)
    entry.check(num_ranks, num_micro_batches)
    schedule = entry.build(num_ranks, num_micro_batches)
    validate(schedule)
    return schedule


class StagedPotential(Potential):
    """A part of a potential, which predicts together with the other parts: all ranks along pp must call it.

    `create_graph` is not offered: a graph cannot cross stages. `predictions` takes `window` batches at a time
    through the stages, which are so all busy except at the beginning and the end of a window.
    """

    def __init__(
        self, model: Model, predict: Callable[[Sequence[Batch]], list[dict[str, Tensor]]], window: int
    ) -> None:
        super().__init__(model)
        self._predict, self._window = predict, window

    def forward(self, batch: dict[str, Tensor], create_graph: bool = False) -> dict[str, Tensor]:
        """See `Potential.forward`; ValueError for `create_graph`."""
        if create_graph:
            raise ValueError(
                "create_graph has no meaning across pipeline stages; use Pipeline.gradients, or pipeline = 1"
            )
        return self._predict([batch])[0]

    def predictions(
        self, batches: Iterable[dict[str, Tensor]]
    ) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """See `Potential.predictions`; every rank along pp needs as many batches."""
        rest = iter(batches)
        while window := list(itertools.islice(rest, self._window)):
            yield from zip(window, self._predict(window), strict=True)


class Pipeline:
    """This rank's part of a potential, and the schedule by which the ranks along pp work together.

    Args:
        schedule: of a training step.
        stages: of the schedule; by default cut by the layers' multiply-adds.

    Raises:
        ValueError: fewer layers than stages, or a schedule for another number of ranks.
    """

    def __init__(
        self,
        config: ModelConfig,
        statistics: Statistics,
        schedule: Schedule,
        context: ParallelContext,
        seed: int = 0,
        precision: Precision | torch.dtype = torch.float32,
        plan: PlanChoice = "auto",
        deferred: bool = False,
        stages: Sequence[Stage] | None = None,
    ) -> None:
        self.schedule, self.context = schedule, context
        self.executor = Executor(schedule, context)
        self._layer_costs = layer_costs(config, statistics.mean_neighbours)
        self.stages = stages or stages_of(self._layer_costs, schedule.num_stages)
        part = part_of(self.stages, schedule.placement, context.pp_rank)
        whole = build_potential(config, statistics, seed, precision, context, plan, deferred, part)
        self.potential = StagedPotential(whole.model, self.predict, WINDOW * context.pp_size)
        check_owners(self.potential.model, context)

    def gradients(
        self,
        micro_batches: Sequence[Batch],
        loss: Loss,
        counts: LossCounts,
        before_last: Callable[[], None] = lambda: None,
        sharding: Sharding = Sharding(),  # noqa: B008 (a constant)
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Add to the parameters' `.grad`; the share of these micro-batches in the loss and in its terms.

        As `GradientMethod`, by the method of `one_backward`; the result is the same on every rank along pp.

        Args:
            before_last: called before the last backward, such as a reducer's `start`.
            sharding: for an optimizer that frees parameters.

        Raises:
            ValueError: another number of micro-batches than the schedule has.
        """
        if len(micro_batches) != self.schedule.num_micro_batches:
            raise ValueError(
                f"schedule {self.schedule.name} is for {self.schedule.num_micro_batches} micro-batches, got "
                f"{len(micro_batches)}; some may be empty"
            )
        work = ModelWork(
            self.potential,
            self.stages,
            self.schedule,
            self.context,
            micro_batches,
            loss,
            counts,
            before_last,
            sharding,
        )
        self.executor.run(work)
        total, *terms = messages.all_reduce(work.total, self.context, "pp").unbind()
        present = [loss.weights[term] != 0 and counts.labels[term] != 0 for term in TERMS]
        return total, {t: v for t, v, there in zip(TERMS, terms, present, strict=True) if there}

    def accumulate(
        self, batches: Sequence[Batch], loss: Loss, counts: LossCounts, reducer: Reducer
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `objective.gradient_methods.accumulate`."""
        sharding = Sharding()
        if isinstance(reducer, ShardedReducer) and not reducer.by_arrival:
            sharding = Sharding(reducer.inputs_only, through_inputs=True)
        result = self.gradients(batches, loss, counts, reducer.start, sharding)
        reducer.finish()
        return result

    def predict(self, micro_batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
        """Predictions for each micro-batch, on every rank along pp; see `Potential.forward`."""
        schedule = forward_only(self.schedule, len(micro_batches), self._is_conservative)
        work = ModelWork(self.potential, self.stages, schedule, self.context, micro_batches)
        with torch.no_grad():
            Executor(schedule, self.context, self.executor.channels).run(work)
        return [self._shared(batch, work.predictions.get(i)) for i, batch in enumerate(micro_batches)]

    def record(self, micro_batches: Sequence[Batch]) -> Record | None:
        """The last step, which was with these micro-batches, as planned and as all ranks ran it; on the main
        rank. All ranks must call it."""
        costs = [sum(self._layer_costs[k] for k in stage.layers) for stage in self.stages]
        return record(self.executor.events, self.schedule, costs, micro_batches, self.context)

    @cached_property
    def _is_conservative(self) -> bool:
        return self.potential.forces == "conservative"

    def _shared(self, batch: Batch, made: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """Predictions of the rank that made them, on all: what is not there counts as zero."""
        cell_B33, positions_NC = batch[keys.CELL], batch[keys.POSITIONS]
        shapes = {keys.ENERGY: cell_B33.new_zeros(len(cell_B33), dtype=torch.float64)}
        if self.potential.forces != "none":
            shapes[keys.FORCES] = torch.zeros_like(positions_NC)
        if self.potential.stress:
            shapes[keys.STRESS] = torch.zeros_like(cell_B33)
        for name in self.potential.model.other_labels:
            label = keys.LABELS[name]
            count = len(positions_NC) if label.per_atom else len(cell_B33)
            shapes[name] = positions_NC.new_zeros(count, *label.shape)
        here = made or {}
        return {
            key: messages.all_reduce(here[key].contiguous() if key in here else zero, self.context, "pp")
            for key, zero in shapes.items()
        }


def forward_only(schedule: Schedule, num_micro_batches: int, conservative_forces: bool) -> Schedule:
    """Predictions on the stages of a schedule: forwards, and for conservative forces the backward of pass 1.

    One micro-batch after another enters; as in 1F1B a rank keeps p of pass 1 at most. Where a rank has
    several stages, as many micro-batches as there are ranks pass one of them before the next.
    """
    p = schedule.num_ranks
    if conservative_forces:
        kinds: tuple[Kind, ...] = ("f", "b", "R")
        rows = tuple(tuple(a for a in row if a.kind in kinds) for row in two_pass(p, num_micro_batches).rows)
    else:
        rows = tuple(
            tuple(
                Action(stage, "F", i)
                for first in range(0, num_micro_batches, p)
                for stage, where in enumerate(schedule.placement)
                if where == rank
                for i in range(first, min(first + p, num_micro_batches))
            )
            for rank in range(p)
        )
    return Schedule("predict", schedule.placement, num_micro_batches, rows)
