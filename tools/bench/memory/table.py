"""The memory table: peak memory and step time of a rank, technique by technique, with the peak's breakdown.

    python -m tools.bench.memory.table --ranks 2 4 --width 256 --layers 6 --edges 8000 --out runs/memory-table

Starts the ranks on this machine over gloo, every row in fresh processes. All rows of a table train the same
model from the same weights on the same batch, and their losses must equal plain's to 1e-5 of it. Writes
table.md, records.json and one picture for each kind of forces; `--report` puts the tables into a document
between its markers, and the pictures beside it. `--from` draws again what earlier
runs left in records.json.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch._dynamo  # noqa: F401 # optimizers import it: here once, before the ranks are forked

from megagnn.parallel.spawn import spawn
from tools.bench.memory import events as memory
from tools.bench.memory import plot as memory_plot
from tools.bench.memory.rows import Row, Size, measure, table_rows

BEGIN, END = "<!-- written by tools/bench/memory/table.py -->", "<!-- end of what is written -->"
TOLERANCE = 1e-5
NAMES = {"direct": "Direct forces", "conservative": "Conservative forces"}


def main() -> None:
    """Measure, check, write."""
    arguments = _arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    if arguments.records:
        records = [record for path in arguments.records for record in load(path)]
    else:
        for forces in arguments.forces:
            for ranks in arguments.ranks:
                records += run_table(forces, ranks, arguments)
        save(records, arguments.out / "records.json")
    text = "\n".join(table(group) for group in grouped(records))
    (arguments.out / "table.md").write_text(text)
    print(text)
    for path in draw(records, arguments.report.parent if arguments.report else arguments.out):
        print(f"wrote {path}")
    if arguments.report:
        put(arguments.report, text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[4], help="even numbers")
    parser.add_argument("--forces", nargs="+", choices=list(NAMES), default=list(NAMES))
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--edges", type=int, default=8000, help="of the batch of all ranks together")
    parser.add_argument("--steps", type=int, default=3, help="timed steps")
    parser.add_argument("--bucket-megabytes", type=float, default=1.0, help="of a message of gradients")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="these rows, and plain")
    parser.add_argument("--out", type=Path, default=Path("runs/memory-table"))
    parser.add_argument("--offload-dir", type=Path, help="for files of state; in --out if not given")
    parser.add_argument("--report", type=Path, help="document to put the tables into")
    parser.add_argument("--from", dest="records", nargs="+", type=Path, help="records.json of earlier runs")
    arguments = parser.parse_args()
    if odd := [ranks for ranks in arguments.ranks if ranks % 2]:
        parser.error(f"--ranks must be even, for tensor parallelism over 2, got {odd[0]}")
    return arguments


def run_table(forces: str, ranks: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The records of one table."""
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=arguments.offload_dir or arguments.out) as folder:
        size = Size(
            arguments.width,
            arguments.layers,
            arguments.edges,
            forces,
            ranks,
            arguments.steps,
            str(Path(folder).resolve()),
            arguments.bucket_megabytes,
        )
        for row in chosen(table_rows(forces), arguments.only):
            start = time.perf_counter()
            records.append(combined(on_ranks(row, size), row, size))
            check(records[-1], records[0])
            took = time.perf_counter() - start
            peak = records[-1]["peak_bytes"] / 1e6
            print(f"{forces}, {ranks} ranks, {row.name}: {peak:.1f} MB, took {took:.0f} s", flush=True)
    return records


def on_ranks(row: Row, size: Size) -> list[dict[str, Any]]:
    """What every rank measures; forked, for this process has started no threads."""
    return spawn(size.ranks, measure, row, size, tp=row.tp, start_method="fork")


def chosen(rows: list[Row], only: list[str] | None) -> list[Row]:
    """The named rows and the first. Raises ValueError for a name that there is not."""
    names = [row.name for row in rows]
    if unknown := [name for name in only or [] if name not in names]:
        raise ValueError(f"--only: there is no row '{unknown[0]}'; the rows are {', '.join(names)}")
    return [row for row in rows if only is None or row.name in only or row is rows[0]]


def combined(ranks: list[dict[str, Any]], row: Row, size: Size) -> dict[str, Any]:
    """Of all ranks: the largest, with the course of the one whose peak it is; processor time in all."""
    worst = max(ranks, key=lambda rank: rank["peak_bytes"])
    return {
        **worst,
        "resident_bytes": max(rank["resident_bytes"] for rank in ranks),
        "seconds": max(rank["seconds"] for rank in ranks),
        "processor": sum(rank["processor"] for rank in ranks),
        "layout": f"dp {size.ranks // row.tp}" + (f" x tp {row.tp}" if row.tp > 1 else ""),
        "forces": size.forces,
        "ranks": size.ranks,
        "width": size.width,
        "layers": size.layers,
        "edges": size.edges,
        "command": shlex.join(["python", "-m", "tools.bench.memory.table", *sys.argv[1:]]),
    }


