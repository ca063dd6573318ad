"""Which rank this is: a value passed as an argument, never a module global.

[Note: ranks] The ranks form a grid of dp x pp x tp, numbered with tp fastest: neighbours share the most
traffic, so they lie on one machine. A *tensor-parallel* group (tp) holds one set of parameters between its
ranks and works on the same batch; the *data-parallel* ranks (dp) hold the same parameters and work on
different structures; *pipeline* stages (pp) hold different layers.

[Note: groups that end] A context does not own its process groups: torch.distributed does, until the ranks
part, and nothing else may. Whatever holds one beyond that keeps gloo's threads alive into the end of the
interpreter, where a thread that frees a tensor asks for an interpreter that is gone, and aborts the
process ("terminate called without an active exception"). So a model may hold a context as long as it likes;
and torch.distributed.nn, whose default arguments are the world at its import, is imported before it is there.
"""

import os
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # first met later, it would keep the world for ever: [Note: groups that end]


class Traffic:
    """Elements and bytes that a rank sent, by axis and by kind of collective.

    Counted is what a bandwidth-optimal algorithm sends from one rank, whatever the back end does: of n
    elements in all on each of t ranks, all-gather and reduce-scatter (t-1)/t n, all-reduce twice that,
    all-to-all exactly what leaves the rank.
    """

    def __init__(self) -> None:
        self.elements: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()

    def count(self, axis: str, kind: str, elements: Fraction | int, element_size: int) -> None:
        self.elements[axis, kind] += elements  # type: ignore[assignment] # exact fractions
        self.bytes[axis, kind] += elements * element_size  # type: ignore[assignment]

    def total(self, axis: str) -> Fraction:
        """Elements sent along an axis, exactly."""
        return sum((Fraction(n) for (a, _), n in self.elements.items() if a == axis), Fraction(0))

    @contextmanager
    def measured(self) -> Iterator["Traffic"]:
        """The traffic within the context, complete when the context ends."""
        elements, sizes, inside = Counter(self.elements), Counter(self.bytes), Traffic()
        yield inside
        inside.elements = self.elements - elements
        inside.bytes = self.bytes - sizes


def usable_cores() -> int:
    """Cores of the machine that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class ParallelContext:
    """Coordinates of one rank, and the process groups along each axis."""

    dp_size: int = 1
    dp_rank: int = 0
    pp_size: int = 1
    pp_rank: int = 0
    tp_size: int = 1
    tp_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    cores: int = field(default_factory=usable_cores, compare=False)
    """Of this rank: those of its machine, divided by the ranks there."""
    groups: Mapping[str, weakref.ref[Any]] = field(default_factory=dict, compare=False)
    """Process group along each axis and of the "world", [Note: groups that end]."""
    traffic: Traffic = field(default_factory=Traffic, compare=False)
    """Elements and bytes that this rank has sent."""

    def __post_init__(self) -> None:
        for axis in ("dp", "pp", "tp"):
            size, rank = getattr(self, f"{axis}_size"), getattr(self, f"{axis}_rank")
            if not 0 <= rank < size:
                raise ValueError(f"{axis}_rank must lie in [0, {axis}_size), got {rank} of {size}")

    @property
    def world_size(self) -> int:
        return self.dp_size * self.pp_size * self.tp_size

    @property
    def rank(self) -> int:
        """Number of this rank in the grid, [Note: ranks]."""
        return (self.dp_rank * self.pp_size + self.pp_rank) * self.tp_size + self.tp_rank

    @property
    def is_main(self) -> bool:
        """Whether this rank prints, logs and writes."""
        return self.rank == 0

    @property
    def grid(self) -> str:
        """4 rank(s) (data 2 x pipeline 1 x tensor 2)."""
        sizes = f"data {self.dp_size} x pipeline {self.pp_size} x tensor {self.tp_size}"
        return f"{self.world_size} rank(s) ({sizes})"

    def size(self, axis: str) -> int:
        """Ranks along "dp", "pp", "tp", or in the "world"."""
        return self.world_size if axis == "world" else int(getattr(self, f"{axis}_size"))

    def group(self, axis: str) -> Any:
        """Process group along an axis; None for one of one rank.

        Raises:
            RuntimeError: the ranks have parted: the context is used after its block.
        """
        if self.size(axis) == 1:
            return None
        group = self.groups[axis]()
        if group is None:
            raise RuntimeError(
                f"the process group of {axis!r} is gone: the ranks have parted; use a context, and what was "
                "built with it, inside the `with parallel_context(...)` block that made it"
            )
        return group

    def __str__(self) -> str:
        return rank_name(self.dp_rank, self.pp_rank, self.tp_rank)


def rank_name(dp_rank: int, pp_rank: int, tp_rank: int) -> str:
    """How a rank is called in messages: dp0-pp1-tp0."""
    return f"dp{dp_rank}-pp{pp_rank}-tp{tp_rank}"


def grid_coordinates(rank: int, dp: int, pp: int, tp: int) -> tuple[int, int, int]:
    """(dp_rank, pp_rank, tp_rank) of a rank in the grid, [Note: ranks]."""
    coordinates = (torch.arange(dp * pp * tp).view(dp, pp, tp) == rank).nonzero()[0].tolist()
    return coordinates[0], coordinates[1], coordinates[2]


def grid_sizes(world_size: int, dp: int | None, pp: int, tp: int) -> tuple[int, int, int]:
    """(dp, pp, tp) that make `world_size`; `dp` None takes what pp and tp leave.

    Raises:
        ValueError: the product is not the number of ranks; names every factor.
    """
    for name, size in (("data", dp), ("pipeline", pp), ("tensor", tp)):
        if size is not None and size < 1:
            raise ValueError(f"parallel.{name} must be at least 1, got {size}")
    if dp is None:
        if world_size % (pp * tp):
            raise ValueError(
                f"{world_size} rank(s) cannot be divided into pipeline {pp} x tensor {tp}: start a multiple "
                f"of {pp * tp} ranks, or change parallel.pipeline or parallel.tensor"
            )
        dp = world_size // (pp * tp)
    if dp * pp * tp != world_size:
        raise ValueError(
            f"data {dp} x pipeline {pp} x tensor {tp} = {dp * pp * tp} ranks, but {world_size} were started: "
            f"start {dp * pp * tp}, or change parallel.data, parallel.pipeline or parallel.tensor"
        )
    return dp, pp, tp


def grid_context(dp: int, pp: int, tp: int, device: torch.device | None = None) -> ParallelContext:
    """This process's context, when the default process group of dp x pp x tp ranks exists.

    Every rank makes every group, in the same order, as PyTorch demands.
    """
    rank, grid = dist.get_rank(), torch.arange(dp * pp * tp).view(dp, pp, tp)
    along = {"dp": grid.permute(1, 2, 0), "pp": grid.permute(0, 2, 1), "tp": grid}
    groups: dict[str, Any] = {"world": dist.group.WORLD}
    for axis, lines in along.items():
        for line in lines.reshape(-1, lines.shape[-1]).tolist():
            if len(line) == 1:
                continue
            group = dist.group.WORLD if len(line) == dist.get_world_size() else dist.new_group(line)
            if rank in line:
                groups[axis] = group
    dp_rank, pp_rank, tp_rank = grid_coordinates(rank, dp, pp, tp)
    return ParallelContext(
        dp_size=dp,
        dp_rank=dp_rank,
        pp_size=pp,
        pp_rank=pp_rank,
        tp_size=tp,
        tp_rank=tp_rank,
        device=device or torch.device("cpu"),
        groups={axis: weakref.ref(group) for axis, group in groups.items()},
    )
