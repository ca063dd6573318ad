"""LMDB: pickled graphs of OC20 and OC22 (S2EF), and databases of ASE (OMat24, OMol25, sAlex and others).

Graphs are pickles of torch_geometric. They are read without it, and nothing that they name is run. The energy
of OC20 is that of the file: relative to slab and gas where it was made with `--ref-energy`, as by default.
`--energy-key total_energy --forces-key forces` adds to it what `oc20_ref.pkl` beside the file says. Graphs of
other sets look like those of OC20: the level of theory is RPBE only where these references are added.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megagnn.data.formats.options import ReadOptions
from megagnn.data.formats.published import Method, Published, described, read_described
from megagnn.data.record import Structure

READER = "megagnn.data.foreign.lmdb_files:structures"
MAGIC, MAGIC_AT = b"\xde\xc0\xef\xbe", 16


def _system(item: Mapping[str, Any]) -> str | None:
    """The slab and adsorbate, whose frames are one relaxation; named as in OC20's archives."""
    sid = item["info"].get("sid")
    name = "OC22" if item["info"].get("oc22") else "OC20"
    return None if sid is None else f"{name} {str(sid).removeprefix('random')}"


LAYOUTS = {
    "Open Catalyst": Published((Method("unknown", "energy", "forces"),), group=_system),
    "ASE": Published((Method("unknown", "energy", "forces", "stress", dipole="dipole"),)),
}


def is_lmdb(path: Path) -> bool:
    """Whether a file, or the `data.mdb` of a directory, begins as LMDB does."""
    file = path / "data.mdb" if path.is_dir() else path
    if not file.is_file():
        return False
    with file.open("rb") as content:
        content.seek(MAGIC_AT)
        return content.read(4) == MAGIC


def read_lmdb(path: Path, options: ReadOptions) -> Iterator[Structure]:
    """Yield the structures of a file, in memory that does not grow with it; forces of fixed atoms are kept.

    With group_by "auto" a group of Open Catalyst is a system, and of others the formula.

    Raises:
        ValueError: a file or record that cannot be read, or a pickle that names more than data (an
            UnreadableError); keys of labels that are not there.
    """
    yield from read_described(READER, path, LAYOUTS, options)


def look_into_lmdb(path: Path, options: ReadOptions) -> dict[str, Any]:
    """See `Format.look`."""
    return described(READER, path, LAYOUTS, options)