def check(record: dict[str, Any], plain: dict[str, Any]) -> None:
    """Raises ValueError for a row whose losses are not plain's: what is wrong has no memory."""
    losses, wanted = np.array(record["losses"]), np.array(plain["losses"])
    record["loss_error"] = float(np.max(np.abs(losses - wanted) / np.abs(wanted)))  # NaN stays
    if not record["loss_error"] <= TOLERANCE:
        raise ValueError(
            f"{record['row']}: the losses must equal plain's to {TOLERANCE:g} of them, got "
            f"{record['losses']} and {plain['losses']}"
        )


def grouped(records: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The records of each table."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["forces"], record["ranks"]), []).append(record)
    return list(groups.values())


def table(records: list[dict[str, Any]]) -> str:
    """Two Markdown tables: sizes and times, and what the peaks are made of."""
    plain = records[0]
    lines = [
        f"### {NAMES[plain['forces']]}, {plain['ranks']} ranks",
        "",
        f"Width {plain['width']}, {plain['layers']} layers, {plain['parameters']:,} parameters, "
        f"{plain['edges']:,} edges in the batch of all ranks. Loss: relative difference from plain's. By "
        f"`{plain['command']}`.",
        "",
        "| | ranks | tensors' peak, MB | of plain | resident, MB | of plain | step, s | of plain "
        "| processor, s | of plain | loss |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        cells = [r["row"], r["layout"]]
        for name, unit, digits in (
            ("peak_bytes", 1e6, 1),
            ("resident_bytes", 1e6, 0),
            ("seconds", 1.0, 2),
            ("processor", 1.0, 2),
        ):
            cells += [f"{r[name] / unit:.{digits}f}", f"{r[name] / plain[name]:.2f}"]
        lines.append("| " + " | ".join([*cells, f"{r['loss_error']:.0e}"]) + " |")
    lines += ["", "At the peak, MB:", "", "| | " + " | ".join(memory.CATEGORIES) + " |"]
    lines.append("|---" * (1 + len(memory.CATEGORIES)) + "|")
    for r in records:
        cells = [f"{r['at_peak'][category] / 1e6:.1f}" for category in memory.CATEGORIES]
        lines.append("| " + " | ".join([r["row"], *cells]) + " |")
    return "\n".join([*lines, ""])


def draw(records: list[dict[str, Any]], folder: Path) -> list[Path]:
    """One picture for each kind of forces, of its largest number of ranks."""
    last = {group[0]["forces"]: group for group in sorted(grouped(records), key=lambda g: g[0]["ranks"])}
    paths = []
    for forces, group in last.items():
        first = group[0]
        title = (
            f"{NAMES[forces]}: {first['ranks']} ranks, width {first['width']}, {first['layers']} layers, "
            f"{first['parameters']:,} parameters, {first['edges']:,} edges in all"
        )
        paths.append(folder / f"memory-table-{forces}.png")
        memory_plot.draw(group, title, paths[-1])
    return paths


def put(path: Path, text: str) -> None:
    """Into a document, in place of what is between its markers. Raises ValueError where it has none."""
    document = path.read_text()
    if document.count(BEGIN) != 1 or document.count(END) != 1:
        raise ValueError(f"{path} must have one line '{BEGIN}' and one '{END}' around what is to be written")
    before, rest = document.split(BEGIN)
    path.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{rest.split(END)[1]}")


def save(records: list[dict[str, Any]], path: Path) -> None:
    """As JSON, which `load` reads."""
    plain = []
    for record in records:
        line = record["timeline"]
        course = {
            "seconds": line.seconds.tolist(),
            "num_bytes": {k: v.tolist() for k, v in line.num_bytes.items()},
            "phases": line.phases,
        }
        plain.append({**record, "timeline": course})
    path.write_text(json.dumps(plain) + "\n")


def load(path: Path) -> list[dict[str, Any]]:
    """What `save` wrote."""
    records: list[dict[str, Any]] = json.loads(path.read_text())
    for record in records:
        line = record["timeline"]
        num_bytes = {k: np.array(v) for k, v in line["num_bytes"].items()}
        phases = [(name, begin, end) for name, begin, end in line["phases"]]
        record["timeline"] = memory.Timeline(np.array(line["seconds"]), num_bytes, phases)
    return records


if __name__ == "__main__":
    main()
