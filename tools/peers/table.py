"""The table of a comparison, from lines of results.

python -m tools.peers.table runs/peers/mlearn-Si.jsonl
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

from megagnn.drawing.figures import colours, make_axes, plain_ticks
from tools.peers.lines import Line, read_lines

HEAD = ("program", "setting", "parameters", "minutes", "seeds", "validation, meV/Å / meV/atom", "test")


Groups = dict[tuple[float, str, str], list[Line]]
"""The seeds of each budget, program and setting."""


def by_setting(lines: Sequence[Line]) -> Groups:
    """Lines in groups, by budget first."""
    groups: Groups = defaultdict(list)
    for line in sorted(lines, key=lambda line: line.minutes):
        groups[line.minutes, line.program, line.setting].append(line)
    return groups


def chosen(groups: Groups) -> set[tuple[float, str, str]]:
    """Of each budget and program the setting with the lowest force error on validation frames."""
    best: dict[tuple[float, str], tuple[float, str]] = {}
    for (minutes, program, setting), runs in groups.items():
        candidate = (error(runs, "valid", "force_mae"), setting)
        best[minutes, program] = min(best.get((minutes, program), candidate), candidate)
    return {(minutes, program, setting) for (minutes, program), (_, setting) in best.items()}


def error(runs: Sequence[Line], split: str, name: str) -> float:
    """The mean of an error over seeds, in thousandths of eV."""
    return 1e3 * mean(run.errors[split][name] for run in runs)


def rows(lines: Sequence[Line]) -> list[list[str]]:
    """Mean absolute errors of forces and energies, means over seeds, by budget; `minutes` are those used.

    Bold is what validation chooses, see `chosen`.
    """
    groups = by_setting(lines)
    best, found = chosen(groups), []
    for key, runs in groups.items():
        used = mean(run.seconds for run in runs) / 60
        cells = [_cell(runs, "valid"), _cell(runs, "test")]
        if key in best:
            cells = [f"**{cell}**" for cell in cells]
        found.append([*key[1:], f"{runs[0].parameters:,}", f"{used:.1f}", str(len(runs)), *cells])
    return found


def _cell(runs: Sequence[Line], split: str) -> str:
    words = []
    for name, digits in (("force_mae", 0), ("energy_mae", 1)):
        values = [1e3 * run.errors[split][name] for run in runs]
        spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
        words.append(f"{error(runs, split, name):.{digits}f}{spread}")
    return " / ".join(words)


def table(lines: Sequence[Line]) -> str:
    """The rows in Markdown."""
    return "\n".join(
        "| " + " | ".join(cells) + " |" for cells in [[*HEAD], ["---"] * len(HEAD), *rows(lines)]
    )


def figure(lines: Sequence[Line]) -> Figure:
    """Errors on the test frames: forces against the time used, and energies against forces.

    A line for each program, of what validation chooses at each budget; pale points are all other settings.
    """
    groups = by_setting(lines)
    best = chosen(groups)
    drawn, (left, right) = make_axes(2)
    programs = list(dict.fromkeys(program for _, program, _ in groups))
    for program, colour in zip(programs, colours(len(programs)), strict=True):
        for alpha, label, keys in (
            (1.0, program, [key for key in groups if key[1] == program and key in best]),
            (0.3, None, [key for key in groups if key[1] == program and key not in best]),
        ):
            minutes = [mean(run.seconds for run in groups[key]) / 60 for key in keys]
            forces, energies = (
                [error(groups[k], "test", n) for k in keys] for n in ("force_mae", "energy_mae")
            )
            style = {"marker": "o", "color": colour, "alpha": alpha, "linestyle": "-" if label else "none"}
            left.plot(minutes, forces, label=label, **style)
            right.plot(forces, energies, **style)
    left.set(xlabel="processor minutes of training", ylabel="force error, meV/Å")
    right.set(xlabel="force error, meV/Å", ylabel="energy error, meV/atom")
    for ax in (left, right):
        ax.set(xscale="log", yscale="log")
        plain_ticks(ax.xaxis)
        plain_ticks(ax.yaxis)
    left.legend(frameon=False)
    return drawn


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table of all files together for each data set in them, and draw the figure of one data set."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="of results of one data set")
    arguments = parser.parse_args(argv)
    lines = [line for path in arguments.results for line in read_lines(path)]
    data = list(dict.fromkeys(line.data for line in lines))
    for name in data:
        print(f"{name}\n\n{table([line for line in lines if line.data == name])}\n")
    if arguments.figure is not None:
        if len(data) != 1:
            raise ValueError(f"a figure is of one data set, and the lines are of {', '.join(data) or 'none'}")
        figure(lines).savefig(arguments.figure, dpi=150)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
