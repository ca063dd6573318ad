"""Bubbles of pipelines as the executor runs them, beside the simulator's.

    python -m tools.bench.pipeline sleep --ranks 4 8            # actions that sleep their cost
    python -m tools.bench.pipeline work --ranks 2 --width 64    # real layers
    python -m tools.bench.pipeline work --trace trace.json --plot timeline.png
    python -m tools.bench.pipeline layers --layers 8 --ranks 4  # what layers cost, counted and measured

Starts the ranks on this machine over gloo. `sleep`: an action of cost c sleeps c units, so that ranks may be
more than cores, and its message holds a few numbers; what is measured is the order of the executor's waits.
`work`: an EGNN's step; the simulator gets the time that each action took, so that what differs is waiting for
messages, and for a processor to take them in. The bubble is the share of ranks x makespan that no
action fills; of several batches the median, the first is left out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagnn.objective.config import LossConfig
from megagnn.objective.loss import Loss, step_counts
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.point_to_point import Expected
from megagnn.parallel.spawn import spawn
from megagnn.parallel.world import barrier, gather_along
from megagnn.pipeline_parallel.actions import KINDS, Action, Kind, Message, Schedule, sends
from megagnn.pipeline_parallel.executor import Executor
from megagnn.pipeline_parallel.model_work import ModelWork
from megagnn.pipeline_parallel.pipeline import Pipeline, schedule_for
from megagnn.pipeline_parallel.registry import find, registered
from megagnn.pipeline_parallel.simulate import CONSERVATIVE, ORDINARY, Costs, Event, bubble_of, simulate
from megagnn.pipeline_parallel.stage import layer_costs, stages_of
from megagnn.pipeline_parallel.stage_costs import measured_costs
from megagnn.pipeline_parallel.timeline import by_rank, save_trace, timeline_figure
from tools.bench.work import edge as edge_workload


class SleepWork:
    """Actions that sleep."""

    def __init__(self, schedule: Schedule, unit: float) -> None:
        self.schedule, self.unit = schedule, unit
        self.costs = CONSERVATIVE if schedule.conservative else ORDINARY

    def expects(self, message: Message) -> list[Expected]:
        """A few numbers."""
        return [Expected((4,), torch.float64)]

    def run(self, action: Action, received: Sequence[Tensor]) -> list[Tensor]:
        """Sleep the action's cost; the message names it."""
        for (tensor,) in [received] if received else []:
            assert tensor[2].item() == action.micro_batch
        time.sleep(self.unit * self.costs[action.kind])
        if not sends(action, self.schedule.num_stages):
            return []
        return [torch.tensor([action.stage, 0, action.micro_batch, 0], dtype=torch.float64)]

    def kept(self) -> list[str]:
        """Nothing."""
        return []


def timeline_of(executor: Executor, context: ParallelContext) -> list[Event]:
    """The last batch's events of all pipeline ranks, from zero on, on each rank of one machine."""
    everything = [event for events in gather_along(executor.events, context, "pp") for event in events]
    first = min(event.start for event in everything)
    shifted = [e._replace(start=e.start - first, end=e.end - first) for e in everything]
    return sorted(shifted, key=lambda event: (event.start, event.rank))


def asleep(
    context: ParallelContext, names: Sequence[str], per_stage: int, unit: float, batches: int
) -> dict[str, list[list[Event]]]:
    """Timelines of each schedule."""
    found = {}
    for name in names:
        schedule = schedule_of(name, context.pp_size, per_stage * context.pp_size)
        executor = Executor(schedule, context)
        found[name] = []
        for _ in range(batches + 1):
            barrier(context)
            executor.run(SleepWork(schedule, unit))
            found[name].append(timeline_of(executor, context))
    return found


def schedule_of(name: str, num_ranks: int, num_micro_batches: int) -> Schedule:
    """The schedule of a name, for the kind of forces that it is for."""
    forces = "conservative" if find(name).conservative else "direct"
    return schedule_for(name, forces, num_ranks, num_micro_batches)


def at_work(
    context: ParallelContext, names: Sequence[str], per_stage: int, arguments: argparse.Namespace
) -> dict[str, list[list[Event]]]:
    """Timelines of each schedule on a model."""
    batch, cutoff = edge_workload.dense_batch(arguments.edges)
    found = {}
    for name in names:
        schedule = schedule_of(name, context.pp_size, per_stage * context.pp_size)
        forces = "conservative" if find(name).conservative else "direct"
        config = edge_workload.model_config(arguments.width, forces, cutoff, num_layers=arguments.layers)
        pipeline = Pipeline(config, edge_workload.statistics(), schedule, context)
        loss, batches = Loss(LossConfig(energy="mse", forces="mse")), [batch] * schedule.num_micro_batches
        counts = step_counts(batches, context)
        found[name] = []
        for _ in range(arguments.batches + 1):
            barrier(context)
            work = ModelWork(pipeline.potential, pipeline.stages, schedule, context, batches, loss, counts)
            pipeline.executor.run(work)
            found[name].append(timeline_of(pipeline.executor, context))
    return found


