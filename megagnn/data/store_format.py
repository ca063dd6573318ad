"""What a packed store looks like on disk: its arrays, its header and its checksums."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

from megagnn.data import keys

FORMAT = "megagnn-store"
VERSION = 1
HEADER_FILE = "header.json"
GROUPS_FILE = "groups.json"
"""Names of groups, a list indexed by the array `group`; there if the header holds its checksum (older stores
lack it)."""
UNITS = {"length": "Å"} | {name: label.unit for name, label in keys.LABELS.items()}

# Array -> (dtype, trailing shape, what its first axis counts).
ARRAYS: dict[str, tuple[str, tuple[int, ...], str]] = {
    "offsets": ("<i8", (), "structures + 1"),
    "atomic_numbers": ("|u1", (), "atoms"),
    "positions": ("<f4", (3,), "atoms"),
    "forces": ("<f4", (3,), "atoms"),
    "fixed": ("|u1", (), "atoms"),
    "energy": ("<f8", (), "structures"),
    "cell": ("<f4", (3, 3), "structures"),
    "pbc": ("|u1", (3,), "structures"),
    "stress": ("<f4", (3, 3), "structures"),
    "source": ("<i2", (), "structures"),
    "level": ("<i2", (), "structures"),
    "group": ("<i8", (), "structures"),
    "split": ("|u1", (), "structures"),
    "labels": ("|u1", (), "structures"),
}

# Arrays that a store has where its structures differ in them; the header's checksums tell which are there.
OPTIONAL_ARRAYS: dict[str, tuple[str, tuple[int, ...], str]] = {
    "weights": ("<f4", (3,), "structures"),  # in the loss: of energy, forces, stress
    "config_type": ("<i4", (), "structures"),
    "file": ("<i4", (), "structures"),
    "charge": ("<f4", (), "structures"),
    "multiplicity": ("<i2", (), "structures"),
}
for _name in keys.OTHER_LABELS:
    _label = keys.LABELS[_name]
    OPTIONAL_ARRAYS[_name] = (_label.stored, _label.shape, "atoms" if _label.per_atom else "structures")
ALL_ARRAYS = ARRAYS | OPTIONAL_ARRAYS


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class StoreHeader:
    """What header.json says.

    Attributes:
        sources: names, indexed by the array `source`; levels: names of levels of theory, likewise.
        num_structures, num_atoms: totals.
        split: how the split was made, free form.
        provenance: for each source, free form: engine, version, method, seed, num_rejected, rejection_rate...
        sha256: checksum of each array file, and of the names of groups where they are stored.
        config_types, files: names, indexed by the optional arrays of these names.
        warnings: what looked wrong when the data were prepared, in words; training says it again.
        references: reference energies that were given, eV, by source and chemical symbol.
        isolated_distance: Å, from which single atoms are isolated of their images, where it was given.
    """

    sources: tuple[str, ...]
    levels: tuple[str, ...]
    num_structures: int
    num_atoms: int
    split: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, dict[str, Any]] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=lambda: dict(UNITS))
    sha256: dict[str, str] = field(default_factory=dict)
    config_types: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    references: dict[str, dict[str, float]] = field(default_factory=dict)
    isolated_distance: float | None = None

    def to_json(self) -> str:
        record = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def read(cls, directory: Path) -> StoreHeader:
        """Read header.json of a store.

        Raises:
            ValueError: not a directory, not a store, or a version this code does not read.
        """
        path = directory / HEADER_FILE
        if not directory.is_dir():
            raise ValueError(f"{directory} is not a directory; give a store made by `megagnn prepare`")
        if not path.is_file():
            raise ValueError(
                f"{directory} is not a store (no {HEADER_FILE}); make one with `megagnn prepare`"
            )
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            name, version = record.pop("format"), record.pop("version")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is not the header of a store ({error}); prepare the data again"
            ) from error
        if name != FORMAT:
            raise ValueError(f"{path} has format {name!r}, expected {FORMAT!r}")
        if version != VERSION:
            raise ValueError(
                f"{directory} is a store of version {version}, this code reads version {VERSION}"
            )
        try:
            return cls(**record)  # what headers lack that were made before it was known has a default
        except ValidationError as error:
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            raise ValueError(f"{path} is damaged ({reason}); prepare the data again") from error

    def array_shape(self, name: str) -> tuple[int, ...]:
        """Full shape of one of the arrays."""
        _, trailing, axis = ALL_ARRAYS[name]
        lengths = {"structures": self.num_structures, "structures + 1": self.num_structures + 1}
        return (lengths.get(axis, self.num_atoms), *trailing)


def sha256_of(path: Path) -> str:
    """Checksum of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
