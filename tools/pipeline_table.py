"""Pipeline schedules compared by the simulator: bubble, memory, throughput; no processes, no timing.

    python tools/pipeline_table.py                                     # all tables, as Markdown
    python tools/pipeline_table.py --tables forces --stages 8 --per-stage 1 2 4 8
    python tools/pipeline_table.py --tables --plot timeline.png --trace trace.json --stages 4 --per-stage 3

Every schedule is proved by the validator first. Costs are units of a forward's products (docs/forces.md);
stages are equal, micro-batches too except in the table `order`, and messages take no time except in the table
`latency`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from megagnn.data.sampler import hill
from megagnn.pipeline_parallel.actions import Schedule
from megagnn.pipeline_parallel.schedules.conservative import conservative, open_graphs, two_pass
from megagnn.pipeline_parallel.schedules.ordinary import gpipe, interleaved, one_f_one_b, zb_h1
from megagnn.pipeline_parallel.simulate import (
    CONSERVATIVE,
    ORDINARY,
    RECOMPUTED,
    Costs,
    Timeline,
    peaks,
    simulate,
)
from megagnn.pipeline_parallel.timeline import by_rank, save_trace, timeline_figure
from megagnn.pipeline_parallel.validate import validate

CHUNKS = 2
DRAWS, SPREAD = 30, 0.3  # of the table `order`


def proved(schedule: Schedule) -> Schedule:
    """The schedule, after the validator."""
    validate(schedule)
    return schedule


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def percent(share: float) -> str:
    """A share in per cent."""
    return f"{100 * share:.1f}"


def layouts(args: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """(stages, micro-batches)."""
    return ((p, p * factor) for p in args.stages for factor in args.per_stage)


def ordinary_table(args: argparse.Namespace) -> str:
    """Bubble, memory and throughput of an ordinary step's schedules."""
    rows = []
    for p, m in layouts(args):
        makers = {
            "GPipe": gpipe(p, m),
            "1F1B": one_f_one_b(p, m),
            f"interleaved, {CHUNKS} chunks": interleaved(p, m, CHUNKS),
            "ZB-H1": zb_h1(p, m),
        }
        work = {name: CHUNKS if name.startswith("inter") else 1 for name in makers}
        found = {name: simulate(proved(schedule)) for name, schedule in makers.items()}
        base = found["1F1B"].makespan
        bubbles = [percent(timeline.bubble) for timeline in found.values()]
        speeds = [f"{base * work[name] / timeline.makespan:.2f}" for name, timeline in found.items()]
        memory = [f"{max(peaks(schedule)) / work[name]:g}" for name, schedule in makers.items()]
        rows.append([p, m, " / ".join(bubbles), " / ".join(speeds), " / ".join(memory)])
    order = f"GPipe / 1F1B / interleaved ({CHUNKS} chunks) / ZB-H1"
    head = ["stages", "micro-batches", f"bubble, %: {order}", "throughput over 1F1B", "peak, micro-batches"]
    return table(head, rows)


def forces_table(args: argparse.Namespace) -> str:
    """The interleaved two passes against two flushed passes and against create_graph's phases."""
    rows = []
    for p, m in layouts(args):
        flushed = proved(two_pass(p, m))
        base = simulate(flushed)
        idle = base.makespan - 8 * m
        line: list[object] = [p, m, percent(base.bubble)]
        for split in (False, True):
            schedule = proved(conservative(p, m, split=split))
            found = simulate(schedule)
            bound = 8 * m + (p - 1) * (1 if split else 5)
            line += [
                f"{percent(found.bubble)} ({percent(1 - 8 * m / bound)})",
                percent(1 - (found.makespan - 8 * m) / idle) if idle else "",
                f"{base.makespan / found.makespan:.2f}",
                f"{6 * (m + p - 1) / found.makespan:.2f}",
                f"{max(peaks(schedule)):g}, {open_graphs(schedule)}",
            ]
        rows.append([*line, f"{max(peaks(flushed)):g}, {m}"])
    head = ["stages", "micro-batches", "two passes: bubble, %"]
    for name in ("whole B", "split B"):
        head += [
            f"{name}: bubble, % (bound)",
            "idle time removed, %",
            "throughput over two passes",
            "over create_graph's 1F1B",
            "peak activations, graphs",
        ]
    return table([*head, "two passes: peak, graphs"], rows)


