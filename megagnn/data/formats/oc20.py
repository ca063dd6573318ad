"""OC20's archives for S2EF: `N.extxyz`, and in `N.txt` the system, frame number and reference energy of each.

The reference is the energy of the clean slab and of the adsorbate in the gas phase, eV. The energy of the
extended XYZ is the total energy; less the reference it is `adsorption_energy`, which `--energy-key` may name.
"""

from collections.abc import Iterator
from pathlib import Path

import ase
from ase.io.formats import open_with_compression

from megagnn.data.formats.options import ReadOptions, UnreadableError

ENDINGS = (".extxyz", ".extxyz.xz", ".extxyz.gz")


def lines_beside(path: Path) -> Path | None:
    """The file of systems that belongs to one of frames, or None where there is none."""
    stem = next((path.name.removesuffix(end) for end in ENDINGS if path.name.endswith(end)), None)
    names = [] if stem is None else [f"{stem}.txt{end}" for end in ("", ".xz", ".gz")]
    for beside in (path.with_name(name) for name in names):
        if beside.is_file() and _system_of(_first_line(beside)) is not None:
            return beside
    return None


def iterate_systems(
    path: Path, frames: Iterator[tuple[int, ase.Atoms]], options: ReadOptions
) -> Iterator[tuple[int, ase.Atoms, str | None]]:
    """(index, atoms, system) of frames; None for the system where the file is no archive of OC20.

    What is told of a frame is added to its `info`: sid, fid, reference_energy and adsorption_energy.

    Raises:
        UnreadableError: another number of lines than of frames, or a line that is none of a system.
    """
    beside = lines_beside(path)
    if beside is None:
        for index, atoms in frames:
            yield index, atoms, None
        return
    number = -1
    with open_with_compression(str(beside), "rt") as lines:
        for index, atoms in frames:
            line = ""
            while number < index:  # those of frames that could not be read are passed over
                line, number = lines.readline(), number + 1
            found = _system_of(line)
            if found is None:
                options.unreadable(
                    UnreadableError(
                        f"cannot read {path}, frame {index}: {beside.name} has no system for it, but "
                        f"{line.strip()[:60]!r}; fetch both files again, or move {beside.name} away to read "
                        "the frames without systems"
                    )
                )
                continue
            system, frame, reference = found
            atoms.info.update(sid=system, fid=frame, reference_energy=reference)
            if atoms.calc is not None and "energy" in atoms.calc.results:
                atoms.info["adsorption_energy"] = atoms.calc.results["energy"] - reference
            yield index, atoms, f"OC20 {system.removeprefix('random')}"
        left = lines.readline()
    if left.strip():
        message = f"{beside} goes on after frame {number}, the last of {path.name}; fetch both files again"
        options.unreadable(UnreadableError(message, last=number))


def _first_line(path: Path) -> str:
    try:
        with open_with_compression(str(path), "rt") as file:
            return str(file.readline())
    except (OSError, EOFError, ValueError):
        return ""


def _system_of(line: str) -> tuple[str, str, float] | None:
    parts = line.strip().split(",")
    try:
        return (parts[0], parts[1], float(parts[2])) if len(parts) == 3 else None
    except ValueError:
        return None
