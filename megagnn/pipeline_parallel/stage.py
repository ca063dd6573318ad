"""Which layers a stage has, and what of a model a rank holds.

A stage is a run of layers; the embedding goes with the first layer and the energy head with the last, which
may be the force head, too. A rank holds the parameters of its stages under the names that they have in the
whole model, so initial weights, checkpoints and weight decay need to know nothing of stages. No parameter is
in two stages: what tensor-parallel ranks replicate lies within one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from torch import nn

from megagnn.models.config import ModelConfig
from megagnn.models.family import Part, layer_works
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.world import gather_along
from megagnn.pipeline_parallel.split import split_layers


class Stage(NamedTuple):
    """Layers that follow one another."""

    layers: range
    num_layers: int
    """Layers of the whole model."""

    @property
    def is_first(self) -> bool:
        """Whether it begins with the embedding."""
        return self.layers.start == 0

    @property
    def is_last(self) -> bool:
        """Whether it ends with the energy head."""
        return self.layers.stop == self.num_layers


def layer_costs(config: ModelConfig, mean_neighbours: float) -> list[float]:
    """(L,) multiply-adds of each layer's forward for an atom; the head's are with the last layer's."""
    costs = [float(work.per_edge * mean_neighbours + work.per_atom) for work in layer_works(config)]
    return [*costs[:-2], costs[-2] + costs[-1]]


def stages_of(costs: Sequence[float], num_stages: int) -> list[Stage]:
    """Stages whose costliest is as cheap as can be, from (L,) costs of the layers.

    Raises:
        ValueError: more stages than layers.
    """
    if num_stages > len(costs):
        raise ValueError(
            f"{len(costs)} layers do not fill {num_stages} pipeline stages; use at most "
            f"{len(costs)} stages (ranks times chunks), or more layers"
        )
    return [Stage(layers, len(costs)) for layers in split_layers(costs, num_stages)]


def stages_of_sizes(sizes: Sequence[int], num_layers: int, num_stages: int) -> list[Stage]:
    """Stages of so many layers each.

    Raises:
        ValueError: other numbers of stages or layers.
    """
    if len(sizes) != num_stages or sum(sizes) != num_layers or min(sizes, default=0) < 1:
        raise ValueError(
            f"parallel.stages = {list(sizes)} must be {num_stages} numbers of at least 1 that add up to "
            f"model.num_layers {num_layers}; got {len(sizes)} that add up to {sum(sizes)}"
        )
    ends = list(accumulate(sizes))
    return [Stage(range(end - size, end), num_layers) for size, end in zip(sizes, ends, strict=True)]


def part_of(stages: Sequence[Stage], placement: Sequence[int], pp_rank: int) -> Part:
    """What a rank holds: its stages' layers, and what goes with the first and the last."""
    own = [stage for stage, rank in zip(stages, placement, strict=True) if rank == pp_rank]
    layers = tuple(layer for stage in own for layer in stage.layers)
    return Part(layers, any(s.is_first for s in own), any(s.is_last for s in own))


def check_owners(model: nn.Module, context: ParallelContext) -> None:
    """Refuse a parameter that two pipeline ranks hold, whose gradients nobody would add; a collective.

    Raises:
        ValueError: naming the parameter and both ranks.
    """
    owner: dict[str, int] = {}
    names = [name for name, _ in model.named_parameters()]
    for rank, theirs in enumerate(gather_along(names, context, "pp")):
        for name in theirs:
            if name in owner:
                raise ValueError(
                    f"parameter {name} is on pipeline ranks {owner[name]} and {rank}; a parameter must be of "
                    "one stage: put the layers that share it together, or give each its own"
                )
            owner[name] = rank
