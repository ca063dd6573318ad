"""Any file ASE reads, extended XYZ and its databases among them."""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import ase
import ase.db
import ase.io
import ase.io.aims
import numpy as np
from ase.constraints import FixAtoms, FixCartesian
from ase.db.row import AtomsRow
from ase.io.formats import open_with_compression
from ase.io.jsonio import read_json

from megagnn.data.arrays import Bools
from megagnn.data.formats import ase_formats
from megagnn.data.formats.assemble import Frame, assemble
from megagnn.data.formats.extxyz import UNREADABLE_STRESS, iterate_extxyz
from megagnn.data.formats.lammps_dump import iterate_dump
from megagnn.data.formats.oc20 import iterate_systems
from megagnn.data.formats.options import USUAL_NAMES, ReadOptions, UnreadableError, cannot_read, parsed_frames
from megagnn.data.formats.units import Units, convert_frame
from megagnn.data.record import Structure

DB_FORMATS = {"db": "db", "json": "json"}
"""ASE's name of the format -> the type of the database."""


def open_database(path: Path, name: str, options: ReadOptions) -> tuple[Any, Units, frozenset[str]]:
    """A database, read-only, and what its metadata say of all its rows: units, and names of labels.

    Properties whose units are declared are labels under their usual names, beside ASE's own. SchNetPack
    writes `_property_unit_dict` and `_distance_unit`; a unit of a label that is read must be known here, or
    be given by the user.

    Raises:
        UnreadableError: not a database of ASE.
        ValueError: a unit that is not known.
    """
    try:
        database = ase.db.connect(str(path), type=DB_FORMATS[name], create_indices=False, serial=True)
        metadata = dict(database.metadata)
    except Exception as error:
        raise cannot_read(path, 0, error, hint="is it a database of ASE?") from error
    declared = metadata.get("_property_unit_dict")
    declared = declared if isinstance(declared, dict) else {}
    wanted = {
        label: str(declared[key or label])
        for label, key in options.label_keys.items()
        if declared.get(key or label) and label not in options.units.of
    }
    if metadata.get("_distance_unit") and "length" not in options.units.of:
        wanted["length"] = str(metadata["_distance_unit"])
    try:
        return database, Units(wanted), frozenset(declared)
    except ValueError as error:
        raise ValueError(
            f"{path} declares units that are not known here ({error}); give them with --units"
        ) from error


def iterate_rows(
    path: Path, database: Any, options: ReadOptions
) -> Iterator[tuple[int, tuple[ase.Atoms, dict[str, Any]]]]:
    """(index, (atoms, extra values by name)) of each row, each read by itself.

    Raises:
        UnreadableError: a row that cannot be read.
    """
    yield from parsed_frames(path, _rows(path, database), _atoms, options)


def _atoms(row_of: Callable[[], AtomsRow]) -> tuple[ase.Atoms, dict[str, Any]]:
    row = row_of()
    atoms, extra = row.toatoms(), {**dict(row.data), **dict(row.key_value_pairs)}
    atoms.info = {**extra, **atoms.info}
    return atoms, extra


def _rows(path: Path, database: Any) -> Iterator[Callable[[], AtomsRow]]:
    """A function that reads it, for each row; ASE's own loop over rows ends at the first it cannot read."""
    if path.suffix.lower() == ".json":
        with path.open() as file:
            entries = read_json(file)
        for number in entries.get("ids", [1]):
            yield partial(_json_row, entries, number)
        return
    with database:  # one connection for all rows
        numbers = [row.id for row in database.select(columns=["id"], include_data=False, sort="id")]
        for number in numbers:
            yield partial(database.get, id=number)


def _json_row(entries: dict[int, Any], number: int) -> AtomsRow:
    return AtomsRow(entries[number])


LABEL_WORDS = re.compile("energy|forces?|stress|virials?")
KIN = {
    "energy": ("energy",),
    "forces": ("forces", "force"),
    "stress": ("stress",),
    "virial": ("virial", "virials"),
}
"""Label -> words for it in keys."""


@dataclass
class Found:
    """One frame as ASE read it, and what else the format tells.

    Attributes:
        index: of the frame in its file.
        atoms: with labels in `calc.results`, `info` and `arrays`.
        labels: values that count as labels under their usual names, beside ASE's results.
        notes, units, converged, group, level: see `Frame`.
    """

    index: int
    atoms: ase.Atoms
    labels: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    units: Units = field(default_factory=Units)
    converged: bool = True
    group: str | None = None
    level: str = "unknown"

    @property
    def results(self) -> dict[str, Any]:
        """What ASE's reader took for results of the engine."""
        results = self.atoms.calc.results if self.atoms.calc is not None else {}
        return {name: value for name, value in results.items() if value is not None}


