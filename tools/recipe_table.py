"""Tables of errors of a sweep's recipes, means over seeds, and plots of their losses in training.

    python tools/recipe_table.py docs/results/losses/silicon.jsonl ...
    python tools/recipe_table.py --plot curves.png examples/sweeps/optimizers/*.toml --recipes AdamW Muon

The second needs the folders of the runs.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import numpy as np

from megagnn.drawing.figures import make_axes, plain_ticks
from megagnn.scaling.laws.record import RunRecord
from megagnn.scaling.records import read_records
from megagnn.scaling.sweep import Sweep, load_sweep

SPLITS = ("valid/", "")  # the second is the test split
PROCESSOR_SECONDS = "speed/processor_seconds"
WINDOW = 6
"""Logged training losses whose median is drawn."""


def rows(records: Sequence[RunRecord]) -> list[list[str]]:
    """The header, and for each recipe and rate its seeds and "forces / energies" with the spread.

    meV/Å and meV/atom, of validation and test frames; of several sources the mean. The last column is the
    geometric mean of the two errors on validation frames, as a share of the first row's. The rate is left out
    where all have the same.
    """
    head = ["recipe", "rate", "seeds"]
    head += [f"{split}, meV/Å / meV/atom" for split in ("validation", "test")]
    groups: dict[tuple[str, float], list[RunRecord]] = defaultdict(list)
    for record in records:
        groups[record.recipe, record.learning_rate].append(record)
    first = next(iter(groups.values()))
    found = [[*head, "of the first"]]
    for (recipe, rate), runs in groups.items():
        cells = [
            f"{_cell(runs, split + 'force_mae', 0)} / {_cell(runs, split + 'energy_mae', 1)}"
            for split in SPLITS
        ]
        found.append([recipe, f"{rate:g}", str(len(runs)), *cells, f"{_judged(runs) / _judged(first):.2f}"])
    if len({rate for _, rate in groups}) == 1:
        found = [[row[0], *row[2:]] for row in found]
    return found


def _cell(runs: Sequence[RunRecord], loss: str, digits: int) -> str:
    values = [1e3 * run.losses[loss][0] for run in runs]
    spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def _judged(runs: Sequence[RunRecord]) -> float:
    both = [mean(run.losses[f"valid/{name}"][0] for run in runs) for name in ("force_mae", "energy_mae")]
    return float((both[0] * both[1]) ** 0.5)


def table(path: Path) -> str:
    """The rows of a file as a table in Markdown."""
    head, *lines = rows(read_records([path]))
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))


def curve(lines: Path) -> np.ndarray:
    """(n, 3): step, processor seconds and running median of the loss, from a run's metrics.jsonl."""
    steps, losses, seconds = [], [], {}
    for line in map(json.loads, lines.read_text(encoding="utf-8").splitlines()):
        if PROCESSOR_SECONDS in line:
            seconds[line["step"]] = line[PROCESSOR_SECONDS]
        elif line.get("loss/train") is not None:
            steps.append(line["step"])
            losses.append(line["loss/train"])
    clock = np.interp(steps, sorted(seconds), [seconds[s] for s in sorted(seconds)])
    window = min(WINDOW, len(losses))
    medians = np.median(np.lib.stride_tricks.sliding_window_view(losses, window), axis=1)
    return np.stack([np.array(steps)[window - 1 :], clock[window - 1 :], medians], axis=1)


def draw(sweeps: Sequence[Sweep], recipes: Sequence[str], path: Path) -> None:
    """Training loss against steps and processor seconds, a row for each sweep, a colour for each recipe.

    All seeds of the rate that has most of them, or of those the lowest errors on validation frames.
    """
    figure, axes = make_axes(2, len(sweeps))
    for row, sweep in enumerate(sweeps):
        for column, title in enumerate(("steps", "processor seconds of training")):
            ax = axes[2 * row + column]
            for number, recipe in enumerate(recipes):
                rate = _best_rate(sweep, recipe)
                label: str | None = f"{recipe}, {rate:g}"
                done = (r for r in sweep.runs if r.recipe == recipe and r.name in sweep.finished())
                for run in (r for r in done if r.config.optim.learning_rate == rate):
                    points = curve(run.out_dir / "metrics.jsonl")
                    ax.plot(points[:, column], points[:, 2], color=f"C{number}", lw=1.1, label=label)
                    label = None
            ax.set_yscale("log")
            plain_ticks(ax.yaxis)
            ax.set(xlabel=title, ylabel="loss in training", title=sweep.path.stem)
            ax.legend(frameon=False)
    figure.savefig(path, dpi=130)


def _best_rate(sweep: Sweep, recipe: str) -> float:
    rates: dict[float, list[RunRecord]] = defaultdict(list)
    for record in sweep.finished().values():
        if record.recipe == recipe:
            rates[record.learning_rate].append(record)
    return min(rates, key=lambda rate: (-len(rates[rate]), _judged(rates[rate])))


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table for each file, or draw the curves of sweeps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, help="lines of results, or with --plot sweep files")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw losses in training in place of tables")
    parser.add_argument("--recipes", nargs="+", default=[], metavar="NAME", help="what to draw")
    arguments = parser.parse_args(argv)
    if arguments.plot is None:
        for path in arguments.files:
            print(f"{path.stem}\n\n{table(path)}\n")
        return 0
    sweeps = [load_sweep(path) for path in arguments.files]
    known = {run.recipe for sweep in sweeps for run in sweep.runs}
    if not arguments.recipes or not known.issuperset(arguments.recipes):
        parser.error(f"--recipes must name some of {sorted(known)}, got {arguments.recipes}")
    draw(sweeps, arguments.recipes, arguments.plot)
    print(f"wrote {arguments.plot}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
