"""List scheduling of a pipeline's actions: every free rank takes the ready action of highest priority.

Graham's list scheduling (1966) on the dependency graph, with limits on what a rank keeps. Deterministic:
ties go to the earlier micro-batch. Run once, before training; the result is a Schedule like any other.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megagnn.pipeline_parallel.actions import Action, Kind, needs
from megagnn.pipeline_parallel.simulate import Costs

WEIGHTS: Mapping[Kind, float] = {"f": 1, "F": 2}
Priority = Callable[[Action], tuple[float, ...]]


@dataclass(frozen=True)
class Limits:
    """Limits on what each rank keeps."""

    probes: Sequence[int]
    """(p,) micro-batches between f and b."""
    pairs: Sequence[int]
    """(p,) micro-batches between F and B or W."""
    total: Sequence[float]
    """(p,) activations, 1 of f and 2 of F."""
    open: int
    """Micro-batches between f and B (or I) at stage 0, whose graphs are in memory."""


@dataclass(frozen=True)
class Job:
    """The actions to be scheduled: kinds for every stage and micro-batch; one stage a rank."""

    placement: tuple[int, ...]
    num_micro_batches: int
    kinds: tuple[Kind, ...]

    @property
    def num_stages(self) -> int:
        """Stages."""
        return len(self.placement)

    def actions(self) -> list[Action]:
        """All of them; R at stage 0 only."""
        return [
            Action(stage, kind, i)
            for i in range(self.num_micro_batches)
            for kind in self.kinds
            for stage in range(1 if kind == "R" else self.num_stages)
        ]


class ListScheduler:
    """One run.

    limits: what each rank may keep at once, see Limits. With one stage a rank, limits of at least 1, and a
    total of at least 2, cannot deadlock: the last stage waits for no other, so what it keeps drains; then
    what the stage before it keeps; and so on (no send waits).
    """

    def __init__(self, job: Job, costs: Costs, priority: Priority, limits: Limits) -> None:
        self.job, self.costs, self.priority = job, costs, priority
        num_ranks = max(job.placement) + 1
        self.room: dict[Kind, list[int]] = {"f": list(limits.probes), "F": list(limits.pairs)}
        self.total, self.open = list(limits.total), limits.open
        self.rows: list[list[Action]] = [[] for _ in range(num_ranks)]
        self.ready: list[list[tuple[tuple[float, ...], Action]]] = [[] for _ in range(num_ranks)]
        self.blocked: list[list[tuple[tuple[float, ...], Action]]] = [[] for _ in range(num_ranks)]
        self.idle = [True] * num_ranks
        self.missing: dict[Action, int] = {}
        self.followers: dict[Action, list[Action]] = {}
        self.events: list[tuple[float, int, Action]] = []  # arrivals (1) and ends (0) of actions
        for action in job.actions():
            wanted = needs(action, job.num_stages, "f" in job.kinds)
            self.missing[action] = len(wanted)
            for need in wanted:
                self.followers.setdefault(need, []).append(action)
            if not wanted:
                self._push(action)

    def _push(self, action: Action) -> None:
        heapq.heappush(self.ready[self.job.placement[action.stage]], (self.priority(action), action))

    def run(self) -> tuple[tuple[Action, ...], ...]:
        """The rows of all ranks."""
        now, freed = 0.0, list(range(len(self.rows)))
        while True:
            for rank in sorted(set(freed)):
                if self.idle[rank]:
                    self._start(rank, now)
            if not self.events:
                break
            now, freed = self.events[0][0], []
            while self.events and self.events[0][0] == now:
                _, arrival, action = heapq.heappop(self.events)
                freed.append(self._arrive(action) if arrival else self._end(action, now))
        assert not any(self.missing.values()), "limits left actions out"
        return tuple(map(tuple, self.rows))

    def _start(self, rank: int, now: float) -> None:
        """Give a free rank its next action, where one is ready that its limits allow."""
        while self.ready[rank]:
            entry = heapq.heappop(self.ready[rank])
            action = entry[1]
            if action.kind in self.room:
                weight = WEIGHTS[action.kind]
                enters = action.kind == "f" and action.stage == 0
                if (
                    self.room[action.kind][rank] < 1
                    or self.total[rank] < weight
                    or (enters and not self.open)
                ):
                    self.blocked[rank].append(entry)
                    continue
                self.room[action.kind][rank] -= 1
                self.total[rank] -= weight
                self.open -= enters
            self.rows[rank].append(action)
            self.idle[rank] = False
            heapq.heappush(self.events, (now + self.costs.duration(action), 0, action))
            return

    def _arrive(self, action: Action) -> int:
        """One of the things that an action needs is there; returns its rank."""
        self.missing[action] -= 1
        if not self.missing[action]:
            self._push(action)
        return self.job.placement[action.stage]

    def _end(self, action: Action, now: float) -> int:
        """Free the rank and what the action kept, send on what it made; returns its rank."""
        rank = self.job.placement[action.stage]
        self.idle[rank] = True
        freed: Kind | None = {"b": "f", "B": "F", "W": "F"}.get(action.kind)  # type: ignore[assignment]
        self.open += action.stage == 0 and action.result.kind == "B"
        if freed is not None:
            self.room[freed][rank] += 1
            self.total[rank] += WEIGHTS[freed]
        for entry in self.blocked[rank]:
            heapq.heappush(self.ready[rank], entry)
        self.blocked[rank].clear()
        for follower in self.followers.get(action.result, []):
            away = self.job.placement[follower.stage] != rank
            arrival = now + (self.costs.flight(action.micro_batch) if away else 0)
            heapq.heappush(self.events, (arrival, 1, follower))
        return rank
