"""A schedule's time, bubble and memory from costs, without processes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from megagnn.pipeline_parallel.actions import Action, Kind, Schedule, needs

# Units of a forward's products. Conservative forces: docs/forces.md, Cost.
ORDINARY: Mapping[Kind, float] = {"F": 1, "B": 2, "I": 1, "W": 1}
CONSERVATIVE: Mapping[Kind, float] = {"f": 1, "b": 1, "R": 0, "F": 2, "B": 4, "I": 2, "W": 2}
# Recomputed layers: each backward computes its forward once more, 11 units.
RECOMPUTED: Mapping[Kind, float] = {"f": 1, "b": 2, "R": 0, "F": 2, "B": 6, "I": 4, "W": 2}
# create_graph: f, b, then down through the graph of b and up through that of f, 6 units (JanusPipe's four
# phases).
CREATE_GRAPH: Mapping[Kind, float] = {"f": 1, "b": 1, "R": 0, "F": 2, "B": 2, "I": 1, "W": 1}


@dataclass(frozen=True)
class Costs:
    """Durations: phase x stage x micro-batch, and of messages: latency + size of the micro-batch / bandwidth.

    phase: by kind. stage: (S,) relative cost of each stage; () for 1. micro_batch: (m,) likewise. latency,
    per_size: of a message between ranks; the link takes any number at a time.
    """

    phase: Mapping[Kind, float] = field(default_factory=lambda: ORDINARY)
    stage: Sequence[float] = ()
    micro_batch: Sequence[float] = ()
    latency: float = 0.0
    per_size: float = 0.0

    def size(self, micro_batch: int) -> float:
        return self.micro_batch[micro_batch] if len(self.micro_batch) else 1

    def duration(self, action: Action) -> float:
        stage = self.stage[action.stage] if len(self.stage) else 1
        return self.phase[action.kind] * stage * self.size(action.micro_batch)

    def flight(self, micro_batch: int) -> float:
        return self.latency + self.per_size * self.size(micro_batch)

    def check(self, schedule: Schedule) -> None:
        """Refuse costs of other numbers of stages or micro-batches.

        Raises:
            ValueError: naming both numbers.
        """
        for name, costs, count in (
            ("stage", self.stage, schedule.num_stages),
            ("micro-batch", self.micro_batch, schedule.num_micro_batches),
        ):
            if len(costs) not in (0, count):
                raise ValueError(
                    f"{len(costs)} {name} costs for a schedule of {count}; give one for each, or none"
                )


class Event(NamedTuple):
    """An action with its times, planned or measured."""

    rank: int
    action: Action
    start: float
    end: float


def bubble_of(events: Sequence[Event], num_ranks: int) -> float:
    """Share of ranks x makespan that no action fills."""
    makespan = max(e.end for e in events) - min(e.start for e in events)
    busy = sum(e.end - e.start for e in events)
    return 1 - busy / (makespan * num_ranks) if makespan else 0.0


@dataclass(frozen=True)
class Timeline:
    """The result of a simulation.

    makespan: end of the last action. bubble: share of ranks x makespan that is not work. finished: False
    where ranks wait for ever; then `events` end there.
    """

    events: tuple[Event, ...]
    makespan: float
    bubble: float
    finished: bool


def simulate(schedule: Schedule, costs: Costs | None = None) -> Timeline:
    """Run every rank's actions in order, each as soon as what it needs is there; sends take a rank no time.

    Raises:
        ValueError: costs of other numbers of stages or micro-batches.
    """
    costs = costs or Costs(CONSERVATIVE if schedule.conservative else ORDINARY)
    costs.check(schedule)
    conservative, placement = schedule.conservative, schedule.placement
    done: dict[Action, float] = {}
    events: list[Event] = []
    clock = [0.0] * schedule.num_ranks
    position = [0] * schedule.num_ranks
    waiting: dict[Action, list[int]] = {}
    active = list(range(schedule.num_ranks))
    while active:
        rank = active.pop()
        row = schedule.rows[rank]
        while position[rank] < len(row):
            action = row[position[rank]]
            wanted = needs(action, schedule.num_stages, conservative)
            missing = next((need for need in wanted if need not in done), None)
            if missing is not None:
                waiting.setdefault(missing, []).append(rank)
                break
            start = clock[rank]
            for need in wanted:
                away = placement[need.stage] != rank
                start = max(start, done[need] + (costs.flight(need.micro_batch) if away else 0))
            clock[rank] = done[action.result] = start + costs.duration(action)
            events.append(Event(rank, action, start, clock[rank]))
            position[rank] += 1
            active += waiting.pop(action.result, [])
    makespan = max(clock)
    busy = sum(event.end - event.start for event in events)
    events.sort(key=lambda event: (event.start, event.rank))
    bubble = 1 - busy / (makespan * schedule.num_ranks) if makespan else 0.0
    return Timeline(tuple(events), makespan, bubble, len(events) == sum(map(len, schedule.rows)))


def kept(schedule: Schedule, weights: Mapping[Kind, float] | None = None) -> Iterator[list[float]]:
    """For each rank what it keeps for backwards after each action, in activations of one stage's forward.

    f is kept to b, F to B or W. weights: of f and F; by default 1, and 2 for F on pairs. No timing enters:
    a row's order alone decides.
    """
    weights = weights or {"f": 1, "F": 2 if schedule.conservative else 1}
    freed: dict[Kind, Kind] = {"b": "f", "B": "F", "W": "F"}
    for row in schedule.rows:
        held, course = 0.0, []
        for action in row:
            held += weights.get(action.kind, 0) - weights.get(freed.get(action.kind, "R"), 0)
            course.append(held)
        yield course


def peaks(schedule: Schedule, weights: Mapping[Kind, float] | None = None) -> list[float]:
    """(p,) largest of `kept`; with interleaving in activations of a chunk."""
    return [max(course, default=0) for course in kept(schedule, weights)]
