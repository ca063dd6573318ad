"""Which layers a stage has, cut by cost, and what of a model a rank holds.

A stage is a run of layers; the embedding goes with the first layer and the energy head with the last, which
may be the force head, too. A rank holds the parameters of its stages under the names that they have in the
whole model, so initial weights, checkpoints and weight decay need to know nothing of stages. No parameter is
in two stages: what tensor-parallel ranks replicate lies within one.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn

from megagnn.models.config import ModelConfig
from megagnn.models.family import Part, layer_works
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.world import gather_along


def split_layers(costs: Sequence[float], num_stages: int) -> list[range]:
    """Contiguous stages with the smallest possible maximum of summed cost.

    Exact, by dynamic programming over the last stage's first layer (the linear partition problem), in time
    O(S L log L), for costs that are not negative.

    Args:
        costs: (L,) of what follows one another: embedding, layers, heads, in any unit.
        num_stages: S.

    Returns:
        (S,) ranges of indices into `costs`, none empty.

    Raises:
        ValueError: fewer costs than stages, or a cost that is negative or no number.
    """
    cost_L = np.asarray(costs, dtype=np.float64)
    length = len(cost_L)
    if not 1 <= num_stages <= length:
        raise ValueError(
            f"{length} layers (with embedding and heads) do not fill {num_stages} stages; use 1 to {length}"
        )
    if not (np.isfinite(cost_L).all() and (cost_L >= 0).all()):
        raise ValueError(f"costs must be numbers of at least 0, got {list(costs)}")
    total = np.concatenate([[0.0], np.cumsum(cost_L)])
    best = total.copy()  # of the first j layers in the stages so far
    starts: list[NDArray[np.int64]] = []
    for stage in range(1, num_stages):
        new = np.full(length + 1, np.inf)
        start = np.zeros(length + 1, dtype=np.int64)
        for end in range(stage + 1, length + 1):
            # best[k] grows with k and the last stage's cost falls: the least maximum is where they cross.
            low, high = stage, end - 1
            while low < high:
                middle = (low + high) // 2
                if best[middle] >= total[end] - total[middle]:
                    high = middle
                else:
                    low = middle + 1
            for k in {low, max(low - 1, stage)}:
                value = max(best[k], total[end] - total[k])
                if value < new[end] or (value == new[end] and k < start[end]):
                    new[end], start[end] = value, k
        starts.append(start)
        best = new
    ends = [length]
    for start in reversed(starts):
        ends.append(int(start[ends[-1]]))
    bounds = [0, *reversed(ends)]
    return [range(a, b) for a, b in pairwise(bounds)]


class Stage(NamedTuple):
    """Layers that follow one another."""

    layers: range
    num_layers: int
    """Layers of the whole model."""

    @property
    def is_first(self) -> bool:
        return self.layers.start == 0

    @property
    def is_last(self) -> bool:
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
    """The part of a model that a rank holds: its stages' layers, the embedding and the head with theirs."""
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
