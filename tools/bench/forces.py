"""Memory and time of a training step: what is kept for the backward, and how a force loss is differentiated.

Each variant takes the same step (forward, loss, backward, AdamW) of one model: the fused edge operation that
keeps its pre-activations (`save`), recomputes its blocks (`recompute`), recomputes whole layers (`layers`)
or `both`, and the unfused one without and with torch's checkpoint around each layer; conservative forces by
one backward and by `create_graph`. Losses and all gradients are compared first, then all are timed in turns.

    python -m tools.bench.forces --threads 2 --json forces.json --plot forces.png
    python -m tools.bench.forces --batches dense --losses conservative --widths 64 --no-memory
    python -m tools.bench.forces --threads 1 --clock cpu      # where others crowd the cores

The batches: training structures of the embedded data that fill a budget of edges, and liquid-like metal. The
baseline is `create_graph` with torch's checkpoint on the unfused layer. Floor: the time of the variant's
matrix products (edge_workload.step_flops) at the speed of the vendor's product of (E, F) with (F, F), timed
in the same rounds, and of one whose rows stay in the cache. Peak memory is that of tensors above what lives
between steps, of a process of its own (tools/bench/memory/step.py).
"""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tools.bench import harness
from tools.bench.edge_message import cached_ceiling, share
from tools.bench.memory.step import peak_memory_on
from tools.bench.work import edge as workload
from tools.bench.work import forces as forces_workload

# What the issue of this benchmark asks of one backward with recomputation.
MOST_MEMORY, MOST_TIME, MOST_OVER_FLOOR = 1 / 3, 1.75, 1.25
WIDTHS, EDGES = (64, 128, 256), 30_000


@dataclass
class ForcesRecord(harness.Record):
    """A record with the step's arithmetic and memory.

    over_floor, over_cached_floor: its time over that of its products at the speed of the vendor's product of
    (E, F), and of the one in the cache; medians of ratios within a round.
    time_over_baseline: its time over the baseline's, likewise. peak_bytes: by number of layers.
    """

    batch: str = ""
    flops: float = 0.0
    over_floor: float | None = None
    over_cached_floor: float | None = None
    time_over_baseline: float | None = None
    peak_bytes: dict[int, float] | None = None


def main() -> None:
    """Runs the cases that the arguments ask for."""
    args = harness.parse_args(
        __doc__,
        ("--batches", {"nargs": "+", "choices": ("real", "dense"), "default": ("real", "dense")}),
        ("--losses", {"nargs": "+", "choices": tuple(forces_workload.LOSSES)}),
        ("--edges", {"type": int, "default": EDGES, "help": "of a batch (default 30000)"}),
        ("--widths", {"nargs": "+", "type": int, "default": WIDTHS}),
        ("--memory-layers", {"nargs": "+", "type": int, "default": (3, 8)}),
        (
            "--variants",
            {
                "nargs": "+",
                "help": "fewer, as named in the table (default: all); the baseline is always there",
            },
        ),
        ("--no-memory", {"action": "store_true", "help": "leaves the memory out"}),
        ("--no-time", {"action": "store_true", "help": "leaves the timing out"}),
    )
    records: list[ForcesRecord] = []
    for name in args.batches:
        made = (forces_workload.real if name == "real" else forces_workload.dense)(args.edges)
        for loss in args.losses or tuple(forces_workload.LOSSES):
            for width in args.widths:
                found = forces_case(name, made, loss, width, args)
                print(markdown(found), flush=True)
                records += found
    plot_path, args.plot = args.plot, None
    if not args.no_time:
        harness.report(records, args)
    elif args.json:
        args.json.write_text(json.dumps([asdict(record) for record in records], indent=1) + "\n")
    if plot_path:
        plot(records, plot_path)


def forces_case(
    batch: str, made: forces_workload.ForcesBatch, loss: str, width: int, args: Any
) -> list[ForcesRecord]:
    """Checks and times the variants of one batch, loss and width, and measures their memory."""
    forces, names = forces_workload.LOSSES[loss], chosen(loss, args.variants)
    num_atoms, num_edges = made.sizes
    steps = {name: made.step(name, forces, width, workload.DEPTH) for name in names}
    error = workload.check_equal(steps)
    print(f"\n{batch} batch, loss on {loss}: losses and gradients equal to {error:.1e} of the largest")
    shape = {"E": num_edges, "N": num_atoms, "F": width, "L": workload.DEPTH}
    case = harness.Case(f"{loss} step", shape, "float32", dict(steps))
    flops = {name: workload.step_flops(name, forces, width, num_atoms, num_edges) for name in names}
    if args.no_time:
        records = [ForcesRecord(case.op, shape, "float32", name) for name in names]
    else:
        records = timed(case, width, flops, forces_workload.baseline(loss), args)
    for record in records:
        record.batch, record.flops, record.machine = batch, flops[record.impl], harness.machine()
    del steps, case
    gc.collect()
    if not args.no_memory:
        measure_memory(records, made, forces, args)
    return records


def chosen(loss: str, asked: Sequence[str] | None) -> list[str]:
    """The variants that were asked for, in their order, and the baseline last."""
    every = forces_workload.variants(loss)
    return [n for n in every[:-1] if asked is None or n.removeprefix("megagnn ") in asked] + every[-1:]


