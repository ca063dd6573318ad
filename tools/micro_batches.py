"""How even the micro-batches of a data set are, and what that is worth by the simulator.

    megagnn prepare examples/data/three-sources.tar.xz --out runs/data/three-sources
    python tools/micro_batches.py runs/data/three-sources --max-edges 750 --layouts 2,4,1 4,8,1 4,8,2

Plans one epoch of the training split in three ways: batches that are filled one after another as the data
are drawn (`drawn`), the structures of a step dealt over its micro-batches in the order that dealing leaves
(`dealt`), and in the order of `data.sampler.rounds_of`, which is what training does (`hill`). The
bubble is that of all ranks over whole steps: data-parallel ranks wait for each other at their end. No clocks.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pipeline_table import percent, table

from megagnn.data.dataset import StructureDataset
from megagnn.data.sampler import BudgetSampler
from megagnn.pipeline_parallel.actions import Schedule
from megagnn.pipeline_parallel.pipeline import schedule_for
from megagnn.pipeline_parallel.registry import registered
from megagnn.pipeline_parallel.simulate import CONSERVATIVE, ORDINARY, Costs, simulate

WAYS = ("drawn", "dealt", "hill")


class AsDealt(BudgetSampler):
    """Micro-batches in the order in which the structures were dealt."""

    def _rounds(self, dealt: list[NDArray[np.int64]]) -> list[list[NDArray[np.int64]]]:
        return [dealt[k : k + self.dp_size] for k in range(0, len(dealt), self.dp_size)]


def steps_of(
    way: str,
    num_atoms: NDArray[np.int64],
    num_edges: NDArray[np.int64],
    m: int,
    dp: int,
    budget: dict[str, int],
) -> NDArray[np.float64]:
    """(steps, dp, m) cost, edges + atoms, of each micro-batch of an epoch; missing ones cost 0."""
    kind = AsDealt if way == "dealt" else BudgetSampler
    sampler = kind(num_atoms, num_edges, dp_size=dp, per_step=1 if way == "drawn" else m, **budget)
    cost = num_atoms + num_edges
    rows = [[float(cost[batch].sum()) for batch in ranks] for ranks in sampler.plan(0)]
    rows += [[0.0] * dp] * (-len(rows) % m)
    return np.array(rows).reshape(-1, m, dp).transpose(0, 2, 1)


def bubble(schedule: Schedule, costs: NDArray[np.float64]) -> float:
    """Idle share of dp x p ranks over steps: each takes as long as the slowest data-parallel rank."""
    phase = CONSERVATIVE if schedule.conservative else ORDINARY
    unit = simulate(schedule, Costs(phase))
    work = unit.makespan * (1 - unit.bubble) * schedule.num_ranks / schedule.num_micro_batches
    busy = taken = 0.0
    for step in costs:
        spans = [simulate(schedule, Costs(phase, micro_batch=sizes.tolist())).makespan for sizes in step]
        busy += work * step.sum()
        taken += max(spans) * schedule.num_ranks * len(step)
    return 1 - busy / taken


def rows_of(
    dataset: StructureDataset, layouts: Sequence[Sequence[int]], budget: dict[str, int]
) -> list[list[object]]:
    """Lines of the table."""
    atoms, edges = np.asarray(dataset.num_atoms), np.asarray(dataset.num_edges)
    rows: list[list[object]] = []
    for p, m, dp in layouts:
        costs = {way: steps_of(way, atoms, edges, m, dp, budget) for way in WAYS}
        spread = [f"{np.mean(c.max((1, 2)) / c.mean((1, 2))):.3f}" for c in costs.values()]
        for name, entry in registered().items():
            if entry.stages_per_rank > 1:
                continue  # P is the number of stages, and of ranks
            forces = "conservative" if entry.conservative else "direct"
            schedule = schedule_for(name, forces, p, m)
            even = simulate(schedule).bubble
            found = [percent(bubble(schedule, c)) for c in costs.values()]
            rows.append([p, m, dp, name, percent(even), *found, " / ".join(spread)])
    return rows


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store")
    parser.add_argument("--cutoff", type=float, default=5.0, help="Å")
    parser.add_argument("--max-atoms", type=int, default=2048)
    parser.add_argument("--max-edges", type=int, default=65536)
    parser.add_argument(
        "--layouts", nargs="+", default=["2,4,1", "4,8,1", "4,8,2", "8,16,1"], metavar="P,M,DP"
    )
    args = parser.parse_args()
    dataset = StructureDataset([args.store], "train", args.cutoff)
    layouts = [[int(part) for part in layout.split(",")] for layout in args.layouts]
    budget = {"max_atoms": args.max_atoms, "max_edges": args.max_edges}
    head = ["stages", "micro-batches", "data ranks", "schedule", "even ones"]
    ways = [f"{way}: bubble, %" for way in WAYS]
    print(
        table([*head, *ways, "largest / mean cost: " + " / ".join(WAYS)], rows_of(dataset, layouts, budget))
    )


if __name__ == "__main__":
    main()
