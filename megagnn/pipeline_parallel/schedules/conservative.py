"""Schedules of a step on conservative forces: two passes of every micro-batch, interleaved.

Pass 1 goes down the stages (f) and up (b); forces are known at stage 0 (R); pass 2 goes down on pairs (F)
and up (B, or I and W). `actions.needs` has the dependencies, [Note: executor] the messages. In units of a
forward product f, b, F, B take 1, 1, 2, 4, in all T = 8. For p ranks and m micro-batches:

    schedule                      makespan            most kept by a rank (f 1, F 2)    graphs in memory
    two flushed 1F1B passes       8 m + 8 (p-1)       2p                                m
    `conservative`                8 m + 5 (p-1)       3p                                2p
    with memory 2p, graphs m      8 m + 5 (p-1)       2p                                m
    `conservative`, B split       8 m + (p-1) + few   3p                                3p

No schedule is shorter than 8 m + 5 (p-1), or 8 m + (p-1) where B is split: the last rank is idle for p-1
before f0 arrives, and after its last B the cotangents climb p-1 stages of 4. (That is for m >= 2p or so;
with fewer the way of one micro-batch, 8p, counts.)

[Note: steady state] All four kinds move half a period a stage: f and F arrive T/2 later at the next stage,
b and B at the one before. Down and up together make a whole period, so the repeated pattern f b F B is the
same on every rank, T/2 shifted from one to the next, and nothing collides. A micro-batch takes two periods
a stage, so 2p are open; f is kept for up to p periods and F for up to p. List scheduling by these virtual
times packs the beginning and the end.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megagnn.pipeline_parallel.actions import Action, Kind, Schedule, needs
from megagnn.pipeline_parallel.registry import register
from megagnn.pipeline_parallel.schedules.ordinary import alternate, as_schedule, check_sizes
from megagnn.pipeline_parallel.simulate import CONSERVATIVE, Costs, peaks, simulate

WHOLE: tuple[Kind, ...] = ("f", "b", "R", "F", "B")
SPLIT: tuple[Kind, ...] = ("f", "b", "R", "F", "I", "W")


@register("two-pass", conservative=True)
def two_pass(num_ranks: int, num_micro_batches: int) -> Schedule:
    """The baseline: 1F1B of f and b over all micro-batches, then 1F1B of F and B."""
    check_sizes(num_ranks, num_micro_batches)
    rows = []
    for rank in range(num_ranks):
        row: list[Action] = []
        for action in alternate(rank, num_ranks, num_micro_batches, "f", "b"):
            row.append(action)
            if action.kind == "b" and rank == 0:
                row.append(Action(0, "R", action.micro_batch))
        rows.append(row + alternate(rank, num_ranks, num_micro_batches, "F", "B"))
    return as_schedule("two-pass", rows, num_micro_batches, range(num_ranks))


class Rule(NamedTuple):
    """A priority, and the most micro-batches that it should open."""

    priority: Priority
    open: int


@register("conservative", conservative=True)
def conservative(
    num_ranks: int,
    num_micro_batches: int,
    *,
    split: bool = False,
    costs: Costs | None = None,
    memory: float | None = None,
    graphs: int | None = None,
) -> Schedule:
    """The two passes interleaved by list scheduling; the shortest of a few rules, then the leanest.

    Args:
        num_ranks, num_micro_batches: p, m; one stage a rank.
        split: B as I and W, for the smaller bubble; what F keeps then lives longer.
        costs: to plan with; by default equal stages and micro-batches, 1, 1, 2, 4 (2 and 2).
        memory: most activations of a stage's forward that a rank may keep (f 1, F 2); by default 3p.
        graphs: most micro-batches between f and B at stage 0, whose graphs are in memory; by default 3p.

    Raises:
        ValueError: sizes or graphs below 1, a memory below 3, or costs of other numbers of stages or
        micro-batches.
    """
    check_sizes(num_ranks, num_micro_batches)
    memory = 3.0 * num_ranks if memory is None else memory
    graphs = 3 * num_ranks if graphs is None else graphs
    if memory < 3 or graphs < 1:
        raise ValueError(
            "a rank must keep one f and one F, 3 activations, and one graph, got a memory of "
            f"{memory:g} and {graphs} graphs; use more"
        )
    costs = costs or Costs(CONSERVATIVE)
    name = "conservative-zb" if split else "conservative"
    job = Job(tuple(range(num_ranks)), num_micro_batches, SPLIT if split else WHOLE)
    costs.check(Schedule(name, job.placement, num_micro_batches, ((),) * num_ranks))
    ahead = [num_ranks - rank for rank in range(num_ranks)]
    found = []
    for rule in rules(num_ranks, costs.phase, split):
        limits = Limits(
            probes=[2 * count for count in ahead],
            pairs=[num_ranks] * num_ranks if split else ahead,
            total=[memory] * num_ranks,
            open=min(rule.open, graphs),
        )
        rows = ListScheduler(job, costs, rule.priority, limits).run()
        found.append(Schedule(name, job.placement, num_micro_batches, rows))
    return min(found, key=lambda s: (simulate(s, costs).makespan, open_graphs(s), max(peaks(s))))


@register("conservative-zb", conservative=True)
def conservative_zb(num_ranks: int, num_micro_batches: int) -> Schedule:
    """`conservative` with B split."""
    return conservative(num_ranks, num_micro_batches, split=True)


def open_graphs(schedule: Schedule) -> int:
    """Most micro-batches that are begun and not ended at stage 0, hence graphs in memory."""
    count = most = 0
    first: Kind = "f" if schedule.conservative else "F"
    for action in schedule.rows[schedule.placement[0]]:
        if action.stage == 0:
            count += (action.kind == first) - (action.result.kind == "B")
            most = max(most, count)
    return most


def rules(num_ranks: int, phase: Mapping[Kind, float], split: bool) -> list[Rule]:
    """The rules tried: each was best somewhere in a search over orders, rounds and strides."""
    p, many = num_ranks, 10**9
    if not split:
        return [
            Rule(by_time(p, phase), 2 * p),
            Rule(by_kind("RBbfF"), many),  # pass 1 ahead: all graphs, less memory
            Rule(by_kind("RBFbf"), many),  # for m < 2p: the way of the first micro-batch first
        ]
    return [
        Rule(by_time(p, phase), 3 * p),
        Rule(by_kind("RIFbfW"), many),
        Rule(by_kind("RIFfbW"), many),
        Rule(by_kind("RbfFIW", rounds=3 * p), many),
        Rule(by_kind("RIbfFW", rounds=max(1, 3 * p // 2)), 3 * p),
        Rule(by_kind("RFfbIW", rounds=2 * p), many),
    ]


def by_time(num_ranks: int, phase: Mapping[Kind, float]) -> Priority:
    """Earlier virtual time of [Note: steady state] first; weight parts last."""
    period = sum(phase[kind] for kind in WHOLE)
    up = max(period / 2, phase["B"])
    down, last = period - up, num_ranks - 1
    b = down * last + phase["f"]  # at the last rank
    F = b + up * last + phase["b"]  # at stage 0
    B = F + down * last + phase["F"]  # at the last rank
    start = {"f": 0.0, "b": b + up * last, "R": b + up * last, "F": F, "B": B + up * last, "I": B + up * last}
    stride = {"f": down, "b": -up, "R": 0, "F": down, "B": -up, "I": -up}

    def priority(action: Action) -> tuple[float, ...]:
        stage, kind, micro_batch = action
        if kind == "W":
            return 1, micro_batch
        return 0, start[kind] + stride[kind] * stage + period * micro_batch

    return priority


def by_kind(order: str, rounds: int = 10**9) -> Priority:
    """Rounds of micro-batches one by one, kinds as ordered, earlier micro-batches; weight parts last."""
    place = {kind: index for index, kind in enumerate(order)}
    return lambda action: (
        action.kind == "W",
        action.micro_batch // rounds,
        place[action.kind],
        action.micro_batch,
    )


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
        return len(self.placement)

    def actions(self) -> list[Action]:
        return [
            Action(stage, kind, i)
            for i in range(self.num_micro_batches)
            for kind in self.kinds
            for stage in range(1 if kind == "R" else self.num_stages)
        ]


class ListScheduler:
    """Every free rank takes the ready action of highest priority: Graham's list scheduling (1966).

    On the dependency graph, with limits on what a rank keeps. Deterministic: ties go to the earlier
    micro-batch.

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
