"""JSON files of structures as pymatgen writes them, with labels: lists, MatPES, MPtrj, Alexandria.

Four forms are read: a list of entries ``{structure, energy, forces, stress}`` in the units of ASE; MatPES,
the same with a ``matpes_id``; MPtrj, an object of materials, each an object of frames with
``uncorrected_total_energy``, ``force`` and ``stress``; and Alexandria, ``{"entries": [...]}`` of pymatgen's
ComputedStructureEntry, with ``data.energy_total`` and forces beside the sites. Energies are total energies of
the calculation: those of MPtrj without the corrections of the Materials Project, which are no function of
positions.

Stresses of MPtrj are in kBar, compression positive, as VASP prints them. MatPES states kilobar for its six
numbers, but neither their sign nor their order, and Alexandria states nothing, so theirs are read only where
units are declared, six numbers in the order xx, yy, zz, yz, xz, xy.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase.io.formats import open_with_compression

from megagnn.data.arrays import Bools, Floats, Ints
from megagnn.data.formats.assemble import Frame, assemble
from megagnn.data.formats.options import USUAL_NAMES, ReadOptions, UnreadableError
from megagnn.data.formats.species import numbers_of
from megagnn.data.formats.units import Units
from megagnn.data.record import Structure

JSON_ENDINGS = (".json", ".json.gz", ".json.bz2", ".json.xz")
MPTRJ_NAMES = {"energy": ("uncorrected_total_energy",), "forces": ("force",)}
MPTRJ_UNITS = Units({"stress": "-kBar"})
STRESS_UNDECLARED = "stress left out: the file does not say its sign and order; --units stress=-kBar reads it"
ENTRY = "ComputedStructureEntry"
NOT_LABELS = ("structure", "matpes_id", ENTRY)

CHUNK = 1 << 20
"""Characters that are read of a file at a time: published sets are larger than memory once parsed."""
SPACE = " \t\r\n"


class Entry(NamedTuple):
    """One frame of a JSON file."""

    where: str
    """The file and the number of the frame, for messages."""
    number: int
    content: Any
    keys: tuple[str, ...]
    """Those under which it stands: none in a list, material and frame in files of MPtrj's form."""


FrameOf = Callable[[Entry], tuple[Frame, Mapping[str, Any]]]


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
    form = "no structure as pymatgen writes it"
    yield from read_entries(path, options, partial(frame_of_entry, options, path), form)


def read_entries(path: Path, options: ReadOptions, frame_of: FrameOf, form: str) -> Iterator[Structure]:
    """Yield the structures of the entries of a JSON file.

    Args:
        frame_of: from an entry to its frame and the table of its labels.
        form: what an entry is not of which `frame_of` makes none, for the message.

    Raises:
        ValueError: see `read_pymatgen_json`.
    """
    for index, entry in enumerate(_entries(path)):
        try:
            frame, labels = frame_of(entry)
            structure = assemble(frame, options)
        except UnreadableError as error:
            options.unreadable(error)
            continue
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            reason = f"{type(error).__name__} {error}"
            options.unreadable(UnreadableError(f"cannot read {entry.where}: {form} ({reason})"))
            continue
        if index == 0 and options.on_unreadable is None:
            there = f"keys there are {', '.join(key for key in labels if key not in NOT_LABELS) or 'none'}"
            is_labelled = not (structure.energy is None and structure.forces is None)
            options.check_first(labels.get, there, is_labelled, entry.where)
        yield structure


def structure_fields(
    structure: Mapping[str, Any], species: Mapping[str, str], where: str
) -> tuple[Ints, Floats, Floats, Bools]:
    """Numbers, positions, cell and periodicity of a structure (or molecule) in pymatgen's form.

    Raises:
        UnreadableError: a site shared by several species, an unknown one, or numbers that are none or not as
            many as they must be.
        KeyError, TypeError, IndexError, AttributeError: another form.
    """
    lattice = None if structure.get("@class") == "Molecule" else structure["lattice"]
    sites = structure["sites"]
    try:
        numbers = numbers_of([_species_of(site) for site in sites], species)
    except UnreadableError as error:
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


