"""The table of docs/results/losses.md: errors of each kind of loss, means over seeds, from lines of results.

python tools/loss_table.py docs/results/losses/silicon.jsonl ...
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from megagnn.scaling.laws.record import RunRecord
from megagnn.scaling.records import read_records

SPLITS = ("valid/", "")  # the second is the test split


def rows(records: Sequence[RunRecord]) -> list[list[str]]:
    """Recipe, seeds, then on validation and test frames "forces / energies" with the spread over seeds.

    meV/Å and meV/atom; of several sources the mean. The last column is the geometric mean of the two errors
    on validation frames, as a share of the first recipe's.
    """
    of_recipe: dict[str, list[RunRecord]] = defaultdict(list)
    for record in records:
        of_recipe[record.recipe].append(record)
    first = next(iter(of_recipe.values()))
    found = []
    for recipe, runs in of_recipe.items():
        cells = [
            f"{_cell(runs, split + 'force_mae', 0)} / {_cell(runs, split + 'energy_mae', 1)}"
            for split in SPLITS
        ]
        found.append([recipe, str(len(runs)), *cells, f"{_judged(runs) / _judged(first):.2f}"])
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
    head = ["loss", "seeds", "validation, meV/Å / meV/atom", "test, meV/Å / meV/atom", "of the first"]
    lines = [head, ["---"] * len(head), *rows(read_records([path]))]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table for each file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=Path)
    for path in parser.parse_args(argv).results:
        print(f"{path.stem}\n\n{table(path)}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
