"""A run as it would be laid out: a configuration, a grid of ranks, batches of a size, and no memory taken.

Layers differ by their place alone, so a model of its first, a middle and its last layer, whose parameters
take no memory, tells the shapes of all (as `pipeline_parallel.stage_costs` measures them).
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Any

import torch

from megagnn.config import RunConfig
from megagnn.data import keys
from megagnn.data.record import MAX_ATOMIC_NUMBER
from megagnn.models.costs import EdgePlan, How, Kept, Setting
from megagnn.models.family import Model, Part
from megagnn.models.potential import Potential, build_potential
from megagnn.models.precision import Precision, precision_of
from megagnn.models.registry import model_class
from megagnn.models.statistics import Statistics
from megagnn.optim.optimizer import is_sharded
from megagnn.optim.rule import Rule
from megagnn.optim.rules import rule_of
from megagnn.parallel.context import ParallelContext, grid_sizes
from megagnn.parallel.parameter import check_divisible, layout_of
from megagnn.pipeline_parallel import registry
from megagnn.pipeline_parallel.actions import Schedule
from megagnn.pipeline_parallel.stage import Stage, layer_costs, stages_of, stages_of_sizes


@dataclass(frozen=True)
class Sizes:
    """Of a batch of one data-parallel rank, and of what the data hold."""

    num_atoms: int
    num_edges: int
    """Directed."""
    num_structures: int = 16
    num_elements: int = 10
    num_levels: int = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(
                    f"{field.name} of a plan must be at least 1, got {getattr(self, field.name)}"
                )
        if self.num_elements > MAX_ATOMIC_NUMBER:
            raise ValueError(
                f"num_elements of a plan must be at most {MAX_ATOMIC_NUMBER}, got {self.num_elements}"
            )

    def statistics(self) -> Statistics:
        """Of data like these; energies are zeros."""
        elements = tuple(range(1, self.num_elements + 1))
        return Statistics(
            elements=elements,
            sources=("data",),
            levels=tuple(f"level {k}" for k in range(self.num_levels)),
            source_elements=(elements,),
            source_levels=(tuple(range(self.num_levels)),),
            references=((0.0,) * len(elements),),
            mean_energy=(0.0,),
            mean_neighbours=self.num_edges / self.num_atoms,
            output_scale=1.0,
        )

    def batch(self, precision: Precision) -> dict[str, Any]:
        """Shapes of a batch, as far as `Model.fields` and messages of pipelines read them."""
        empty = {"device": "meta", "dtype": precision.geometry}
        return {
            keys.ATOMIC_NUMBERS: torch.empty(self.num_atoms, device="meta", dtype=torch.long),
            keys.POSITIONS: torch.empty(self.num_atoms, 3, **empty),  # type: ignore[call-overload]
            keys.CELL: torch.empty(self.num_structures, 3, 3, **empty),  # type: ignore[call-overload]
        }

    @property
    def batch_bytes(self) -> float:
        """What a collated batch takes: indices of 8 bytes, vectors of 4."""
        return 52.0 * self.num_edges + 72.0 * self.num_atoms + 200.0 * self.num_structures


@dataclass(frozen=True)
class Shape:
    """A parameter."""

    full: tuple[int, ...]
    dim: int | None
    """Dimension that tensor-parallel ranks divide."""
    is_matrix: bool
    """Whether an update rule of matrices takes it."""

    @property
    def numel(self) -> int:
        return int(torch.Size(self.full).numel())

    def local(self, tp: int) -> tuple[int, ...]:
        """On one of the tensor-parallel ranks."""
        return tuple(n // tp if k == self.dim else n for k, n in enumerate(self.full))


Unit = tuple[Shape, ...]
"""Parameters of a module that ZeRO keeps together."""


@lru_cache(maxsize=64)
def _shapes(model: Any, statistics: Statistics) -> dict[str, Unit]:
    """Units of a model's first, a middle and last layer, embeddings and heads, by their names."""
    layers = tuple(dict.fromkeys((0, min(1, model.num_layers - 1), model.num_layers - 1)))
    small = build_potential(model, statistics, deferred=True, part=Part(layers)).model
    return {
        name: tuple(
            Shape(layout_of(p).full_shape, layout_of(p).dim, getattr(p, "matrix_rate", None) is not None)
            for p in module.parameters()
        )
        for name, module in small.blocks()
    }


