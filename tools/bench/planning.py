"""Planned memory and time of a rank beside what was measured.

    python -m tools.bench.planning              # against the documents; measures nothing
    python -m tools.bench.planning --measure --ranks 1 2 4 --width 256 --layers 6 --edges 8000

The documents are the memory table (docs/results/memory-table.md), and steps of whole trainings in one thread
(docs/forces.md), whose time is compared with that of the cluster `2core`. `--measure` runs the rows of the
memory table (tools/bench/memory/rows.py) on this machine instead, every row in fresh processes. Ends with an
error where a peak is further off than `--within`.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch._dynamo  # noqa: F401 # optimizers import it: here once, before the ranks are forked

from megagnn.config import config_from_dict, load_config
from megagnn.plan.cluster import load_cluster
from megagnn.plan.layout import Layout, Sizes, make_layout
from megagnn.plan.memory import course, peak, worst_course
from megagnn.plan.times import times
from tools.bench.memory.rows import Row, Size, table_rows
from tools.bench.memory.table import NAMES, on_ranks
from tools.bench.work.edge import ELEMENTS, NEIGHBOURS, NUM_RADIAL

ROOT = Path(__file__).parents[2]
PAGE, STEPS_PAGE = ROOT / "docs/results/memory-table.md", ROOT / "docs/forces.md"


class Measured(NamedTuple):
    """A row of the table on so many ranks, and the peak of its tensors, bytes."""

    row: Row
    size: Size
    peak: float


def layout_of(row: Row, size: Size) -> Layout:
    """The layout that a row of the memory table has."""
    dp = size.ranks // row.tp
    sizes = Sizes(
        round(size.edges / NEIGHBOURS / dp), round(size.edges / dp), 2 * row.tp, num_elements=len(ELEMENTS)
    )
    model = {"width": size.width, "num_layers": size.layers, "num_radial": NUM_RADIAL, "forces": size.forces}
    folder = {"offload_dir": size.folder or "/tmp"} if row.offload == "disk" else {}
    parallel = {"data": dp, "tensor": row.tp, "zero_stage": row.stage or 0}
    config = config_from_dict(
        {
            "model": {**model, **row.model},
            "optim": {"offload": row.offload, **folder},
            "parallel": {**parallel, "bucket_megabytes": size.bucket_megabytes},
            "train": {"gradient_method": row.method},
        }
    )
    return make_layout(config, sizes, size.ranks, averages=False)


def planned_bytes(row: Row, size: Size) -> float:
    """Peak of a rank's tensors by the plan."""
    return peak(worst_course(layout_of(row, size), host_is_device=True)[1]).total


