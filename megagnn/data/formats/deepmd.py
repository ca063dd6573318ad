"""Folders of DeePMD-kit, as dpdata writes them (`deepmd/npy`): `type.raw`, `type_map.raw` and `set.*`.

Energies are in eV, forces in eV/Å, virials in eV, whose positive sign means compression. In a folder of mixed
types each frame has its own in `real_atom_types.npy`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megagnn.data.formats.options import ReadOptions, UnreadableError
from megagnn.data.formats.published import Method, Published, structures
from megagnn.data.formats.species import numbers_of
from megagnn.data.record import Structure

LAYOUT = Published((Method("unknown", "energy", "force", virial="virial"),))
PADDING = -1
"""Type of an atom that a frame of mixed types does not have."""


def is_deepmd(path: Path) -> bool:
    """Whether a path is such a folder."""
    return path.is_dir() and (path / "type.raw").is_file() and any(path.glob("set.*/coord.npy"))


def read_deepmd(path: Path, options: ReadOptions) -> Iterator[Structure]:
    """Yield the frames of a folder, set by set; its arrays are mapped, not read whole.

    Without `type_map.raw` the elements are those of `--type-map`, whose types 1, 2 are the folder's 0 and 1.

    Raises:
        ValueError: arrays that cannot be read or are of another shape than the number of atoms asks for (an
            UnreadableError), types without an element.
    """
    found = sorted(file.stem for file in next(iter(sorted(path.glob("set.*")))).glob("*.npy"))
    yield from structures(path, _items(path, options), LAYOUT, options, found)


def look_into_deepmd(path: Path, options: ReadOptions) -> dict[str, Any]:
    """See `Format.look`."""
    sets = sorted(path.glob("set.*"))
    count = sum(len(_load(folder / "coord.npy")) for folder in sets)
    keys = sorted(file.stem for file in sets[0].glob("*.npy"))
    return {"layout": "deepmd/npy", "keys": keys, "num_structures": count}


def _items(path: Path, options: ReadOptions) -> Iterator[Mapping[str, Any]]:
    try:
        types = np.array((path / "type.raw").read_text().split(), dtype=np.int64)
        named = path / "type_map.raw"
        names = named.read_text().split() if named.is_file() else []
    except ValueError as error:
        raise UnreadableError(f"type.raw must hold whole numbers: {error}") from error
    is_periodic = not (path / "nopbc").is_file()
    for folder in sorted(path.glob("set.*")):
        arrays = {file.stem: _load(file) for file in sorted(folder.glob("*.npy"))}
        if "coord" not in arrays or (is_periodic and "box" not in arrays):
            raise UnreadableError(
                f"{folder} has no coord.npy or, without a file nopbc, no box.npy; it has {', '.join(arrays)}"
            )
        count, width = len(arrays["coord"]), 3 * len(types)
        widths = {"coord": (width,), "force": (width,), "virial": (9,), "energy": (1,)}
        widths |= {"real_atom_types": (len(types),), **({"box": (9,)} if is_periodic else {})}
        for name in widths.keys() & arrays.keys():
            shape, flat = arrays[name].shape, (count, *widths[name])
            if shape != flat and not (flat[1:] == (1,) and shape == (count,)):
                raise UnreadableError(
                    f"{folder.name}/{name}.npy must be {flat} for {count} frames of {len(types)} atoms, got "
                    f"{shape}"
                )
        for k in range(count):
            own = arrays["real_atom_types"][k] if "real_atom_types" in arrays else types
            there = own != PADDING
            labels = {name: array[k] for name, array in arrays.items() if len(array) == count}
            for name in ("coord", "force"):
                if name in labels:
                    labels[name] = np.asarray(labels[name]).reshape(-1, 3)[there]
            yield {
                "numbers": numbers_of(
                    [_name(names, int(t)) for t in own[there]], options.species, "--type-map"
                ),
                "positions": labels["coord"],
                "cell": arrays["box"][k].reshape(3, 3) if is_periodic else None,
                "pbc": is_periodic,
                "values": labels,
                "where": f"{folder.name}, frame {k}",
            }


def _name(names: list[str], kind: int) -> str:
    """The name of a type; where it has none its number, counted from 1 as `--type-map Si,O` does."""
    return names[kind] if 0 <= kind < len(names) else str(kind + 1)


def _load(file: Path) -> Any:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UnreadableError(f"{file} is no array: {error}; is the file whole?") from error
    if not isinstance(array, np.ndarray) or array.ndim == 0:
        raise UnreadableError(
            f"{file} holds no row for each frame but a single value; remove it, or repair it"
        )
    return array
