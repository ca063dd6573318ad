"""Writes a test file by fairchem's own script for OC20: `python tools/sample_files/fairchem_lmdb.py DIR`.

It needs fairchem-core 1.10 without its dependencies, torch_geometric, ase-db-backends and lmdb.
`fairchem.core` itself is not imported, and torch_scatter, which only its models use and which has to be
compiled, is an empty module.
"""

import argparse
import importlib.util
import shutil
import sys
import tempfile
import types
from pathlib import Path

import ase.io
import lmdb

sys.path.insert(0, str(Path(__file__).parent))
from lmdb_files import slabs

MAP_SIZE = 1 << 20


def write_archive(folder: Path) -> None:
    """Three frames of one system as OC20 publishes them: `0.extxyz` and `0.txt`."""
    frames = slabs()
    ase.io.write(folder / "0.extxyz", frames, format="extxyz")
    lines = [f"random12,frame{7 * k},{-20.5}\n" for k in range(len(frames))]
    (folder / "0.txt").write_text("".join(lines))


def preprocess(folder: Path, out: Path) -> Path:
    """The file that fairchem's script makes of them, with energies relative to slab and gas."""
    core = importlib.util.find_spec("fairchem")
    assert core is not None
    assert core.submodule_search_locations
    package = types.ModuleType("fairchem.core")
    package.__path__ = [str(Path(next(iter(core.submodule_search_locations))) / "core")]
    sys.modules["fairchem.core"] = package
    sys.modules["torch_scatter"] = scatter = types.ModuleType("torch_scatter")
    scatter.scatter = None  # type: ignore[attr-defined]
    from fairchem.core.scripts.preprocess_ef import main

    main(
        argparse.Namespace(
            data_path=str(folder),
            out_path=str(out),
            get_edges=False,
            num_workers=1,
            ref_energy=True,
            test_data=False,
        )
    )
    return out / "data.0000.lmdb"


def shrunk(source: Path, target: Path) -> None:
    """A copy of all records in a file without the terabyte of room."""
    with (
        lmdb.open(str(source), subdir=False, readonly=True, lock=False) as old,
        lmdb.open(str(target), subdir=False, map_size=MAP_SIZE) as new,
        old.begin() as read,
        new.begin(write=True) as write,
    ):
        for key, value in read.cursor():
            write.put(key, value)
    Path(f"{target}-lock").unlink()


def run(folder: Path) -> None:
    """Write `fairchem_s2ef.lmdb`, and the archive it is made of."""
    with tempfile.TemporaryDirectory() as scratch:
        archive, out = Path(scratch) / "archive", Path(scratch) / "lmdb"
        archive.mkdir()
        write_archive(archive)
        shrunk(preprocess(archive, out), folder / "fairchem_s2ef.lmdb")
        for file in archive.iterdir():
            shutil.copy(file, folder / f"fairchem_s2ef{file.suffix}")


if __name__ == "__main__":
    run(Path(sys.argv[1]))