def measure_all(arguments: argparse.Namespace) -> list[Measured]:
    """Runs every row on every number of ranks that it can have."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for forces in arguments.forces:
            for ranks in arguments.ranks:
                sizes = (arguments.width, arguments.layers, arguments.edges, forces, ranks, 1, folder, 1.0)
                for row in (row for row in table_rows(forces) if ranks % row.tp == 0):
                    size = Size(*sizes)
                    most = max(rank["peak_bytes"] for rank in on_ranks(row, size))
                    found.append(Measured(row, size, most))
                    print(f"{forces}, {ranks} ranks, {row.name}: {most / 1e6:.1f} MB", file=sys.stderr)
    return found


def read_page(text: str) -> list[Measured]:
    """The peaks that docs/results/memory-table.md has. Raises ValueError where it has none."""
    found = []
    for forces, title in NAMES.items():
        pattern = rf"### {title}, (\d+) ranks\n\nWidth (\d+), (\d+) layers, [\d,]+ parameters, ([\d,]+) "
        for match in re.finditer(pattern, text):
            ranks, width, layers, edges = (int(number.replace(",", "")) for number in match.groups())
            lines = text[match.end() :].split("At the peak")[0].splitlines()
            cells = [line.split("|") for line in lines if re.search(r"\| dp \d", line)]
            peaks = {cell[1].strip(): 1e6 * float(cell[3]) for cell in cells}
            size = Size(width, layers, edges, forces, ranks, 1, "", 1.0)
            found += [Measured(row, size, peaks[row.name]) for row in table_rows(forces) if row.name in peaks]
    if not found:
        raise ValueError("the page has no table as tools/bench/memory/table.py writes it; name that page")
    return found


def table(rows: list[Measured]) -> str:
    """Markdown."""
    lines = [
        "| forces | ranks | | measured, MB | planned, MB | planned / measured |",
        "|---|---|---|---|---|---|",
    ]
    for row, size, most in rows:
        plan, layout = planned_bytes(row, size), f"dp {size.ranks // row.tp}"
        layout += f" x tp {row.tp}" if row.tp > 1 else ""
        numbers = f"{most / 1e6:.1f} | {plan / 1e6:.1f} | {plan / most:.3f}"
        lines.append(f"| {size.forces} | {layout} | {row.name} | {numbers} |")
    off = [abs(planned_bytes(row, size) / most - 1) for row, size, most in rows]
    worst, mean = 100 * max(off), 100 * sum(off) / len(off)
    lines.append(f"\n{len(off)} layouts, {worst:.1f} % off at most, {mean:.1f} % on average")
    return "\n".join(lines)


class Step(NamedTuple):
    """A step of a training on one rank: measured and planned seconds, and bytes above what is kept."""

    name: str
    seconds: float
    planned_seconds: float
    peak: float
    planned_peak: float


def read_steps(text: str) -> list[Step]:
    """The steps that docs/forces.md has. Raises ValueError where it has none, or those of other models."""
    pattern = r"\| megagnn: (\w+), (\w+), (\d+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|"
    found, cluster = [], load_cluster("2core")
    for family, forces, width, *numbers in re.findall(pattern, text):
        parameters, milliseconds, megabytes = (int(number.replace(",", "")) for number in numbers)
        file = ROOT / f"examples/configs/mlearn{'-egnn' if family == 'egnn' else ''}.toml"
        config = load_config(file, ["--model.forces", forces, "--model.width", width])
        layout, name = (
            make_layout(config, Sizes(1024, 1024 * 28, num_elements=1), 1),
            f"{family}, {forces}, {width}",
        )
        if layout.num_parameters != parameters:
            raise ValueError(
                f"{name} has {layout.num_parameters} parameters, not {parameters}; measure it again"
            )
        moments = course(layout)
        above = peak(moments).total - moments[0].total
        planned = times(layout, cluster).step
        found.append(Step(name, 1e-3 * milliseconds, planned, 1e6 * megabytes, above))
    if not found:
        raise ValueError(
            "the page has no steps of trainings as tools/peers/steps.py writes them; name that page"
        )
    return found


def step_table(steps: list[Step]) -> str:
    """Markdown."""
    lines = [
        "| | measured, ms | planned / measured | measured, MB | planned / measured |",
        "|---|---|---|---|---|",
    ]
    for s in steps:
        time = f"{1e3 * s.seconds:,.0f} | {s.planned_seconds / s.seconds:.2f}"
        lines.append(f"| {s.name} | {time} | {s.peak / 1e6:,.0f} | {s.planned_peak / s.peak:.3f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure or read, compare, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--forces", nargs="+", choices=list(NAMES), default=list(NAMES))
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--edges", type=int, default=8000, help="of the batch of all ranks together")
    parser.add_argument("--measure", action="store_true", help="instead of reading the documents")
    parser.add_argument("--within", type=float, default=0.1, help="share by which a plan may be off")
    arguments = parser.parse_args()
    rows = measure_all(arguments) if arguments.measure else read_page(PAGE.read_text())
    print(table(rows))
    if not arguments.measure:
        print(f"\n{step_table(read_steps(STEPS_PAGE.read_text()))}")
    worst = max(abs(planned_bytes(row, size) / most - 1) for row, size, most in rows)
    if worst > arguments.within:
        raise SystemExit(f"a plan is {100 * worst:.1f} % off, more than {100 * arguments.within:.0f} %")


if __name__ == "__main__":
    main()