def _numbers(value: Any, shape: tuple[int, ...], what: str, where: str) -> Floats:
    try:
        numbers = np.array(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UnreadableError(f"{where}: {what} must be numbers of shape {shape}: {error}") from error
    if numbers.shape != shape:
        raise UnreadableError(f"{where}: {what} must be numbers of shape {shape}, got {numbers.shape}")
    return numbers


def _species_of(site: Mapping[str, Any]) -> str:
    species = site["species"]
    if len(species) != 1 or species[0].get("occu", 1) != 1:
        raise UnreadableError("a site is shared by several species; ordered structures are needed")
    return str(species[0]["element"])


def _entries(path: Path) -> Iterator[Entry]:
    """The entry of each frame of a file."""
    number = 0
    try:
        for key, value in iterate_entries(path):
            keys = () if key is None else (key,)
            of_mptrj = isinstance(value, dict) and "structure" not in value and key is not None
            found = {(*keys, name): entry for name, entry in value.items()} if of_mptrj else {keys: value}
            for names, content in found.items():
                label = f" ({'/'.join(names)})" if names else ""
                where = f"{path}, frame {number}{label}"
                yield Entry(where, number, content, names)
                number += 1
    except (ValueError, OSError, EOFError) as error:
        raise UnreadableError(f"cannot read {path}: {error}; is the file whole?", last=number) from error


def frame_of_entry(options: ReadOptions, path: Path, found: Entry) -> tuple[Frame, Mapping[str, Any]]:
    """The frame of an entry, in the units of the file, and the table of its labels.

    Raises:
        ValueError: see `structure_fields`, `ReadOptions.check_label_keys`.
    """
    entry, of_mptrj = flat_entry(found.content), len(found.keys) == 2
    numbers, positions, cell, pbc = structure_fields(entry["structure"], options.species, found.where)
    usual = USUAL_NAMES | (MPTRJ_NAMES if of_mptrj else {})
    named = {
        label: next((name for name in names if entry.get(name) is not None), None)
        for label, names in usual.items()
    }
    usual_names = {label: name for label, name in named.items() if name is not None and label != "virial"}
    options.check_label_keys(usual_names, found.where)
    labels: dict[str, Any] = {}
    for name, key in options.label_keys.items():
        labels[name] = None if key == "none" else entry.get(key or named[name] or name)
    notes: tuple[str, ...] = ()
    if options.virial_key is None:
        labels["virial"], notes = options.usual_virial(labels["virial"])
    undeclared = ("matpes_id" in entry or ENTRY in entry) and "stress" not in options.units.of
    if undeclared and options.stress_key is None and labels["stress"] is not None:
        labels["stress"], notes = None, (*notes, STRESS_UNDECLARED)
    provenance = entry.get("provenance")
    material = found.keys[0] if of_mptrj else None
    if ENTRY in entry and entry.get("mat_id") is not None:
        material = entry["mat_id"]
    if isinstance(provenance, dict) and provenance.get("original_mp_id") is not None:
        material = provenance["original_mp_id"]
    state = {name: entry["structure"].get(name) for name in ("charge", "spin_multiplicity")}
    frame = Frame(
        path=path,
        index=found.number,
        numbers=numbers,
        positions=positions,
        cell=cell,
        pbc=pbc,
        info={**state, **{k: v for k, v in entry.items() if k not in NOT_LABELS}},
        units=MPTRJ_UNITS if of_mptrj else Units(),
        group=None if material is None else str(material),
        level=str(entry.get("functional") or "unknown"),
        notes=notes,
        others=options.others(entry.get, options.usual_others),
        **labels,
    )
    return frame, entry


def flat_entry(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """An entry with its labels beside its structure; a ComputedStructureEntry has them in three places."""
    if entry.get("@class") != ENTRY:
        return entry
    data = entry["data"] if isinstance(entry.get("data"), dict) else {}
    forces = [(site.get("properties") or {}).get("forces") for site in entry["structure"]["sites"]]
    return {
        **data,
        "structure": entry["structure"],
        "energy": data.get("energy_total", entry.get("energy")),
        "forces": None if None in forces else forces,
        ENTRY: entry.get("entry_id"),
    }


def iterate_entries(path: Path) -> Iterator[tuple[str | None, Any]]:
    """(key, value) of each entry of the list (key None) or object at the top of a file, compressed or not.

    A list under the key "entries" of an object is taken apart in its place. Memory is that of the largest
    entry.

    Raises:
        ValueError: not a JSON list or object, or one that ends early.
        OSError, EOFError: a damaged compressed file.
    """
    with open_with_compression(str(path), "rt") as file:
        yield from _entries_of(_Buffer(file))


def _entries_of(text: "_Buffer") -> Iterator[tuple[str | None, Any]]:
    opening = text.next_character()
    if opening not in ("[", "{"):
        raise ValueError("expected a JSON list or object")
    closing = "]" if opening == "[" else "}"
    text.skip()
    while text.next_character() != closing:
        key = None
        if opening == "{":
            key = text.value()
            if not isinstance(key, str) or text.next_character() != ":":
                raise ValueError("expected a key in double quotes and a colon")
            text.skip()
        if key == "entries" and text.next_character() == "[":
            yield from _entries_of(text)
            text.skip()
        else:
            yield key, text.value()
        if text.next_character() == ",":
            text.skip()
        elif text.next_character() != closing:
            raise ValueError("expected a comma between entries")


class _Buffer:
    """The part of a file that is not yet decoded."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.text = ""
        self.start = 0
        self.decoder = json.JSONDecoder()

    def read(self, size: int = CHUNK) -> bool:
        more = self.file.read(size)
        self.text, self.start = self.text[self.start :] + more, 0
        return bool(more)

    def skip(self) -> None:
        self.start += 1

    def next_character(self) -> str:
        """The next character that is no white space; it stays."""
        while True:
            while self.start < len(self.text) and self.text[self.start] in SPACE:
                self.start += 1
            if self.start < len(self.text):
                return self.text[self.start]
            if not self.read():
                raise ValueError("the file ends early")

    def value(self) -> Any:
        """The next value, whole; the text at hand is doubled until it is."""
        self.next_character()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.start)
            except json.JSONDecodeError as error:
                whole = error.pos < len(self.text) - 20 and not error.msg.startswith("Unterminated")
                if whole or not self.read(max(CHUNK, len(self.text) - self.start)):
                    raise ValueError(f"the file ends early or is damaged: {error}") from error
                continue
            except RecursionError as error:
                raise ValueError("an entry is nested too deeply") from error
            if end == len(self.text) and self.read():
                continue  # a number may go on in the next part
            self.start = end
            return value
