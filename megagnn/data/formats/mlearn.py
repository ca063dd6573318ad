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

import numpy as np
from ase.data import atomic_numbers
from numpy.typing import NDArray

from megagnn.data.formats.options import ReadOptions, empirical_formula, group_name
from megagnn.data.record import Structure


def is_mlearn(path: Path) -> bool:
    """Whether a file looks like one of the mlearn set, by its ending and first characters."""
    if path.suffix != ".json" or not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(4096).lstrip()
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
        ValueError: a file that is not such a list, naming the entry, or see `ReadOptions.check_label_keys`.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"cannot read {path}: {error}; is the file whole?") from error
    if not isinstance(entries, list):
        raise ValueError(f"cannot read {path}: expected a list of structures, got {type(entries).__name__}")
    for frame, entry in enumerate(entries):
        try:
            structure = _structure(entry, options, path, frame)
        except (KeyError, TypeError, IndexError) as error:
            reason = f"{type(error).__name__} {error}"
            raise ValueError(
                f"cannot read {path}, frame {frame}: not an entry of the mlearn form ({reason})"
            ) from error
        yield structure


def trajectory_of(entry: dict[str, Any]) -> str:
    """The run a snapshot was taken from, by what its group and description say."""
    kind = str(entry.get("group", ""))
    if kind == "Elastic":
        return kind
    return f"{kind}: {re.sub(r'^Snapshot [0-9]+ of [0-9]+ of ', '', str(entry.get('description', '')))}"


def _structure(entry: dict[str, Any], options: ReadOptions, path: Path, frame: int) -> Structure:
    crystal, outputs = entry["structure"], entry["outputs"]
    cell = np.array(crystal["lattice"]["matrix"], dtype=np.float64)
    numbers = np.array([_atomic_number(site, path, frame) for site in crystal["sites"]], dtype=np.uint8)
    fractional = np.array([site["abc"] for site in crystal["sites"]], dtype=np.float64).reshape(-1, 3)
    options.check_label_keys([k for k in ("energy", "forces") if k in outputs], f"{path}, frame {frame}")
    energy = outputs.get(options.energy_key or "energy")
    forces = outputs.get(options.forces_key or "forces")
    kind = f"{empirical_formula(numbers)}, {trajectory_of(entry)}"
    return Structure(
        atomic_numbers=numbers,
        positions=_positions(crystal["sites"], fractional @ cell),
        cell=cell,
        pbc=np.ones(3, dtype=bool),
        energy=None if energy is None else float(energy),
        forces=None if forces is None else np.array(forces, dtype=np.float64).reshape(-1, 3),
        group=group_name(options.group_by, path=path, frame=frame, numbers=numbers, info=entry, auto=kind),
        source=options.source_name(path),
        level=options.level or "PBE",
    )


def _positions(sites: list[dict[str, Any]], from_fractional: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cartesian positions as given, which need not be wrapped as the fractional ones are."""
    if sites and all("xyz" in site for site in sites):
        return np.array([site["xyz"] for site in sites], dtype=np.float64)
    return from_fractional


def _atomic_number(site: dict[str, Any], path: Path, frame: int) -> int:
    species = site["species"]
    if len(species) != 1 or species[0].get("occu", 1) != 1:
        raise ValueError(
            f"{path}, frame {frame}: a site is shared by several species; ordered structures are needed"
        )
    element = species[0]["element"]
    if atomic_numbers.get(element, 0) < 1:
        raise ValueError(f"{path}, frame {frame}: unknown element {element!r}")
    return int(atomic_numbers[element])
