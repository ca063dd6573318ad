"""LMDB of published data sets: pickled graphs of the Open Catalyst projects, and databases of ASE."""

import itertools
import json
import os
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import lmdb
import numpy as np

from megagnn.data.foreign import RefusedError, pickles

RESERVED = (b"nextid", b"deleted_ids", b"metadata")
"""Keys of a database of ASE that are no rows."""
LENGTH = b"length"
"""Key of the number of graphs, where their writer came to an end."""
LARGEST = 1 << 28
"""Bytes of a row, unpacked."""
TOTAL, REFERENCES = "total_energy", "oc20_ref.pkl"
RELATIVE = "the energy may be relative to slab and gas, as OC20's files for training are"
SIMPLE = (str, int, float, bool)


def structures(path: str, keys: Sequence[str]) -> Iterator[dict[str, Any] | str]:
    """Yield a description of a file, {"layout", "keys", "num_structures"}, then its structures.

    Args:
        path: the file, or a directory with `data.mdb`.
        keys: names of labels; those that a structure lacks are left out of its "values".

    Raises:
        RefusedError: neither of the layouts.
        lmdb.Error: a damaged file.
    """
    is_folder = os.path.isdir(path)
    with (
        lmdb.open(path, subdir=is_folder, readonly=True, lock=False, max_readers=1) as environment,
        environment.begin() as transaction,
    ):
        if transaction.get(b"nextid") is not None:
            yield from _rows(transaction, keys)
        elif transaction.get(b"0") is not None or transaction.get(LENGTH) is not None:
            yield from _graphs(transaction, keys, path)
        else:
            shown = [
                bytes(key)[:20] for key in itertools.islice(transaction.cursor().iternext(values=False), 4)
            ]
            raise RefusedError(
                "this LMDB has neither rows of ASE (a key 'nextid') nor graphs of Open Catalyst (a key '0'); "
                f"its first keys are {shown}; convert it to extended XYZ"
            )


def _graphs(transaction: lmdb.Transaction, keys: Sequence[str], path: str) -> Iterator[dict[str, Any] | str]:
    """Pickled graphs under 0, 1, ...; without `length` all that are there."""
    references = _references(path) if TOTAL in keys else None
    length = transaction.get(LENGTH)
    there = transaction.stat()["entries"] - (length is not None)
    count = there if length is None else int(pickles.load(bytes(length)))
    is_described = False
    for number, content in _records(transaction, range(count), there):
        try:
            if content is None:
                raise ValueError(f"there is none, though the file has {count} by its key 'length'")
            item: dict[str, Any] | str = _of_graph(pickles.load(bytes(content)), keys, references)
        except MemoryError:
            raise
        except Exception as error:  # whatever a damaged pickle leads to
            item = f"record {number}: {str(error) or type(error).__name__}"
        if not is_described:
            labels = [] if isinstance(item, str) else sorted(item["values"])
            yield {"layout": "Open Catalyst", "keys": labels, "num_structures": min(count, there)}
            is_described = True
        if isinstance(item, dict):
            item["where"] = f"record {number}"
        yield item


def _records(
    transaction: lmdb.Transaction, numbers: range, there: int, gone: Collection[int] = ()
) -> Iterator[tuple[int, Any]]:
    """(number, content) of records, None for one that is missing.

    Where the file says that it has more than the `there` records in it, the first missing one after these is
    the last.
    """
    found = missing = 0
    for number in numbers:
        content = transaction.get(str(number).encode())
        if content is None and number in gone:
            continue
        yield number, content
        if content is not None:
            found += 1
            continue
        missing += 1
        if found >= there or missing > there:
            return


def _references(path: str) -> dict[str, float]:
    """Energies of slab and gas, eV, by system, of the file that the Open Catalyst project publishes."""
    beside = os.path.join(os.path.dirname(path), REFERENCES)
    if not os.path.isfile(beside):
        raise RefusedError(
            f"{TOTAL} needs {REFERENCES} beside the file; fetch it, or take the energy of the file"
        )
    with open(beside, "rb") as file:
        return dict(pickles.load(file.read()))