def read_ase(path: Path, options: ReadOptions) -> Iterator[Structure]:
    """Stream the frames of a file through ASE's readers.

    Labels are what ASE holds as results: total energy (eV; of OUTCAR and vasprun.xml the free energy, whose
    derivative the forces are), forces (eV/Å) as the engine gave them (ASE's `get_forces` would zero those of
    fixed atoms), stress (eV/Å^3, tension positive) where the structure is periodic in three directions, or
    else a virial. Keys of one's own, such as REF_energy, are looked up in `atoms.info`, `atoms.arrays` and
    the rows of a database.

    Raises:
        ValueError: a file ASE cannot read, a first frame without labels, naming the keys that are there, or
            labels of which some are named by a key and others are not (see `ReadOptions.check_label_keys`).
    """
    name = ase_formats.ase_format(path, options.ase_format)
    num_found = num_told = 0

    def tell(error: UnreadableError) -> None:
        nonlocal num_told
        num_told += 1
        original.unreadable(error)

    original, options = options, replace(options, on_unreadable=tell if options.on_unreadable else None)
    for found in _frames(path, name, options):
        num_found += 1
        try:
            frame = _frame(found, path, name, options)
            structure = assemble(frame, options)
        except UnreadableError as error:
            options.unreadable(error)
            continue
        if found.index == 0 and options.on_unreadable is None:
            is_labelled = not (structure.energy is None and structure.forces is None and structure.converged)
            options.check_first(partial(_by_key, found), _keys_there(found), is_labelled, str(path))
        usual = {label: label for label in ("energy", "forces", "stress") if _usual(found, label) is not None}
        options.check_label_keys(usual, f"{path}, frame {found.index}")
        yield structure
    if not num_found and not num_told:
        options.unreadable(ase_formats.nothing_found(path, name))


def read_frames(path: Path, options: ReadOptions) -> Iterator[tuple[int, ase.Atoms]]:
    """Number and atoms of every frame of a file, labelled or not, by the readers that `read_ase` uses.

    Lengths and labels under usual names are in the units of a store (see `convert_frame`), all else in
    `info`, arrays and results is as ASE reads it.

    Raises:
        ValueError: a file, or a frame, that cannot be read.
    """
    name, num_found = ase_formats.ase_format(path, options.ase_format), 0
    for found in _frames(path, name, options):
        num_found += 1
        convert_frame(found.atoms, options.units.over(found.units), foreign=bool(found.units.of))
        yield found.index, found.atoms
    if not num_found:
        raise ase_formats.nothing_found(path, name)


def fixed_atoms(atoms: ase.Atoms) -> Bools | None:
    """(N,) bool of atoms held fixed in all directions, or None if none is."""
    fixed = np.zeros(len(atoms), dtype=bool)
    for constraint in atoms.constraints:
        if isinstance(constraint, FixAtoms) or (
            isinstance(constraint, FixCartesian) and np.asarray(constraint.mask).all()
        ):
            fixed[constraint.index] = True
    return fixed if fixed.any() else None


def _frames(path: Path, name: str, options: ReadOptions) -> Iterator[Found]:
    """Frames of a file by the reader of its format."""
    if name == "extxyz":
        for index, atoms, system in iterate_systems(path, iterate_extxyz(path, options), options):
            yield Found(index, atoms, group=system, level="unknown" if system is None else "RPBE")
    elif name == "lammps-dump-text":
        for index, (atoms, notes) in iterate_dump(path, options):
            yield Found(index, atoms, notes=notes)
    elif name in DB_FORMATS and path.suffix.lower() in (".db", ".json"):
        rows, units, declared = open_database(path, name, options)
        for index, (atoms, extra) in iterate_rows(path, rows, options):
            labels = {key: value for key, value in extra.items() if key in declared}
            yield Found(index, atoms, labels=labels, units=units)
    else:
        yield from _other_frames(path, name, options)


def _other_frames(path: Path, name: str, options: ReadOptions) -> Iterator[Found]:
    """Frames by ASE's own readers, whose warnings repeat the file; whatever they raise becomes an error."""
    frames = _aims_frames(path) if name == "aims-output" else _ase_frames(path, name)
    num_read = 0
    try:
        while True:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = next(frames, None)
            if found is None:
                return
            yield found
            num_read += 1
    except Exception as error:
        reason = f"unknown name {error} (of an element?)" if isinstance(error, KeyError) else error
        hint = "is the file whole and its format known to ASE (--ase-format)?"
        options.unreadable(cannot_read(path, num_read, reason, num_read, hint))