def timed(
    case: harness.Case, width: int, flops: dict[str, float], baseline: str, args: Any
) -> list[ForcesRecord]:
    """A record of each variant, with its time over the floors and over the baseline's."""
    case.ceilings = [
        harness.product_ceiling(case.shape["E"], width),
        cached_ceiling(case.shape["E"], width),
    ]
    every = harness.compare(case, args)
    by_name = {record.impl: record for record in every}
    large, cached = (
        [t / ceiling.num_flops for t in by_name[ceiling.name].round_seconds] for ceiling in case.ceilings
    )
    base = by_name[baseline].round_seconds
    records = [ForcesRecord(**vars(record)) for record in every if record.note != "ceiling"]
    for record in records:
        record.over_floor = 1 / share(flops[record.impl], large, record)
        record.over_cached_floor = 1 / share(flops[record.impl], cached, record)
        pairs = zip(record.round_seconds, base, strict=True)
        record.time_over_baseline = statistics.median(mine / theirs for mine, theirs in pairs)
    return records


def measure_memory(
    records: Sequence[ForcesRecord], made: forces_workload.ForcesBatch, forces: str, args: Any
) -> None:
    """Fills in the peak memory of each, by number of layers."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "batch.pt"
        made.save(path)
        for record in records:
            width = record.shape["F"]
            record.peak_bytes = {
                num_layers: peak_memory_on(path, record.impl, forces, width, num_layers, args.threads)
                for num_layers in args.memory_layers
            }


def markdown(records: Sequence[ForcesRecord]) -> str:
    """The records of one case as a table; the baseline is the last of them."""
    base, depths = records[-1], list(records[-1].peak_bytes or ())
    columns = ["variant", "ms", "time / baseline", "time / floor", "/ floor in cache"]
    columns += [f"MB, L = {depth} (/ baseline)" for depth in depths]
    shape = " ".join(f"{name}={size}" for name, size in base.shape.items())
    lines = [f"{base.batch} batch, {base.op}, {shape}", "", f"| {' | '.join(columns)} |"]
    lines.append("|---" * len(columns) + "|")
    for record in records:
        cells = [record.impl.removeprefix("megagnn ")]
        cells.append("-" if record.seconds is None else f"{record.seconds * 1e3:.0f}")
        ratios = (record.time_over_baseline, record.over_floor, record.over_cached_floor)
        cells += ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        for depth in depths:
            mine, theirs = (record.peak_bytes or {})[depth], (base.peak_bytes or {})[depth]
            cells.append(f"{mine / 1e6:.1f} ({mine / theirs:.3f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *targets(records)])


def targets(records: Sequence[ForcesRecord]) -> list[str]:
    """For one backward with recomputation, each demand and whether it is met."""
    lines, base = [], records[-1]
    for record in records if base.op.startswith("conservative") else ():
        memory, method = workload.variant(record.impl)
        if method != "one_backward" or memory not in ("recompute", "layers", "both"):
            continue
        parts = []
        for depth, mine in (record.peak_bytes or {}).items():
            ratio = mine / (base.peak_bytes or {})[depth]
            parts.append(f"memory, L = {depth} {ratio:.3f} {_met(ratio <= MOST_MEMORY)}")
        if record.time_over_baseline is not None and record.over_floor is not None:
            time, floor = record.time_over_baseline, record.over_floor
            parts.append(f"time {time:.2f} {_met(time <= MOST_TIME)}")
            parts.append(f"over floor {floor:.2f} {_met(floor <= MOST_OVER_FLOOR)}")
        lines.append(f"{memory}: {', '.join(parts)}")
    return ["", *lines] if lines else []


def _met(holds: bool) -> str:
    return "(met)" if holds else "(missed)"


def plot(records: Sequence[ForcesRecord], path: Path) -> None:
    """Peak memory against time, both over the baseline's, of conservative steps: a panel for each case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [r for r in records if r.peak_bytes and r.seconds is not None and r.op.startswith("conservative")]
    panels = list(dict.fromkeys((r.batch, r.shape["F"]) for r in shown))
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 4), squeeze=False, sharey=True)
    for (batch, width), ax in zip(panels, axes[0], strict=True):
        mine = [r for r in shown if (r.batch, r.shape["F"]) == (batch, width)]
        depth = next(iter(mine[-1].peak_bytes or {}))
        base = (mine[-1].peak_bytes or {})[depth]
        for record in mine:
            memory, method = workload.variant(record.impl)
            marker = "o" if method == "one_backward" else "x"
            x, y = record.time_over_baseline or 0.0, (record.peak_bytes or {})[depth] / base
            ax.plot(
                x, y, marker, color=f"C{list(workload.MEMORY).index(memory)}", label=f"{memory}, {method}"
            )
        ax.axhline(MOST_MEMORY, color="black", linewidth=0.5)
        ax.axvline(MOST_TIME, color="black", linewidth=0.5)
        ax.set(title=f"{batch} batch, F = {width}", xlabel="time / baseline", yscale="log")
    axes[0, 0].set_ylabel("peak memory / baseline")
    axes[0, -1].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
