"""The table of a comparison, from lines of results.

python -m tools.peers.table runs/peers/mlearn-Si.jsonl
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from tools.peers.lines import Line, read_lines

HEAD = ("program", "setting", "parameters", "minutes", "seeds", "validation, meV/Å / meV/atom", "test")


def rows(lines: Sequence[Line]) -> list[list[str]]:
    """Mean absolute errors of forces and energies, means over seeds, by budget and program.

    Bold is each program's setting with the lowest validation error of forces. `minutes` are those used.
    """
    of_setting: dict[tuple[float, str, str], list[Line]] = defaultdict(list)
    for line in lines:
        of_setting[line.minutes, line.program, line.setting].append(line)
    best: dict[tuple[float, str], tuple[float, str]] = {}
    for (minutes, program, setting), runs in of_setting.items():
        error = mean(run.errors["valid"]["force_mae"] for run in runs)
        best[minutes, program] = min(best.get((minutes, program), (error, setting)), (error, setting))
    found = []
    for (minutes, program, setting), runs in sorted(of_setting.items(), key=lambda item: item[0][0]):
        used = mean(run.seconds for run in runs) / 60
        cells = [_cell(runs, "valid"), _cell(runs, "test")]
        if best[minutes, program][1] == setting:
            cells = [f"**{cell}**" for cell in cells]
        found.append([program, setting, f"{runs[0].parameters:,}", f"{used:.1f}", str(len(runs)), *cells])
    return found


def _cell(runs: Sequence[Line], split: str) -> str:
    words = []
    for name, digits in (("force_mae", 0), ("energy_mae", 1)):
        values = [1e3 * run.errors[split][name] for run in runs]
        spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
        words.append(f"{mean(values):.{digits}f}{spread}")
    return " / ".join(words)


def table(lines: Sequence[Line]) -> str:
    """The rows in Markdown."""
    return "\n".join(
        "| " + " | ".join(cells) + " |" for cells in [[*HEAD], ["---"] * len(HEAD), *rows(lines)]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table of all files together for each data set in them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=Path)
    lines = [line for path in parser.parse_args(argv).results for line in read_lines(path)]
    for data in dict.fromkeys(line.data for line in lines):
        print(f"{data}\n\n{table([line for line in lines if line.data == data])}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
