"""The JSON files of the mlearn set: elemental crystals labelled with PBE (Zuo et al., J. Phys. Chem. A 2020,
124, 731).

A file is a list of ``{structure, outputs, group, description, tag}``, the structure as a pymatgen dictionary.

Stress is left out on purpose. ``outputs.virial_stress`` has six numbers. Comparing energies of pairs of the
files' `Elastic` structures, dE = -V sum(s * strain), shows unit and sign beyond doubt: kBar, compression
positive (slope 0.998 for Si, 0.987 for Ge, 0.994 for Mo, residual 3 % of dE). But the order of the shear
components is xy, yz, zx in the Si and Ge files and xy, zx, yz in those of Mo, Ni and Cu (the other order
leaves a residual of 19 to 69 %), and the shear stress of Li is not monotonic in its strain, with a sign
opposite to the others at small strain. Frames without a strain in their description (molecular dynamics,
vacancies, surfaces) give no means to tell, so no order is right for a file one has not checked.
"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ase.io.formats import open_with_compression

from megagnn.data.formats.assemble import Frame
from megagnn.data.formats.groups import empirical_formula
from megagnn.data.formats.options import USUAL_NAMES, ReadOptions, UnreadableError
from megagnn.data.formats.pymatgen_json import JSON_ENDINGS, Entry, frame_of_entry, read_entries
from megagnn.data.record import Structure

STRESSES = (*USUAL_NAMES["stress"], *USUAL_NAMES["virial"])


def is_mlearn(path: Path) -> bool:
    """Whether a file looks like one of the mlearn set (or like it, see `is_pymatgen_json`), by its ending and
    first characters."""
    if not path.name.endswith(JSON_ENDINGS) or not path.is_file():
        return False
    try:
        with open_with_compression(str(path), "rb") as file:
            head = file.read(4096).lstrip()
    except (OSError, EOFError):
        return False
    return (
        head.startswith(b"[")
        and re.search(rb'"(structure|group|outputs|num_atoms|element)"\s*:', head) is not None
    )


def read_mlearn(path: Path, options: ReadOptions) -> Iterator[Structure]:
    """Yield the structures of a file: total energies in eV, forces in eV/Å.

    With group_by "auto" the group is the composition with the trajectory a snapshot comes from (kind of run
    and temperature, by its description), the surface, or all strained cells together (strains along x, y and
    z are one by symmetry).

    Raises:
        ValueError: a file that is not such a list, naming the entry, the key of a stress or virial, which is
            not read, or labels that are not there (see `ReadOptions.check_label_keys`).
    """
    for name in ("stress", "virial"):
        if (key := options.label_keys[name]) not in (None, "none"):
            raise ValueError(
                f"{path}: --{name}-key {key} would read a stress of mlearn, whose shear components have "
                "another order in the files of other elements (see megagnn/data/formats/mlearn.py); leave it "
                "out, or prepare this file apart from those it is meant for"
            )
    form = "not an entry of the mlearn form"
    yield from read_entries(path, options, partial(_frame, options, path), form)


def trajectory_of(entry: dict[str, Any]) -> str:
    """The run a snapshot was taken from, by what its group and description say."""
    kind = str(entry.get("group", ""))
    if kind == "Elastic":
        return kind
    return f"{kind}: {re.sub(r'^Snapshot [0-9]+ of [0-9]+ of ', '', str(entry.get('description', '')))}"


def _frame(options: ReadOptions, path: Path, entry: Entry) -> tuple[Frame, dict[str, Any]]:
    if entry.keys:
        raise UnreadableError(f"cannot read {entry.where}: expected a list of structures, got dict")
    outputs = entry.content["outputs"]
    labels = {name: value for name, value in outputs.items() if name not in STRESSES}
    frame, _ = frame_of_entry(options, path, entry._replace(content={**entry.content, **labels}))
    frame.group = f"{empirical_formula(frame.numbers)}, {trajectory_of(entry.content)}"
    frame.level = "PBE"
    return frame, outputs