def _ase_frames(path: Path, name: str) -> Iterator[Found]:
    mender = ase_formats.Mender(path, name)
    converged = ase_formats.converged_frames(path, name)
    frames = ase.io.iread(path, index=":", format=name, do_not_split_by_at_sign=True)
    for index, atoms in enumerate(frames):
        ended = mender.converged(atoms) and (index >= len(converged) or converged[index])
        yield Found(index, atoms, notes=mender.mend(atoms), units=mender.units, converged=ended)


def _aims_frames(path: Path) -> Iterator[Found]:
    """Frames of FHI-aims, also of a run that did not end, whose last frame counts if its labels are there."""
    with open_with_compression(str(path), "r") as file:
        header = ase.io.aims.get_header_chunk(file)
        chunks = list(ase.io.aims.get_aims_out_chunks(file, header))
        if header.is_relaxation and chunks:
            chunks = chunks[:-1]  # the last is what follows the last step
        for index, chunk in enumerate(chunks):
            yield Found(index, chunk.atoms, converged=ase_formats.aims(chunk.lines))


def _usual(found: Found, label: str, ase_name: str = "") -> Any:
    names = USUAL_NAMES[label]
    if label == "energy" and ase_name in ase_formats.FREE_ENERGY:
        names = names[::-1]
    places: list[Mapping[str, Any]] = [found.results, found.labels]
    if label == "virial":
        places.append(found.atoms.info)
    for name in names:
        for place in places:
            if place.get(name) is not None:
                return place[name]
    return None


def _by_key(found: Found, key: str) -> Any:
    """A label by its key, wherever the file holds it."""
    for place in (found.atoms.info, found.atoms.arrays, found.results):
        if key in place:
            return place[key]
    return None


def _frame(found: Found, path: Path, ase_name: str, options: ReadOptions) -> Frame:
    atoms, notes = found.atoms, found.notes
    labels: dict[str, Any] = {}
    for label, key in options.label_keys.items():
        if key == "none":
            labels[label] = None
        elif key is not None:
            labels[label] = _by_key(found, key)
            if labels[label] is None and label in ("stress", "virial"):
                notes = (*notes, f"no {label} under the key {key}")
        else:
            labels[label] = _usual(found, label, ase_name)
    if options.stress_key in (None, "stress") and UNREADABLE_STRESS in atoms.info:
        raise UnreadableError(
            f"{path}, frame {found.index}: stress must have 6 or 9 components, got "
            f"{str(atoms.info[UNREADABLE_STRESS])[:60]!r}; leave it out with --stress-key none"
        )
    if options.virial_key is None:
        labels["virial"], said = options.usual_virial(labels["virial"])
        notes = (*notes, *said)
    notes = (*notes, *_unused_kin(found, labels, options))
    free = (
        ase_name in ase_formats.FREE_ENERGY and options.energy_key is None and "free_energy" in found.results
    )
    return Frame(
        path=path,
        index=found.index,
        numbers=np.asarray(atoms.numbers),
        positions=atoms.positions,
        cell=atoms.cell.array,
        pbc=atoms.pbc,
        info=atoms.info,
        units=found.units,
        group=found.group,
        level=found.level,
        fixed=fixed_atoms(atoms),
        notes=(*notes, ase_formats.FREE_ENERGY_TAKEN) if free else notes,
        converged=found.converged,
        others=options.others(partial(_by_key, found), options.usual_others),
        **labels,
    )


def _unused_kin(found: Found, labels: Mapping[str, Any], options: ReadOptions) -> tuple[str, ...]:
    """Notes on labels left unnamed: REF_forces beside --energy-key REF_energy."""
    given = [str(options.label_keys[name]) for name in options.foreign_keys]
    has_stress = labels["stress"] is not None or labels["virial"] is not None
    notes = []
    for label, spellings in KIN.items():
        read = has_stress if label in ("stress", "virial") else labels[label] is not None
        if read or options.label_keys[label] is not None:
            continue
        kin = [LABEL_WORDS.sub(spelling, key) for key in given for spelling in spellings]
        for key in kin:
            if key not in (*given, *spellings) and _by_key(found, key) is not None:
                notes.append(f"no {label} read, though there is {key}; --{label}-key {key} reads it")
                break
    return tuple(notes)


def _keys_there(found: Found) -> str:
    arrays = (key for key in found.atoms.arrays if key not in ("numbers", "positions"))
    places = {"info": found.atoms.info, "arrays": arrays, "results": found.results}
    return "the first frame has " + "; ".join(f"{k}: {', '.join(v) or 'none'}" for k, v in places.items())
