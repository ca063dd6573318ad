"""Trajectories of CP2K: `NAME-pos-1.xyz`, and beside it `NAME-frc-1.xyz` and `NAME-1.cell`.

Positions and cells are in Å, the energy of a comment line `i = 0, time = 0.000, E = -17.2` in Ha, forces in
Ha/bohr. Whether the electronic steps converged is in none of these files, nor along which axes the cell is
periodic: structures are taken as periodic along all three.
"""

import re
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megagnn.data.arrays import Floats
from megagnn.data.formats.options import ReadOptions, UnreadableError
from megagnn.data.formats.published import Method, Published, structures
from megagnn.data.formats.species import numbers_of
from megagnn.data.formats.units import Units
from megagnn.data.record import Structure

NAME = re.compile(r"(?P<project>.+)-pos-(?P<number>\d+)\.xyz")
COMMENT = re.compile(r"\s*i\s*=\s*(?P<step>\d+)\b.*\bE\s*=\s*(?P<energy>\S+)")
LAYOUT = Published((Method("unknown", "energy", "forces"),), Units({"energy": "Ha", "forces": "Ha/bohr"}))


class Step(NamedTuple):
    """A frame of positions or of forces: the number of its step, its energy, names, and (N, 3)."""

    number: int
    energy: float
    names: list[str]
    values: Floats


def is_cp2k(path: Path) -> bool:
    """Whether a file is a trajectory of positions, by its name and first comment line."""
    if not NAME.fullmatch(path.name) or not path.is_file():
        return False
    with path.open(errors="replace") as file:
        file.readline()
        return COMMENT.match(file.readline()) is not None


def read_cp2k(path: Path, options: ReadOptions) -> Iterator[Structure]:
    """Yield the frames of a trajectory, with the forces of the same step where there are any.

    Raises:
        ValueError: no file of cells, a frame that is cut short or says no energy, or steps that do not rise
            (an UnreadableError).
    """
    forces, _ = beside(path)
    keys = ["energy", "forces"] if forces.is_file() else ["energy"]
    yield from structures(path, _items(path, options), LAYOUT, options, keys)


def beside(path: Path) -> tuple[Path, Path]:
    """The files of forces and cells of a trajectory."""
    found = NAME.fullmatch(path.name)
    if found is None:
        raise UnreadableError(f"{path} is not named as CP2K names positions, NAME-pos-1.xyz; rename it so")
    project, number = found["project"], found["number"]
    return path.with_name(f"{project}-frc-{number}.xyz"), path.with_name(f"{project}-{number}.cell")


def _items(path: Path, options: ReadOptions) -> Iterator[dict[str, Any]]:
    forces_file, cell_file = beside(path)
    if not cell_file.is_file():
        raise UnreadableError(
            f"cannot read {path}: there is no {cell_file.name} beside it, so the cell is not known; print it "
            "(MOTION, PRINT, CELL), or write the frames as extended XYZ"
        )
    with ExitStack() as stack:
        cells = stack.enter_context(closing(_cells(cell_file)))
        forces = stack.enter_context(closing(_steps(forces_file))) if forces_file.is_file() else iter(())
        cell, ahead, pull = None, next(cells, None), next(forces, None)
        for step in _steps(path):
            while ahead is not None and (cell is None or ahead[0] <= step.number):
                cell, ahead = ahead[1], next(cells, None)
            while pull is not None and pull.number < step.number:
                pull = next(forces, None)
            values: dict[str, Any] = {"energy": step.energy}
            if pull is not None and pull.number == step.number:
                values["forces"] = pull.values
            if cell is None:
                raise UnreadableError(f"cannot read {cell_file}: it holds no cell; is the file whole?")
            yield {
                "numbers": numbers_of(step.names, options.species),
                "positions": step.values,
                "cell": cell,
                "pbc": True,
                "values": values,
                "info": {"step": step.number},
                "where": f"step {step.number}",
            }
        for _ in chain(forces, cells):  # steps that come again after the last position are told, too
            pass


def _steps(path: Path) -> Generator[Step, None, None]:
    """The frames of a file of positions or forces."""
    with path.open() as file:
        index, last = 0, None
        while (head := file.readline()).strip():
            comment = file.readline()
            found = COMMENT.match(comment)
            try:
                if found is None:
                    raise ValueError(f"its comment has no step and energy, but {comment.strip()[:60]!r}")
                rows = [line.split() for line in islice(file, int(head))]
                if len(rows) != int(head) or any(len(row) < 4 for row in rows):
                    raise ValueError(f"it is cut short, or a line of its {int(head)} atoms is")
                values = np.array([row[1:4] for row in rows], dtype=np.float64)
                step = Step(int(found["step"]), float(found["energy"]), [row[0] for row in rows], values)
            except ValueError as error:
                reason = f"cannot read {path}, frame {index}: {error}; is the file whole?"
                raise UnreadableError(reason, last=index) from error
            _check_rise(path, last, step.number, index)
            yield step
            index, last = index + 1, step.number
        if any(line.strip() for line in file):
            raise UnreadableError(
                f"cannot read {path}: an empty line after frame {index - 1}, and more after it; remove the "
                "line, or what follows",
                last=index,
            )


def _cells(path: Path) -> Generator[tuple[int, Floats], None, None]:
    """(step, (3, 3) Å) of each line: step, time, the nine numbers of the vectors, volume."""
    last = None
    with path.open() as file:
        for line in file:
            words = line.split()
            if words and not words[0].startswith("#"):
                try:
                    number, cell = int(words[0]), np.array(words[2:11], dtype=np.float64).reshape(3, 3)
                except ValueError as error:
                    raise UnreadableError(f"cannot read {path}: {error}; is the file whole?") from error
                _check_rise(path, last, number)
                yield number, cell
                last = number


def _check_rise(path: Path, before: int | None, number: int, index: int | None = None) -> None:
    """Refuse a step that comes again: a restart appends it, and other files may hold the earlier one."""
    if before is not None and number <= before:
        raise UnreadableError(
            f"cannot read {path}: step {number} comes after step {before}, as a restarted run appends it; "
            "cut the files of positions, forces and cells there, each part with a name of its own",
            last=index,
        )
