"""Archives of NumPy arrays: rMD17, and MD17 with the other sets of sGDML.

rMD17 (Christensen and von Lilienfeld, Mach. Learn.: Sci. Technol. 2020, 1, 045018) has the arrays
`nuclear_charges`, `coords`, `energies` and `forces`, and those of MD17 as `old_energies` and `old_forces`.
MD17 and others of sgdml.org have `z`, `R`, `E` and `F`, perhaps `e_unit`, `r_unit`, `theory` and `lattice`.

Energies are in kcal/mol and lengths in Å where the file says nothing else. Arrays are read in rows, side by
side.
"""

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from megagnn.data.arrays import Floats
from megagnn.data.formats.options import ReadOptions, UnreadableError, cannot_read
from megagnn.data.formats.published import Method, Published, structures
from megagnn.data.formats.units import Units
from megagnn.data.record import Structure

NUM_ROWS = 256
"""Conformations that are read at a time."""
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError)
"""What damaged archives raise."""
LARGEST = 1 << 20
"""Numbers of an array that is read whole."""


class Layout(NamedTuple):
    """Names of arrays, and levels of theory."""

    numbers: str
    positions: str
    methods: tuple[Method, ...]


LAYOUTS = {
    "rMD17": Layout(
        "nuclear_charges",
        "coords",
        (
            Method("PBE/def2-SVP", "energies", "forces"),
            Method("PBE+vdW-TS", "old_energies", "old_forces"),
        ),
    ),
    "sGDML": Layout("z", "R", (Method("unknown", "E", "F"),)),
}


class Rows:
    """An array in an archive, read row by row."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self.file, self.name = file, name
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        self.shape, in_columns, self.dtype = read(file)
        if self.dtype.hasobject or (in_columns and len(self.shape) > 1):
            what = (
                "Python objects, which are not run" if self.dtype.hasobject else "columns one after another"
            )
            raise UnreadableError(f"array {name} holds {what}; write it again with numpy.savez")

    def read(self, count: int) -> Any:
        """The next `count` rows."""
        shape = (count, *self.shape[1:])
        wanted = int(np.prod(shape)) * self.dtype.itemsize
        content = self.file.read(wanted)
        if len(content) < wanted:
            raise UnreadableError(f"array {self.name} ends before its {self.shape[0]} rows")
        return np.frombuffer(content, self.dtype).reshape(shape)


def is_npz(path: Path) -> bool:
    """Whether a file is an archive, by its ending and first bytes."""
    if path.suffix != ".npz" or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def read_npz(path: Path, options: ReadOptions) -> Iterator[Structure]:
    """Yield the conformations of a file, in memory that does not grow with it.

    Raises:
        ValueError: a file that cannot be read, lacks an array, or declares units that are not known.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _, layout = _layout(archive)
            published = Published(layout.methods, _units(archive, path, options))
            keys = [entry.removesuffix(".npy") for entry in archive.namelist()]
            wanted = {key for method in layout.methods for key in method[1:]} | set(options.all_keys.values())
            items = _items(archive, layout, [key for key in keys if key in wanted])
            yield from structures(path, items, published, options, keys)
    except DAMAGE as error:
        raise cannot_read(path, 0, error) from error


def look_into_npz(path: Path, options: ReadOptions) -> dict[str, Any]:
    """See `Format.look`; units are told as the file declares them, known or not."""
    try:
        with zipfile.ZipFile(path) as archive:
            name, layout = _layout(archive)
            keys = [entry.removesuffix(".npy") for entry in archive.namelist()]
            with archive.open(f"{layout.positions}.npy") as file:
                count = Rows(file, layout.positions).shape[0]
            units = _declared(archive)
    except DAMAGE as error:
        raise cannot_read(path, 0, error) from error
    return {"layout": name, "keys": keys, "num_structures": count, "units": units}


def _layout(archive: zipfile.ZipFile) -> tuple[str, Layout]:
    keys = [entry.removesuffix(".npy") for entry in archive.namelist()]
    for name, layout in LAYOUTS.items():
        if {layout.numbers, layout.positions} <= set(keys):
            return name, layout
    need = " nor ".join(f"{entry.numbers}, {entry.positions} ({name})" for name, entry in LAYOUTS.items())
    raise UnreadableError(
        f"{archive.filename} has neither {need}; arrays there are {', '.join(keys) or 'none'}"
    )


def _whole(archive: zipfile.ZipFile, name: str) -> Any:
    """A small array, or None if there is none of this name."""
    if f"{name}.npy" not in archive.namelist():
        return None
    with archive.open(f"{name}.npy") as file:
        rows = Rows(file, name)
        if np.prod(rows.shape, dtype=float) > LARGEST:
            raise UnreadableError(f"array {name} has shape {rows.shape}, which is none of one molecule")
        return rows.read(rows.shape[0]) if rows.shape else np.frombuffer(file.read(), rows.dtype)[0]


def _text(archive: zipfile.ZipFile, name: str) -> str:
    value = _whole(archive, name)
    value = np.asarray(value).ravel()[0] if value is not None and np.size(value) else ""
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)


def _declared(archive: zipfile.ZipFile) -> dict[str, str]:
    """The units that the file declares, else kcal/mol and Å."""
    energy, length = _text(archive, "e_unit") or "kcal/mol", _text(archive, "r_unit") or "Å"
    return {"energy": energy, "forces": f"{energy}/{length}", "length": length}


def _units(archive: zipfile.ZipFile, path: Path, options: ReadOptions) -> Units:
    """Units of a file; what the user declares need not be known."""
    declared = _declared(archive)
    try:
        return Units({name: unit for name, unit in declared.items() if name not in options.units.of})
    except ValueError as error:
        raise ValueError(
            f"{path} declares units that are not known here ({error}); give them with --units "
            "of megagnn prepare"
        ) from error


def _items(archive: zipfile.ZipFile, layout: Layout, keys: list[str]) -> Iterator[Mapping[str, Any]]:
    numbers, level = _whole(archive, layout.numbers), _text(archive, "theory")
    lattice: Floats | None = _whole(archive, "lattice")
    with ExitStack() as stack:

        def rows(name: str) -> Rows:
            return Rows(stack.enter_context(archive.open(f"{name}.npy")), name)

        positions, labels = rows(layout.positions), {key: rows(key) for key in keys}
        num_atoms = len(numbers) if np.ndim(numbers) == 1 else 0
        if len(positions.shape) != 3 or positions.shape[1:] != (num_atoms, 3):
            raise UnreadableError(
                f"array {layout.positions} must be (C, N, 3) for {layout.numbers} of shape (N,), got "
                f"{positions.shape} and {np.shape(numbers)}"
            )
        total = positions.shape[0]
        for key, label in labels.items():
            if label.shape not in ((total,), (total, 1), positions.shape):
                raise UnreadableError(
                    f"array {key} must have a row for each of {total} conformations of {num_atoms} atoms, "
                    f"got shape {label.shape}"
                )
        for start in range(0, total, NUM_ROWS):
            count = min(NUM_ROWS, total - start)
            xyz, columns = positions.read(count), {key: label.read(count) for key, label in labels.items()}
            for k in range(count):
                yield {
                    "numbers": numbers,
                    "positions": xyz[k],
                    "values": {key: column[k] for key, column in columns.items()},
                    "cell": None if lattice is None else lattice.T,
                    "pbc": None if lattice is None else True,
                    "level": level if layout.methods[0].level == "unknown" else None,
                }