def recomputed_table(args: argparse.Namespace) -> str:
    """The same where layers are run again, 11 units; create_graph keeps everything, 6 units."""
    costs = Costs(RECOMPUTED)
    rows = []
    for p, m in layouts(args):
        base = simulate(two_pass(p, m), costs).makespan
        line: list[object] = [p, m]
        for split in (False, True):
            found = simulate(proved(conservative(p, m, split=split, costs=costs)), costs).makespan
            removed = percent(1 - (found - 11 * m) / (base - 11 * m)) if p > 1 else ""
            line += [f"{base / found:.2f}", f"{6 * (m + p - 1) / found:.2f}", removed]
        rows.append(line)
    head = ["stages", "micro-batches"]
    for name in ("whole B", "split B"):
        head += [f"{name}: throughput over two passes", "over create_graph's 1F1B", "idle time removed, %"]
    return table(head, rows)


def schedules_of(p: int, m: int) -> dict[str, Callable[[], Schedule]]:
    """Those of the small tables."""
    return {
        "1F1B": lambda: one_f_one_b(p, m),
        "ZB-H1": lambda: zb_h1(p, m),
        "two passes": lambda: two_pass(p, m),
        "conservative": lambda: conservative(p, m),
        "conservative, split B": lambda: conservative(p, m, split=True),
    }


def order_table(args: argparse.Namespace) -> str:
    """Time with uneven micro-batches in several orders over that with even ones, which were planned for."""
    orders: dict[str, Callable[[list[float]], Iterable[int]]] = {
        "as drawn": lambda sizes: range(len(sizes)),
        "costliest first": lambda sizes: np.argsort(sizes)[::-1],
        "cheapest first": np.argsort,
        "`split.hill`": hill,
    }
    rows = []
    for p, m in ((4, 16), (8, 32)):
        rng = np.random.default_rng(0)
        draws = np.exp(SPREAD * rng.standard_normal((DRAWS, m)))
        draws /= draws.mean(axis=1, keepdims=True)
        for name, make in schedules_of(p, m).items():
            schedule = proved(make())
            even = simulate(schedule).makespan
            phase = CONSERVATIVE if schedule.conservative else ORDINARY
            line: list[object] = [p, m, name]
            for order in orders.values():
                sizes = [[float(draw[k]) for k in order(draw.tolist())] for draw in draws]
                times = [simulate(schedule, Costs(phase, micro_batch=size)).makespan for size in sizes]
                line.append(f"{np.mean(times) / even:.2f}")
            rows.append(line)
    return table(["stages", "micro-batches", "schedule", *orders], rows)


def latency_table(args: argparse.Namespace) -> str:
    """Bubble where each message takes a share of a forward; conservative ones planned for it or not."""
    rows = []
    latencies = (0.0, 0.1, 0.5, 1.0)
    p, m = 8, 32
    for name, make in schedules_of(p, m).items():
        schedule = proved(make())
        phase = CONSERVATIVE if schedule.conservative else ORDINARY
        costs = [Costs(phase, latency=latency) for latency in latencies]
        rows.append([name, *(percent(simulate(schedule, cost).bubble) for cost in costs)])
        if name.startswith("conservative"):
            split = "split" in name
            planned = [simulate(proved(conservative(p, m, split=split, costs=cost)), cost) for cost in costs]
            rows.append([f"{name}, planned for it", *(percent(found.bubble) for found in planned)])
    return table(["schedule", *(f"latency {latency:g}" for latency in latencies)], rows)


TABLES = {
    "ordinary": ordinary_table,
    "forces": forces_table,
    "recomputed": recomputed_table,
    "order": order_table,
    "latency": latency_table,
}


def timelines(p: int, m: int) -> dict[str, Timeline]:
    """What is drawn."""
    return {name: simulate(make()) for name, make in schedules_of(p, m).items()}


def main() -> None:
    """Prints the tables that the arguments ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", nargs="*", choices=sorted(TABLES), default=list(TABLES))
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--per-stage", nargs="+", type=int, default=[1, 2, 4], help="micro-batches per stage")
    parser.add_argument("--plot", type=Path, help="draw the timelines of the first layout")
    parser.add_argument("--trace", type=Path, help="write the last of these timelines for chrome://tracing")
    args = parser.parse_args()
    for name in args.tables:
        print(f"<!-- {name} -->\n{TABLES[name](args)}", flush=True)
    if args.plot or args.trace:
        found = timelines(*next(layouts(args)))
        if args.plot:
            figure = timeline_figure({name: timeline.events for name, timeline in found.items()})
            figure.savefig(args.plot, dpi=130)
        if args.trace:
            save_trace(args.trace, by_rank(list(found.values())[-1].events))


if __name__ == "__main__":
    main()
