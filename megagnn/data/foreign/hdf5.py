"""HDF5 files of published data sets: which layout they have, and their structures as they stand there."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import h5py
import numpy as np

from megagnn.data.foreign import RefusedError

DUPLICATES = "DupMols.dat"
DUPLICATES_KEPT = f"copies of other conformers are kept, for {DUPLICATES} is not beside the file"
DUPLICATES_LEFT_OUT = f"what {DUPLICATES} names as copies of other conformers is left out"

BLOCK = 1 << 20
"""Numbers of positions that are read at a time."""


class Layout(NamedTuple):
    """Where a file keeps its structures.

    Attributes:
        depth: number of groups above the data sets of a structure.
        numbers, positions: names of data sets; positions are (N, 3), or (C, N, 3) of C conformations.
        cell, pbc: names of data sets, or empty.
        info: what else is told of a structure -> name of its data set.
    """

    depth: int
    numbers: str
    positions: str
    cell: str = ""
    pbc: str = ""
    info: Mapping[str, str] = {}


LAYOUTS = {
    "ANI-1x": Layout(1, "atomic_numbers", "coordinates"),
    "SPICE": Layout(1, "atomic_numbers", "conformations", info={"smiles": "smiles", "subset": "subset"}),
    "QM7-X": Layout(2, "atNUM", "atXYZ"),
    "MACE": Layout(
        2,
        "atomic_numbers",
        "positions",
        "cell",
        "pbc",
        {
            "config_type": "config_type",
            "charge": "properties/total_charge",
            "spin": "properties/total_spin",
            "config_weight": "weight",
            "config_energy_weight": "property_weights/energy",
            "config_forces_weight": "property_weights/forces",
            "config_stress_weight": "property_weights/stress",
            "config_virials_weight": "property_weights/virials",
        },
    ),
}


def structures(path: str, keys: Sequence[str]) -> Iterator[dict[str, Any] | str]:
    """Yield a description of a file, {"layout", "keys", "num_groups"}, then its structures.

    Args:
        path: the file.
        keys: names of labels; those that a structure lacks are left out of its "values".

    Raises:
        RefusedError: a file of none of the layouts.
    """
    with h5py.File(path, "r") as file:
        name, first = _layout(file)
        layout = LAYOUTS[name]
        yield {"layout": name, "keys": _names(first), "num_groups": len(file)}
        left_out, notes = _duplicates(path) if name == "QM7-X" else (frozenset(), ())
        for names, group in _leaves(file, layout.depth, ()):
            if names[-1].rpartition("-")[0] in left_out:
                continue
            where = "/".join(names)
            try:
                yield from ({**item, "notes": notes} for item in _of_group(group, layout, names, where, keys))
            except (KeyError, ValueError, TypeError, OSError, RuntimeError) as error:
                yield f"group {where}: {error.args[0] if error.args else type(error).__name__}"


def _duplicates(path: str) -> tuple[frozenset[str], tuple[str, ...]]:
    """Names of the conformers of QM7-X that are another's copies, displaced ones included, and what is told.

    The list beside the file, as published, names the optimised one of each: Geom-m1-i1-c2-opt.
    """
    beside = os.path.join(os.path.dirname(path), DUPLICATES)
    if not os.path.isfile(beside):
        return frozenset(), (DUPLICATES_KEPT,)
    with open(beside, encoding="utf-8") as file:
        names = [line.strip() for line in file if line.strip()]
    if not all(name.startswith("Geom-") and name.endswith("-opt") for name in names):
        raise RefusedError(f"{DUPLICATES} beside the file does not list conformers such as Geom-m1-i1-c2-opt")
    return frozenset(name.removesuffix("-opt") for name in names), (DUPLICATES_LEFT_OUT,)


def _layout(file: h5py.File) -> tuple[str, h5py.Group]:
    top = next(iter(file.values()), None)
    inner = next(iter(top.values()), None) if isinstance(top, h5py.Group) else None
    for name, layout in LAYOUTS.items():
        group = (top, inner)[layout.depth - 1]
        if isinstance(group, h5py.Group) and layout.positions in group:
            return name, group
    shown = ", ".join(list(top)[:8]) if isinstance(top, h5py.Group) else str(top)
    raise RefusedError(
        f"this HDF5 file has none of the known layouts ({', '.join(LAYOUTS)}): its first group holds "
        f"{shown or 'nothing'}; convert it to extended XYZ"
    )


def _names(group: h5py.Group) -> list[str]:
    """Names of the data sets in a group and in the groups in it."""
    found: list[str] = []
    for name, entry in group.items():
        found += [f"{name}/{inner}" for inner in entry] if isinstance(entry, h5py.Group) else [name]
    return found


def _leaves(
    group: h5py.Group, depth: int, names: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], h5py.Group]]:
    # MACE numbers its structures; HDF5 would list config_10 before config_2
    counted = (f"config_{k}" for k in range(len(group))) if "config_0" in group else group
    for name in counted:
        entry = group.get(name)
        if not isinstance(entry, h5py.Group):
            continue
        if depth == 1:
            yield (*names, name), entry
        else:
            yield from _leaves(entry, depth - 1, (*names, name))


def _of_group(
    group: h5py.Group, layout: Layout, names: tuple[str, ...], where: str, keys: Sequence[str]
) -> Iterator[dict[str, Any]]:
    for name in (layout.numbers, layout.positions):
        if name not in group:
            raise KeyError(f"there is no {name!r}; keys there are {', '.join(group) or 'none'}")
    numbers, positions = group[layout.numbers][()], group[layout.positions]
    shape = positions.shape
    if numbers.ndim != 1 or shape not in ((len(numbers), 3), (*shape[:1], len(numbers), 3)):
        raise ValueError(
            f"{layout.positions} must be (N, 3) or (C, N, 3) for {layout.numbers} of shape (N,), got {shape} "
            f"and {numbers.shape}"
        )
    common = {
        "numbers": numbers,
        "names": names,
        "where": where,
        "info": {name: _plain(group[key][()]) for name, key in layout.info.items() if key in group},
        "cell": _plain(group[layout.cell][()]) if layout.cell in group else None,
        "pbc": _plain(group[layout.pbc][()]) if layout.pbc in group else None,
    }
    found = [key for key in keys if isinstance(group.get(key), h5py.Dataset)]
    if len(shape) == 2:
        values = {key: _plain(group[key][()]) for key in found}
        info = common["info"]
        for label in ("energy", "forces", "stress", "virials"):  # MACE gives one that is not there no weight
            if f"config_{label}_weight" in info and values.get(f"properties/{label}") is None:
                del info[f"config_{label}_weight"]
        yield {**common, "positions": positions[()], "values": values}
        return
    for key in found:
        if group[key].shape[:1] != shape[:1]:
            raise ValueError(
                f"{key} must have an entry for each of {shape[0]} conformations, got shape {group[key].shape}"
            )
    step = max(1, BLOCK // max(1, 3 * len(numbers)))
    for start in range(0, shape[0], step):
        block = slice(start, start + step)
        xyz, columns = positions[block], {key: group[key][block] for key in found}
        for k in range(len(xyz)):
            yield {
                **common,
                "positions": xyz[k],
                "values": {key: column[k] for key, column in columns.items()},
            }


def _plain(value: Any) -> Any:
    """Text as str, MACE's word for nothing as None, anything else as it is."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "OS" and value.size == 1:
        value = value.reshape(())[()]
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    return None if isinstance(value, str) and value == "None" else value
