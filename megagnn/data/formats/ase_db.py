"""ASE databases: labels in `data` and `key_value_pairs` of their rows, and SchNetPack's units."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ase
import ase.db
from ase.db.row import AtomsRow
from ase.io.jsonio import read_json

from megagnn.data.formats.options import ReadOptions, cannot_read, parsed_frames
from megagnn.data.formats.units import Units

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
