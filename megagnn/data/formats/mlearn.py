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

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ase.io.formats import open_with_compression

from megagnn.data.formats.assemble import Frame, assemble
from megagnn.data.formats.groups import empirical_formula
from megagnn.data.formats.options import ReadOptions, UnreadableError
from megagnn.data.formats.pymatgen_json import JSON_ENDINGS, check_labels, structure_fields
from megagnn.data.record import Structure


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
            not read, or labels that are not there (see `check_labels`, `ReadOptions.check_label_keys`).
    """
    for name in ("stress", "virial"):
        if (key := options.label_keys[name]) not in (None, "none"):
            raise ValueError(
                f"{path}: --{name}-key {key} would read a stress of mlearn, whose shear components have "
                "another order in the files of other elements (see megagnn/data/formats/mlearn.py); leave it "
                "out, or prepare this file apart from those it is meant for"
            )
    try:
        with open_with_compression(str(path), "rb") as file:
            entries = json.loads(file.read())
    except (ValueError, OSError, EOFError, RecursionError) as error:
        raise UnreadableError(f"cannot read {path}: {error}; is the file whole?") from error
    if not isinstance(entries, list):
        raise UnreadableError(
            f"cannot read {path}: expected a list of structures, got {type(entries).__name__}"
        )
    for frame, entry in enumerate(entries):
        try:
            structure = _structure(entry, options, path, frame)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            reason = f"{type(error).__name__} {error}"
            options.unreadable(
                UnreadableError(
                    f"cannot read {path}, frame {frame}: not an entry of the mlearn form ({reason})"
                )
            )
            continue
        except UnreadableError as error:
            options.unreadable(error)
            continue
        if frame == 0 and options.on_unreadable is None:
            check_labels(structure, entry["outputs"], options, f"{path}, frame {frame}")
        yield structure


def trajectory_of(entry: dict[str, Any]) -> str:
    """The run a snapshot was taken from, by what its group and description say."""
    kind = str(entry.get("group", ""))
    if kind == "Elastic":
        return kind
    return f"{kind}: {re.sub(r'^Snapshot [0-9]+ of [0-9]+ of ', '', str(entry.get('description', '')))}"


def _structure(entry: dict[str, Any], options: ReadOptions, path: Path, frame: int) -> Structure:
    outputs = entry["outputs"]
    where = f"{path}, frame {frame}"
    numbers, positions, cell, pbc = structure_fields(entry["structure"], options.species, where)
    options.check_label_keys({k: k for k in ("energy", "forces") if k in outputs}, where)
    found = Frame(
        path=path,
        index=frame,
        numbers=numbers,
        positions=positions,
        cell=cell,
        pbc=pbc,
        energy=outputs.get(options.energy_key or "energy"),
        forces=outputs.get(options.forces_key or "forces"),
        info=entry,
        group=f"{empirical_formula(numbers)}, {trajectory_of(entry)}",
        level="PBE",
        others=options.others(outputs.get),
    )
    return assemble(found, options)
