"""JSON files of structures as pymatgen writes them, with labels: lists, MatPES, MPtrj.

Three forms are read: a list of entries ``{structure, energy, forces, stress}`` in the units of ASE; MatPES,
the same with a ``matpes_id``; and MPtrj, an object of materials, each an object of frames with
``uncorrected_total_energy``, ``force`` and ``stress``. Energies are total energies of the calculation: those
of MPtrj without the corrections of the Materials Project, which are no function of positions.

Stresses of MPtrj are in kBar, compression positive, as VASP prints them. MatPES states kilobar for its six
numbers, but neither their sign nor their order, so they are read only where units are declared, in the order
xx, yy, zz, yz, xz, xy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megagnn.data.formats.assemble import Frame, assemble
from megagnn.data.formats.json_stream import iterate_entries
from megagnn.data.formats.options import USUAL_NAMES, ReadOptions, UnreadableError
from megagnn.data.formats.species import numbers_of
from megagnn.data.formats.units import Units
from megagnn.data.record import Structure

JSON_ENDINGS = (".json", ".json.gz", ".json.bz2", ".json.xz")
MPTRJ_NAMES = {"energy": ("uncorrected_total_energy",), "forces": ("force",)}
MPTRJ_UNITS = Units({"stress": "-kBar"})
STRESS_UNDECLARED = "stress left out: the file does not say its sign and order; --units stress=-kBar reads it"
NOT_LABELS = ("structure", "matpes_id")


def is_pymatgen_json(path: Path) -> bool:
    """Whether a file is JSON whose first entry (or the first in it) holds a structure, with labels beside it
    and not under "outputs" as in mlearn."""
    if not path.name.endswith(JSON_ENDINGS) or not path.is_file():
        return False
    try:
        _, entry = next(iterate_entries(path))
    except (ValueError, OSError, EOFError, StopIteration):
        return False
    if isinstance(entry, dict) and "structure" not in entry:
        entry = next(iter(entry.values()), None)
    return isinstance(entry, dict) and isinstance(entry.get("structure"), dict) and "outputs" not in entry


def read_pymatgen_json(path: Path, options: ReadOptions) -> Iterator[Structure]:
    """Yield the structures of a file, entry by entry.

    With group_by "auto" a group of MPtrj is a material, and of MatPES the material its cells were made of.

    Raises:
        ValueError: a file of another form or a damaged one, naming the entry, labels that are not there (see
            `ReadOptions.check_label_keys`).
    """
    for index, (name, entry, of_mptrj) in enumerate(_entries(path)):
        where = f"{path}, entry {index}{f' ({name})' if name else ''}"
        try:
            frame = _frame(entry, options, path, index, where, of_mptrj)
            if of_mptrj and frame.group is None:
                frame.group = name.rsplit("/")[0]
            structure = assemble(frame, options)
        except UnreadableError as error:
            options.unreadable(error)
            continue
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            reason = f"{type(error).__name__} {error}"
            options.unreadable(
                UnreadableError(f"cannot read {where}: no structure as pymatgen writes it ({reason})")
            )
            continue
        if index == 0 and options.on_unreadable is None:
            check_labels(structure, entry, options, where)
        yield structure


def structure_fields(
    structure: Mapping[str, Any], species: Mapping[str, str], where: str
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Numbers, positions, cell and periodicity of a structure (or molecule) in pymatgen's form.

    Raises:
        UnreadableError: a site shared by several species, an unknown one, or numbers that are none or not as
            many as they must be.
        KeyError, TypeError, IndexError, AttributeError: another form.
    """
    lattice = None if structure.get("@class") == "Molecule" else structure["lattice"]
    sites = structure["sites"]
    names = [_species_of(site, where) for site in sites]
    try:
        numbers = numbers_of(names, species)
    except ValueError as error:
        raise UnreadableError(f"{where}: {error}") from error
    if lattice is None:
        cell, pbc = np.zeros((3, 3)), np.zeros(3, dtype=bool)
    else:
        cell = _numbers(lattice["matrix"], (3, 3), "the matrix of a lattice", where)
        pbc = _numbers(lattice.get("pbc", (1, 1, 1)), (3,), "pbc", where).astype(bool)
    name = "xyz" if sites and all("xyz" in site for site in sites) else "abc"
    values = [site[name] for site in sites] or np.zeros((0, 3))
    positions = _numbers(values, (len(sites), 3), f"{name} of the sites", where)
    if name == "abc":  # xyz is taken as given, for it need not be wrapped
        positions = positions @ cell
    return numbers, positions, cell, pbc


