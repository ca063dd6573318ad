"""Plans of epochs: processor time and memory for very many structures, and how even the work of ranks is.

    python -m tools.bench.plans                                   # 10^8 structures of drawn sizes
    python -m tools.bench.plans --balance runs/data/three-sources

Sizes are drawn from those of four kinds of structures (molecules, slabs, crystals, large cells). Balance is
the mean over steps of the largest rank's edges + atoms over the mean rank's: of the plan, and of batches of a
fixed number of structures, as a shuffling sampler and a batch size make them, with as many in a batch as the
plan has on average. The last step, which is not full, is left out of both.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megagnn.data import order
from megagnn.data.arrays import Ints
from megagnn.data.dataset import StructureDataset
from megagnn.data.sampler import BudgetSampler

# Atoms and edges per atom at 5 Å: shares of the kinds, means, spreads.
KINDS = ((0.4, 15, 6, 15), (0.35, 70, 25, 35), (0.2, 30, 15, 45), (0.05, 200, 80, 50))


def drawn_sizes(count: int, seed: int = 0) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Atoms and edges of so many structures, int32; neighbours are of one kind, as in data sets on disk."""
    rng = np.random.default_rng(seed)
    atoms, edges = np.empty(count, dtype=np.int32), np.empty(count, dtype=np.int32)
    bounds = np.concatenate([[0], np.cumsum([share for share, *_ in KINDS])])
    for begin, end, (_, mean, spread, per_atom) in zip(bounds[:-1], bounds[1:], KINDS, strict=True):
        for start in range(int(begin * count), int(end * count), 2**20):
            rows = slice(start, min(start + 2**20, int(end * count)))
            size = rows.stop - rows.start
            some = np.clip(rng.normal(mean, spread, size), 2, 4 * mean)
            atoms[rows], edges[rows] = some, some * rng.normal(per_atom, 0.15 * per_atom, size).clip(1)
    return atoms, edges


def plan_time(count: int, dp_size: int) -> dict[str, float]:
    """An epoch planned from its first step to its last."""
    atoms, edges = drawn_sizes(count)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, wall = time.process_time(), time.perf_counter()
    sampler = BudgetSampler(atoms, edges, max_atoms=2048, max_edges=65536, dp_size=dp_size, oversized="alone")
    batches = sampler.num_batches(0)
    return {
        "structures": count,
        "ranks": dp_size,
        "batches": batches * dp_size,
        "processor_seconds": round(time.process_time() - start, 1),
        "seconds": round(time.perf_counter() - wall, 1),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "peak_gib_before": round(before / 2**20, 2),
    }


def imbalance(work: Ints) -> float:
    """Mean over steps of largest over mean; work: (steps, ranks)."""
    return float((work.max(1) / work.mean(1)).mean())


def balance(
    paths: list[str], dp_size: int, max_atoms: int, max_edges: int, cutoff: float
) -> list[dict[str, float]]:
    """Of the plan for few structures, the plan by windows, and a fixed number of structures."""
    dataset = StructureDataset(paths, "train", cutoff)
    cost = dataset.num_atoms + dataset.num_edges
    lines: list[dict[str, float]] = []
    whole = order.WHOLE
    for order.WHOLE in (whole, 0):
        sampler = BudgetSampler(
            dataset.num_atoms, dataset.num_edges, max_atoms=max_atoms, max_edges=max_edges, dp_size=dp_size
        )
        plan = sampler.plan(0)[:-1]
        work = np.array([[cost[batch].sum() for batch in step] for step in plan])
        mean = float(np.mean([len(batch) for step in plan for batch in step]))
        edges = np.mean([dataset.num_edges[batch].sum() for step in plan for batch in step])
        lines.append(
            {
                "largest/mean": round(imbalance(work), 4),
                "per_batch": round(mean, 1),
                "fill": round(float(edges) / max_edges, 3),
            }
        )
        if order.WHOLE:
            fixed = int(mean)
            rows = np.random.default_rng(0).permutation(len(cost))
            rows = rows[: len(cost) // (fixed * dp_size) * fixed * dp_size].reshape(-1, dp_size, fixed)
            work = cost[rows].sum(-1)
            over = float((dataset.num_edges[rows].sum(-1) > max_edges).mean())
            lines.append({"largest/mean": round(imbalance(work), 4), "per_batch": fixed, "over_budget": over})
    order.WHOLE = whole
    return lines


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--structures", type=int, default=10**8)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--balance", nargs="+", metavar="STORE")
    parser.add_argument("--max-atoms", type=int, default=512)
    parser.add_argument("--max-edges", type=int, default=6000)
    parser.add_argument("--cutoff", type=float, default=4.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.balance:
        lines = balance(args.balance, args.ranks, args.max_atoms, args.max_edges, args.cutoff)
    else:
        lines = [plan_time(args.structures, args.ranks)]
    for line in lines:
        print(json.dumps(line))
    if args.json is not None:
        args.json.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
