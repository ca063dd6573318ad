"""LMDB of published data sets: pickled graphs of the Open Catalyst projects, and databases of ASE."""

import itertools
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lmdb
import numpy as np

from megagnn.data.foreign import pickles

RESERVED = (b"nextid", b"deleted_ids", b"metadata")
"""Keys of a database of ASE that are no rows."""
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
        ValueError: neither of the layouts.
        lmdb.Error: a damaged file.
    """
    is_folder = os.path.isdir(path)
    with (
        lmdb.open(path, subdir=is_folder, readonly=True, lock=False, max_readers=1) as environment,
        environment.begin() as transaction,
    ):
        if transaction.get(b"nextid") is not None:
            yield from _rows(transaction, keys)
        elif transaction.get(b"0") is not None:
            yield from _graphs(transaction, keys, path)
        else:
            shown = [
                bytes(key)[:20] for key in itertools.islice(transaction.cursor().iternext(values=False), 4)
            ]
            raise ValueError(
                "this LMDB has neither rows of ASE (a key 'nextid') nor graphs of Open Catalyst (a key '0'); "
                f"its first keys are {shown}; convert it to extended XYZ"
            )


def _graphs(transaction: lmdb.Transaction, keys: Sequence[str], path: str) -> Iterator[dict[str, Any] | str]:
    """Pickled graphs under 0, 1, ...; `length` says how many where the writer came to an end."""
    references = _references(path) if TOTAL in keys else None
    count = transaction.stat()["entries"]
    length = transaction.get(b"length")
    if length is not None:
        count = int(pickles.load(bytes(length)))
    is_described = False
    for number in range(count):
        content = transaction.get(str(number).encode())
        try:
            if content is None:
                raise ValueError(f"there is none, though the file has {count} by its key 'length'")
            item: dict[str, Any] | str = _of_graph(pickles.load(bytes(content)), keys, references)
        except MemoryError:
            raise
        except Exception as error:  # whatever a damaged pickle leads to
            item = f"record {number}: {str(error) or type(error).__name__}"
        if not is_described:
            there = [] if isinstance(item, str) else sorted(item["values"])
            yield {"layout": "Open Catalyst", "keys": there, "num_structures": count}
            is_described = True
        if isinstance(item, dict):
            item["where"] = f"record {number}"
        yield item


def _references(path: str) -> dict[str, float]:
    """Energies of slab and gas, eV, by system, of the file that the Open Catalyst project publishes."""
    beside = os.path.join(os.path.dirname(path), REFERENCES)
    if not os.path.isfile(beside):
        raise ValueError(
            f"{TOTAL} needs {REFERENCES} beside the file; fetch it, or take the energy of the file"
        )
    with open(beside, "rb") as file:
        return dict(pickles.load(file.read()))


def _of_graph(record: Any, keys: Sequence[str], references: Mapping[str, float] | None) -> dict[str, Any]:
    if not isinstance(record, dict) or not {"pos", "atomic_numbers"} <= record.keys():
        found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"a graph has pos and atomic_numbers, got {found or 'nothing'}")
    labels = {
        **{key: record[key] for key in keys if key in record},
        "energy": record.get("y", record.get("energy")),
        "forces": record.get("force", record.get("forces")),
    }
    is_oc22 = bool(record.get("oc22", 0))
    if references is not None:
        system = f"random{str(record.get('sid')).removeprefix('random')}"
        labels[TOTAL] = float(labels["energy"]) + (0.0 if is_oc22 else references[system])
    fixed = record.get("fixed")
    return {
        "numbers": record["atomic_numbers"],
        "positions": record["pos"],
        "cell": np.asarray(record["cell"]).reshape(3, 3),
        "pbc": record.get("pbc", True),
        "values": {key: value for key, value in labels.items() if value is not None},
        "fixed": None if fixed is None else np.asarray(fixed) > 0.5,
        "info": {key: value for key, value in record.items() if isinstance(value, SIMPLE)},
        "level": "PBE+U" if is_oc22 else "RPBE",
        "notes": () if is_oc22 or references is not None else (RELATIVE,),
    }


def _rows(transaction: lmdb.Transaction, keys: Sequence[str]) -> Iterator[dict[str, Any] | str]:
    """Rows of ASE under 1, 2, ...: packed JSON."""
    last = int(_unpacked(transaction.get(b"nextid")))
    removed = transaction.get(b"deleted_ids")
    gone = set(_unpacked(removed)) if removed is not None else set()
    reserved = sum(transaction.get(key) is not None for key in RESERVED)
    is_described = False
    for number in range(1, last):
        content = transaction.get(str(number).encode())
        if content is None and number in gone:
            continue
        try:
            if content is None:
                raise ValueError(f"there is none, though rows are numbered up to {last - 1}")
            item: dict[str, Any] | str = _of_row(_unpacked(content), keys)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, zlib.error) as error:
            item = f"row {number}: {type(error).__name__} {error}"
        if not is_described:
            there = [] if isinstance(item, str) else item["there"]
            count = transaction.stat()["entries"] - reserved
            yield {"layout": "ASE", "keys": there, "num_structures": count}
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