def _numbers(value: Any, shape: tuple[int, ...], what: str, where: str) -> NDArray[np.float64]:
    try:
        numbers = np.array(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UnreadableError(f"{where}: {what} must be numbers of shape {shape}: {error}") from error
    if numbers.shape != shape:
        raise UnreadableError(f"{where}: {what} must be numbers of shape {shape}, got {numbers.shape}")
    return numbers


def _species_of(site: Mapping[str, Any], where: str) -> str:
    species = site["species"]
    if len(species) != 1 or species[0].get("occu", 1) != 1:
        raise UnreadableError(f"{where}: a site is shared by several species; ordered structures are needed")
    return str(species[0]["element"])


def _entries(path: Path) -> Iterator[tuple[str, Any, bool]]:
    """(name, entry, whether it is of MPtrj's form) of each frame of a file."""
    num_read = 0
    try:
        for key, value in iterate_entries(path):
            if isinstance(value, dict) and "structure" not in value and key is not None:
                for name, entry in value.items():
                    num_read += 1
                    yield f"{key}/{name}", entry, True
            else:
                num_read += 1
                yield key or "", value, False
    except (ValueError, OSError, EOFError) as error:
        raise UnreadableError(f"cannot read {path}: {error}; is the file whole?", last=num_read) from error


def _frame(entry: Any, options: ReadOptions, path: Path, index: int, where: str, of_mptrj: bool) -> Frame:
    numbers, positions, cell, pbc = structure_fields(entry["structure"], options.species, where)
    usual = dict(USUAL_NAMES)
    if of_mptrj:
        usual |= MPTRJ_NAMES
    found = {
        name: next((n for n in names if entry.get(n) is not None), None) for name, names in usual.items()
    }
    usual_names = {label: name for label, name in found.items() if name is not None and label != "virial"}
    options.check_label_keys(usual_names, where)
    labels: dict[str, Any] = {}
    for name, key in options.label_keys.items():
        labels[name] = None if key == "none" else entry.get(key or found[name])
    notes: tuple[str, ...] = ()
    if options.virial_key is None:
        labels["virial"], notes = options.usual_virial(labels["virial"])
    undeclared = "matpes_id" in entry and "stress" not in options.units.of
    if undeclared and options.stress_key is None and labels["stress"] is not None:
        labels["stress"], notes = None, (*notes, STRESS_UNDECLARED)
    provenance = entry.get("provenance")
    material = provenance.get("original_mp_id") if isinstance(provenance, dict) else None
    charge = entry["structure"].get("charge")
    return Frame(
        path=path,
        index=index,
        numbers=numbers,
        positions=positions,
        cell=cell,
        pbc=pbc,
        info={"charge": charge, **{k: v for k, v in entry.items() if k not in NOT_LABELS}},
        units=MPTRJ_UNITS if of_mptrj else Units(),
        group=None if material is None else str(material),
        level=str(entry.get("functional") or "unknown"),
        notes=notes,
        others=options.others(entry.get),
        **labels,
    )


def check_labels(structure: Structure, entry: Mapping[str, Any], options: ReadOptions, where: str) -> None:
    """Refuse a file whose first entry lacks what was asked for by name, or has nothing to learn from.

    Raises:
        ValueError: no such key, or neither energy nor forces (an UnreadableError).
    """
    there = ", ".join(key for key in entry if key not in NOT_LABELS) or "none"
    for name, key in options.all_keys.items():
        if key not in (None, "none") and entry.get(key) is None:
            raise ValueError(f"{where}: there is no {name} key {key!r}; keys there are {there}")
    if structure.energy is None and structure.forces is None:
        raise UnreadableError(
            f"{where}: no energy or forces found; keys there are {there}. Name those of the labels with "
            "--energy-key and --forces-key"
        )