class MeasuredCosts(Costs):
    """Every action takes what it took."""

    def __init__(self, events: Sequence[Event]) -> None:
        super().__init__()
        object.__setattr__(self, "seconds", {e.action: e.end - e.start for e in events})

    def duration(self, action: Action) -> float:
        """Measured time of an action."""
        seconds: dict[Action, float] = self.seconds  # type: ignore[attr-defined]
        return seconds[action]


def kinds_of(events: Sequence[Event]) -> list[Kind]:
    """The kinds of action among the events, in their fixed order."""
    there = {e.action.kind for e in events}
    return [kind for kind in KINDS if kind in there]


def mean_of(kind: Kind, events: Sequence[Event]) -> float:
    """Mean time of a kind of action."""
    return statistics.mean(e.end - e.start for e in events if e.action.kind == kind)


def report(name: str, num_ranks: int, schedule: Schedule, runs: list[list[Event]], slept: bool) -> str:
    """A line of the table."""
    runs = runs[1:]
    middle = sorted(runs, key=lambda events: bubble_of(events, num_ranks))[len(runs) // 2]
    costs = None if slept else MeasuredCosts(middle)
    expected, got = simulate(schedule, costs).bubble, bubble_of(middle, num_ranks)
    spread = [100 * bubble_of(events, num_ranks) for events in runs]
    cells = [name, num_ranks, schedule.num_micro_batches, f"{100 * expected:.1f}", f"{100 * got:.1f}"]
    cells += [f"{100 * (got - expected):+.1f}", f"{min(spread):.1f} to {max(spread):.1f}"]
    cells.append(f"{statistics.median(max(e.end for e in events) for events in runs):.3f}")
    if not slept:
        cells.append(" ".join(f"{kind} {1000 * mean_of(kind, middle):.1f}" for kind in kinds_of(middle)))
    return "| " + " | ".join(map(str, cells)) + " |"


def layer_table(arguments: argparse.Namespace) -> str:
    """What layers cost, as counted and as measured, over a middle layer, and the stages that follow."""
    batch, cutoff = edge_workload.dense_batch(arguments.edges)
    loss, lines = Loss(LossConfig(energy="mse", forces="mse")), []
    for forces in ("direct", "conservative"):
        config = edge_workload.model_config(arguments.width, forces, cutoff, num_layers=arguments.layers)
        fitted = edge_workload.statistics()
        counted = layer_costs(config, fitted.mean_neighbours)
        measured = measured_costs(config, fitted, batch, loss, ParallelContext())
        for name, costs in (("counted", counted), ("measured", measured)):
            shares = " ".join(f"{cost / costs[1]:.2f}" for cost in costs)
            cut = " + ".join(str(len(s.layers)) for s in stages_of(costs, (arguments.ranks or [2])[0]))
            lines.append(f"| {forces} | {name} | {shares} | {cut} |")
    return "| forces | costs | of each layer | stages |\n| --- | --- | --- | --- |\n" + "\n".join(lines)


HEAD = ["schedule", "ranks", "micro-batches", "simulated %", "measured %", "difference", "all batches %", "s"]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=("sleep", "work", "layers"))
    parser.add_argument("--ranks", type=int, nargs="+", default=None)
    parser.add_argument("--schedules", nargs="+", default=list(registered()))
    parser.add_argument("--per-stage", type=int, default=2, help="micro-batches for each rank")
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--unit", type=float, default=0.02, help="seconds that a cost of 1 sleeps")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--edges", type=int, default=20000)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--trace", type=Path, help="Chrome trace of the last schedule")
    arguments = parser.parse_args()
    if arguments.mode == "layers":
        print(layer_table(arguments))
        return
    slept, timelines = arguments.mode == "sleep", {}
    head = HEAD if slept else [*HEAD, "mean of an action, ms"]
    print("| " + " | ".join(head) + " |\n" + "| --- " * len(head) + "|", flush=True)
    for ranks in arguments.ranks or ([4, 8] if slept else [2]):
        if slept:
            given: tuple[Any, ...] = (arguments.unit, arguments.batches)
            found = spawn(ranks, asleep, arguments.schedules, arguments.per_stage, *given, pp=ranks)[0]
        else:
            found = spawn(ranks, at_work, arguments.schedules, arguments.per_stage, arguments, pp=ranks)[0]
        for name, runs in found.items():
            schedule = schedule_of(name, ranks, arguments.per_stage * ranks)
            print(report(name, ranks, schedule, runs, slept), flush=True)
            timelines[f"{name}, {ranks} ranks, measured"] = runs[-1]
    if arguments.plot:
        timeline_figure(timelines, "seconds").savefig(arguments.plot, dpi=130)
    if arguments.trace:
        save_trace(arguments.trace, by_rank(list(timelines.values())[-1]))


if __name__ == "__main__":
    main()