@lru_cache(maxsize=256)
def _schedule(name: str, num_ranks: int, num_micro_batches: int) -> Schedule:
    return registry.find(name).build(num_ranks, num_micro_batches)


@dataclass(frozen=True)
class Layout:
    """See the module; `make_layout` checks what it is made of."""

    config: RunConfig
    sizes: Sizes
    dp: int
    pp: int
    tp: int
    averages: bool = True
    """Whether a moving average of the weights is kept, as `megagnn train` does."""

    @property
    def num_ranks(self) -> int:
        return self.dp * self.pp * self.tp

    @property
    def model(self) -> Any:
        """The section [model]."""
        return self.config.model

    @property
    def family(self) -> type[Model]:
        return model_class(self.model)

    @property
    def precision(self) -> Precision:
        return precision_of(self.config.train.dtype, self.config.train.geometry)

    @property
    def sharded(self) -> bool:
        """Whether the run takes the optimizer of ZeRO, at stage 0, too."""
        return is_sharded(self.config.optim, self.config.parallel, self.config.train.dtype)

    @property
    def stage(self) -> int:
        """Of ZeRO."""
        return self.config.parallel.zero_stage

    @property
    def rule(self) -> Rule:
        return rule_of(self.config.optim.rule)

    @property
    def micro_batches(self) -> int:
        """Batches of a data-parallel rank in a step."""
        return self.config.optim.accumulate_steps

    @property
    def conservative(self) -> bool:
        return bool(self.model.forces == "conservative")

    @property
    def hows(self) -> tuple[How, ...]:
        """The forwards of a batch in a step, in their order."""
        if not self.conservative:
            return ("plain",)
        return ("graph",) if self.config.train.gradient_method == "create_graph" else ("probe", "pair")

    @property
    def recomputes(self) -> bool:
        """Whether backwards make a forward once more."""
        return bool(self.model.recompute_layers or getattr(self.model, "edge_memory", "save") == "recompute")

    @cached_property
    def edge_plan(self) -> EdgePlan:
        sizes = (self.tp, self.sizes.num_atoms, self.sizes.num_edges)
        return self.family.edge_plan(self.model, self.config.parallel.plan, *sizes)

    @cached_property
    def statistics(self) -> Statistics:
        return self.sizes.statistics()

    # Layers and ranks.

    @cached_property
    def schedule(self) -> Schedule | None:
        """Of a pipeline, with two micro-batches a rank at most: more of them repeat its middle."""
        if self.pp == 1:
            return None
        name = self.config.schedule
        most = registry.find(name).fewest(self.pp, min(self.micro_batches, 2 * self.pp))
        return _schedule(name, self.pp, most)

    @cached_property
    def stages(self) -> list[Stage]:
        schedule = self.schedule
        if schedule is None:
            return [Stage(range(self.model.num_layers), self.model.num_layers)]
        if self.config.parallel.stages is not None:
            sizes = self.config.parallel.stages
            return stages_of_sizes(sizes, self.model.num_layers, schedule.num_stages)
        return stages_of(layer_costs(self.model, self.statistics.mean_neighbours), schedule.num_stages)

    def stages_on(self, pp_rank: int) -> list[Stage]:
        placement = (0,) if self.schedule is None else self.schedule.placement
        return [stage for stage, rank in zip(self.stages, placement, strict=True) if rank == pp_rank]

    def numbers_on(self, pp_rank: int) -> list[int]:
        """Layers on a pipeline rank; `num_layers` stands for embedding and energy head, with the last."""
        stages = self.stages_on(pp_rank)
        return [k for stage in stages for k in (*stage.layers, *[stage.num_layers] * stage.is_last)]

    def different(self, numbers: Sequence[int]) -> set[int]:
        """One of each kind of these: the first layer, one in the middle, the last, and the head."""
        ends = (0, self.model.num_layers - 1, self.model.num_layers)
        return {number if number in ends else 1 for number in numbers}

    @cached_property
    def context(self) -> ParallelContext:
        """Of the first rank, without groups."""
        return ParallelContext(dp_size=self.dp, pp_size=self.pp, tp_size=self.tp)

    def whole_units(self) -> dict[str, tuple[int, Unit]]:
        """{kind of unit: (how many the model has, its parameters)}."""
        shapes, layers = _shapes(self.model, self.statistics), self.model.num_layers
        found = {name: (1, unit) for name, unit in shapes.items()}
        if layers > 2:
            found["layers.1"] = (layers - 2, shapes["layers.1"])
        return found

    def units(self, pp_rank: int) -> list[tuple[str, Unit]]:
        """(name, parameters) of each unit on a pipeline rank, in the order in which they run."""
        shapes, last = _shapes(self.model, self.statistics), self.model.num_layers - 1
        found: list[tuple[str, Unit]] = []
        stages = self.stages_on(pp_rank)
        if any(stage.is_first for stage in stages):
            found += [(name, unit) for name, unit in shapes.items() if name.endswith("_embedding")]
        for k in (k for stage in stages for k in stage.layers):
            found.append((f"layers.{k}", shapes[f"layers.{k if k in (0, last) else 1}"]))
        if any(stage.is_last for stage in stages):
            heads = [name for name in shapes if not name.startswith("layers.")]
            found += [(name, shapes[name]) for name in heads if not name.endswith("_embedding")]
        return found

    @cached_property
    def num_parameters(self) -> int:
        """Of the whole model."""
        return sum(count * sum(s.numel for s in unit) for count, unit in self.whole_units().values())

    def kept(self, layer: int, how: How) -> Kept:
        """What a layer keeps on a rank; see `Model.kept`."""
        return self.family.kept(self.model, layer, how, self.tp, self.edge_plan)

    def setting(self, how: How) -> Setting:
        """Of a pass over a batch, with rows of equal size on every rank."""
        return Setting(
            ranks=self.tp,
            planes=2 if how == "pair" else 1,
            num_atoms=self.sizes.num_atoms,
            own_atoms=Fraction(self.sizes.num_atoms, self.tp),
            num_edges=self.sizes.num_edges,
            blocks_again=getattr(self.model, "edge_memory", "save") == "recompute",
            layers_again=self.model.recompute_layers,
            weights_wanted=how != "probe",
        )

    def potential(self, pp_rank: int, layers: Sequence[int]) -> Potential:
        """A potential of some layers without parameters, of which messages between stages are asked."""
        part = Part(tuple(layers), embedding=pp_rank == 0, head=pp_rank == self.pp - 1)
        return build_potential(
            self.model, self.statistics, 0, self.precision, self.context, "auto", deferred=True, part=part
        )


def make_layout(
    config: RunConfig, sizes: Sizes, num_ranks: int | None = None, averages: bool = True
) -> Layout:
    """The layout of a configuration on so many ranks, by default those that it names.

    Raises:
        ValueError: a grid that is not the number of ranks, widths that tensor-parallel ranks do not divide, a
            family that says nothing of its memory, or too few layers or micro-batches for the pipeline.
    """
    parallel = config.parallel
    if num_ranks is None:
        num_ranks = (parallel.data or 1) * parallel.pipeline * parallel.tensor
    dp, pp, tp = grid_sizes(num_ranks, parallel.data, parallel.pipeline, parallel.tensor)
    layout = Layout(config, sizes, dp, pp, tp, averages)
    for name, (_, unit) in layout.whole_units().items():
        for shape in unit:
            if shape.dim is not None:
                check_divisible(f"a dimension of {name}", shape.full[shape.dim], tp)
    for how in layout.hows:
        layout.kept(0, how)
    _ = layout.stages
    return layout
