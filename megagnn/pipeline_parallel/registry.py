"""The registry of pipeline schedules: each file of the package `schedules` adds its own under a name.

    @register("gpipe")
    def gpipe(num_ranks: int, num_micro_batches: int) -> Schedule: ...

The files are imported at the first look-up, so that importing this module costs nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from megagnn.pipeline_parallel import schedules

if TYPE_CHECKING:
    from megagnn.pipeline_parallel.actions import Schedule

Build = TypeVar("Build", bound="Callable[..., Schedule]")


class Entry(NamedTuple):
    """A schedule's name, the function that builds it, and what it asks of a run."""

    name: str
    build: Callable[[int, int], Schedule]
    """(ranks, micro-batches) -> schedule."""
    conservative: bool
    """Whether a micro-batch takes the two passes of a loss on conservative forces."""
    stages_per_rank: int
    fewest: Callable[[int, int], int]
    """(ranks, micro-batches) -> the least number of micro-batches, not below this one, that it takes."""

    def check(self, num_ranks: int, num_micro_batches: int) -> None:
        """Raises ValueError for a number of micro-batches that the schedule does not take."""
        fewest = self.fewest(num_ranks, num_micro_batches)
        if fewest != num_micro_batches:
            raise ValueError(
                f"schedule '{self.name}' over {num_ranks} pipeline ranks does not take {num_micro_batches} "
                f"micro-batches (optim.accumulate_steps); use {fewest}, or another parallel.schedule"
            )


_entries: dict[str, Entry] = {}


def register(
    name: str,
    *,
    conservative: bool = False,
    stages_per_rank: int = 1,
    fewest: Callable[[int, int], int] = lambda num_ranks, num_micro_batches: num_micro_batches,
) -> Callable[[Build], Build]:
    """Decorator that adds a builder under a name; the fields of `Entry`.

    Raises:
        ValueError: a name that another function has.
    """

    def add(build: Build) -> Build:
        other = _entries.get(name)
        if other is not None and other.build.__module__ != build.__module__:
            raise ValueError(
                f"{build.__module__} and {other.build.__module__} both name a schedule '{name}'; rename one"
            )
        _entries[name] = Entry(name, build, conservative, stages_per_rank, fewest)
        return build

    return add


def registered() -> dict[str, Entry]:
    """All schedules by name."""
    for module in iter_modules(schedules.__path__, f"{schedules.__name__}."):
        import_module(module.name)
    return dict(_entries)


def find(name: str, forces: str | None = None) -> Entry:
    """The schedule of this name, for a model with such `forces` where they are given.

    Raises:
        ValueError: no such schedule, with the nearest name, or one for the other kind of step.
    """
    entries = registered()
    if name not in entries:
        near = difflib.get_close_matches(name, entries, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise ValueError(
            f"no pipeline schedule is called '{name}' (parallel.schedule); {hint}use auto or one of "
            f"{', '.join(entries)}"
        )
    entry = entries[name]
    if forces is not None and entry.conservative != (forces == "conservative"):
        others = [other.name for other in entries.values() if other.conservative != entry.conservative]
        raise ValueError(
            f"parallel.schedule = '{name}' is not for model.forces = '{forces}'; use one of "
            f"{', '.join(others)}"
        )
    return entry