def _of_graph(record: Any, keys: Sequence[str], references: Mapping[str, float] | None) -> dict[str, Any]:
    if not isinstance(record, dict) or not {"pos", "atomic_numbers"} <= record.keys():
        found = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"a graph has pos and atomic_numbers, got {found or 'nothing'}")
    labels = {
        **{key: record[key] for key in keys if key in record},
        "energy": record.get("y", record.get("energy")),
        "forces": record.get("force", record.get("forces")),
    }
    is_oc22 = bool(record.get("oc22", 0))
    if references is not None:
        labels[TOTAL] = float(labels["energy"]) + (0.0 if is_oc22 else _reference(record, references))
    fixed = record.get("fixed")
    method = "RPBE" if references is not None else None  # only OC20's records have references of OC20
    return {
        "numbers": np.asarray(record["atomic_numbers"]),
        "positions": np.asarray(record["pos"]),
        "cell": np.asarray(record["cell"]).reshape(3, 3),
        "pbc": np.asarray(record.get("pbc", True)),
        "values": {key: np.asarray(value) for key, value in labels.items() if value is not None},
        "fixed": None if fixed is None else np.asarray(fixed) > 0.5,
        "info": {
            k: v for k, v in map(_plain, record.items()) if isinstance(k, str) and isinstance(v, SIMPLE)
        },
        "level": "PBE+U" if is_oc22 else method,
        "notes": () if is_oc22 or references is not None else (RELATIVE,),
    }


def _plain(entry: tuple[Any, Any]) -> tuple[Any, Any]:
    """A tensor of one number, as charge and spin are, as the number."""
    key, value = entry
    return key, value.item() if isinstance(value, np.ndarray) and value.shape in ((), (1,)) else value


def _reference(record: Mapping[str, Any], references: Mapping[str, float]) -> float:
    system = f"random{str(record.get('sid')).removeprefix('random')}"
    if system not in references:
        raise RefusedError(
            f"{REFERENCES} beside the file has no {system}, so its {TOTAL} is not known; fetch the one "
            "published with the file, or take the energy of the file"
        )
    return float(references[system])


def _rows(transaction: lmdb.Transaction, keys: Sequence[str]) -> Iterator[dict[str, Any] | str]:
    """Rows of ASE under 1, 2, ...: packed JSON."""
    last = int(_unpacked(transaction.get(b"nextid")))
    removed = transaction.get(b"deleted_ids")
    gone = set(_unpacked(removed)) if removed is not None else set()
    reserved = sum(transaction.get(key) is not None for key in RESERVED)
    there = transaction.stat()["entries"] - reserved
    is_described = False
    for number, content in _records(transaction, range(1, last), there, gone):
        try:
            if content is None:
                raise ValueError(f"there is none, though rows are numbered up to {last - 1}")
            item: dict[str, Any] | str = _of_row(_unpacked(content), keys)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, zlib.error) as error:
            item = f"row {number}: {type(error).__name__} {error}"
        if not is_described:
            labels = [] if isinstance(item, str) else item["there"]
            yield {"layout": "ASE", "keys": labels, "num_structures": there}
            is_described = True
        if isinstance(item, dict):
            item["where"] = f"row {number}"
        yield item


def _unpacked(content: Any) -> Any:
    packed = zlib.decompressobj()
    text = packed.decompress(bytes(content), LARGEST)
    if packed.unconsumed_tail or not packed.eof:
        raise ValueError("packed text that does not end, or is larger than a structure can be")
    return _arrays(json.loads(text))


def _arrays(value: Any) -> Any:
    """Arrays where JSON has {"__ndarray__": [shape, type, numbers]}."""
    if isinstance(value, dict):
        if "__ndarray__" in value:
            shape, kind, numbers = value["__ndarray__"]
            if np.dtype(kind).kind not in "biuf":
                raise ValueError(f"an array of type {kind}, which is no number")
            return np.array(numbers, dtype=kind).reshape(shape)
        return {key: _arrays(entry) for key, entry in value.items()}
    return value


def _of_row(row: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    extra = {**_table(row.get("key_value_pairs")), **_table(row.get("data"))}
    places = {**extra, **{key: row[key] for key in (*keys, "energy", "forces", "stress") if key in row}}
    numbers = np.asarray(row["numbers"])
    return {
        "numbers": numbers,
        "positions": row["positions"],
        "cell": row["cell"]["array"] if isinstance(row["cell"], dict) else row["cell"],
        "pbc": row["pbc"],
        "values": {key: places[key] for key in keys if places.get(key) is not None},
        "fixed": _fixed(row.get("constraints"), len(numbers)),
        "info": {key: value for key, value in extra.items() if isinstance(value, SIMPLE)},
        "there": [key for key, value in places.items() if value is not None],
    }


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _fixed(constraints: Any, num_atoms: int) -> Any:
    """(N,) atoms held in all directions, or None if none is."""
    fixed = np.zeros(num_atoms, dtype=bool)
    for entry in constraints or ():
        arguments = entry.get("kwargs", {})
        if entry.get("name") == "FixAtoms":
            fixed[np.asarray(arguments["indices"], dtype=np.int64)] = True
        elif entry.get("name") == "FixCartesian" and np.asarray(arguments.get("mask", 0)).all():
            fixed[np.asarray(arguments["a"], dtype=np.int64)] = True
    return fixed if fixed.any() else None
