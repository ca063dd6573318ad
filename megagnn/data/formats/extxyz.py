"""Extended XYZ, frame by frame: framing and species are read here, each frame by ASE.

ASE's reader stops at the first frame it cannot parse, at a species that is no element, and at a `stress` or
`virial` that has not nine numbers, whether it is wanted or not.
"""

import io
import re
from collections import deque
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

import ase
import numpy as np
from ase.io.extxyz import key_val_str_to_dict, read_xyz
from ase.io.formats import open_with_compression

from megagnn.data.formats.options import LastFrameError, ReadOptions, parsed_frames
from megagnn.data.formats.species import numbers_of

TENSORS = ("stress", "virial")
UNREADABLE_STRESS = "stress that is no tensor"
"""Key of `info` under which a stress stands that ASE could not hold."""
_TENSOR_KEY = re.compile(rf"(?<![\w-])({'|'.join(TENSORS)})(?=\s*=)")
_HEAD_KEY = re.compile(r"(?<![\w-])(Properties|Lattice)\s*=")
_ASIDE = "set_aside_"


def iterate_extxyz(path: Path, options: ReadOptions) -> Iterator[tuple[int, ase.Atoms]]:
    """(index, atoms) of the frames of a file; those that cannot be read go to `options.unreadable`.

    After a frame of a wrong number of lines reading goes on at the next number of atoms with a comment that
    names a cell or columns.

    Raises:
        UnreadableError: see above.
    """
    yield from parsed_frames(path, _raw_frames(path), partial(_atoms, species=options.species), options)


def _raw_frames(path: Path) -> Iterator[list[str] | ValueError]:
    with open_with_compression(str(path), "r") as file:
        yield from _split(_Lines(file))


class _Lines:
    """The lines of a file, with a look at those to come; empty at its end."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file
        self.ahead: deque[str] = deque()

    def peek(self, after: int = 0) -> str:
        while len(self.ahead) <= after:
            self.ahead.append(self.file.readline())
        return self.ahead[after]

    def take(self) -> str:
        return self.ahead.popleft() if self.ahead else self.file.readline()

    def at_frame(self) -> bool:
        """Whether a frame begins here beyond doubt."""
        return _is_count(self.peek()) and _is_comment(self.peek(1))


def _is_count(line: str) -> bool:
    text = line.strip()
    return text.isdecimal() and len(text) < 10


def _is_comment(line: str) -> bool:
    return _HEAD_KEY.search(line) is not None


def _split(lines: _Lines) -> Iterator[list[str] | ValueError]:
    """Lines of each frame (number of atoms, comment, atoms, VEC1... if there), or what is wrong with them."""
    while True:
        _skip_blank(lines)
        if not lines.peek():
            return
        if _is_count(lines.peek()):
            frame, reason = _take_frame(lines)
            if not reason:
                yield frame
                continue
            num_lost = 1
        else:
            frame, reason = [], f"expected the number of atoms, got {lines.peek().strip()[:60]!r}"
            num_lost = 0
        rest = frame[2:]
        while lines.peek() and not lines.at_frame():
            rest.append(lines.take())
        num_lost += sum(map(_is_comment, rest))
        is_last = not lines.peek() and any(map(_is_count, rest))
        for _ in range(num_lost - 1):
            yield ValueError(reason)
            reason = "its number of atoms was not found"
        yield LastFrameError(reason) if is_last else ValueError(reason)


def _take_frame(lines: _Lines) -> tuple[list[str], str]:
    """The lines of a frame, and what is wrong with their number, if anything is."""
    frame = [lines.take()]
    num_atoms = int(frame[0])
    while len(frame) < num_atoms + 2:
        if lines.at_frame():
            return frame, f"the next frame begins within this one of {num_atoms} atoms"
        if not lines.peek():
            return frame, f"the file ends within a frame of {num_atoms} atoms"
        frame.append(lines.take())
    while lines.peek().lstrip().startswith("VEC"):
        frame.append(lines.take())
    _skip_blank(lines)
    following = lines.peek()
    if not following or _is_count(following) or _is_comment(following) or _is_comment(lines.peek(1)):
        return frame, ""
    return frame, (
        f"its {num_atoms} atoms are followed by {following.strip()[:60]!r}, not by the number of atoms of "
        "another frame"
    )


def _skip_blank(lines: _Lines) -> None:
    while lines.peek() and not lines.peek().strip():
        lines.take()


def _atoms(lines: list[str] | ValueError, species: Mapping[str, str]) -> ase.Atoms:
    if isinstance(lines, ValueError):
        raise lines
    num_atoms = int(lines[0])
    column = _species_column(lines[1])
    if column is not None:
        atom_lines = lines[2 : 2 + num_atoms]
        rows = [line.split(None, column + 1) for line in atom_lines]
        names = [row[column] if len(row) > column else "" for row in rows]
        numbers_of(names, species)
        if any(name in species for name in names):
            for row, name in zip(rows, names, strict=True):
                row[column : column + 1] = [species.get(name, name)]
            lines = [*lines[:2], *map(" ".join, rows), *lines[2 + num_atoms :]]
    text = "".join(line if line.endswith("\n") else line + "\n" for line in lines)
    (atoms,) = read_xyz(io.StringIO(text), slice(0, 1), properties_parser=parse_comment)
    return atoms


def _species_column(comment: str) -> int | None:
    """Column of the names of species; None where there are only atomic numbers."""
    found = re.search(r"Properties\s*=\s*[\"']?([^\s\"']+)", comment)
    if found is None:
        return 0
    fields = found.group(1).split(":")
    column = 0
    for name, _, count in zip(fields[::3], fields[1::3], fields[2::3], strict=False):
        if name in ("species", "symbols"):
            return None if "Z" in fields[::3] else column
        column += int(count)
    return None


def parse_comment(comment: str) -> dict[str, Any]:
    """What the comment line says, as ASE parses it, and tensors of six numbers, too.

    A stress that is no tensor is put aside under a key of its own, so that it matters only if it is wanted.
    """
    info = key_val_str_to_dict(_TENSOR_KEY.sub(rf"{_ASIDE}\1", comment))
    for name in TENSORS:
        if _ASIDE + name not in info:
            continue
        value = info.pop(_ASIDE + name)
        array = np.asarray(value)
        if array.dtype.kind in "if" and array.size == 9:
            info[name] = array.reshape(3, 3, order="F")
        elif array.dtype.kind in "if" and array.size == 6:
            info[name] = array
        elif name == "stress":
            info[UNREADABLE_STRESS] = value
        else:
            info[name] = value
    return dict(info)
