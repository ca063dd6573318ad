"""Writes the LMDB test files: `python tools/sample_files/lmdb_files.py DIR`.

It needs lmdb, torch_geometric and ase-db-backends, which writes .aselmdb.
"""

import pickle
import sys
from pathlib import Path

import lmdb
import numpy as np
import torch
from ase import Atoms
from ase.build import add_adsorbate, fcc111, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase_db_backends.aselmdb import LMDBDatabase
from torch_geometric.data import Data

NUM_FIXED = 2


def slabs() -> list[Atoms]:
    """Three frames of CO on copper, fixed at the bottom, with forces of EMT."""
    rng = np.random.default_rng(0)
    frames = []
    for _ in range(3):
        atoms = fcc111("Cu", (1, 1, 3), vacuum=6)
        add_adsorbate(atoms, molecule("CO"), 1.9, "fcc", mol_index=1)
        atoms.pbc = True
        atoms.positions += rng.normal(0, 0.05, atoms.positions.shape)
        atoms.set_tags([0, 0, 1, 2, 2])
        atoms.set_constraint(FixAtoms(range(NUM_FIXED)))
        reference = atoms.copy()
        reference.calc = EMT()
        atoms.calc = SinglePointCalculator(
            atoms,
            energy=reference.get_potential_energy(),
            forces=reference.get_forces(apply_constraint=False),
            stress=np.array([0.01, 0.02, 0.03, 0.001, 0.002, 0.003]),
        )
        frames.append(atoms)
    return frames


def attributes(atoms: Atoms, number: int) -> dict[str, object]:
    """Those of a graph of S2EF, in the types of fairchem's AtomsToGraphs."""
    return {
        "pos": torch.tensor(atoms.positions, dtype=torch.float32),
        "cell": torch.tensor(atoms.cell.array, dtype=torch.float32)[None],
        "atomic_numbers": torch.tensor(atoms.numbers, dtype=torch.float32),
        "natoms": len(atoms),
        "tags": torch.tensor(atoms.get_tags()),
        "fixed": torch.tensor([1.0] * NUM_FIXED + [0.0] * (len(atoms) - NUM_FIXED)),
        "y": atoms.get_potential_energy(),
        "force": torch.tensor(atoms.get_forces(apply_constraint=False), dtype=torch.float32),
        "sid": 1331084,
        "fid": 7 * number,
    }


def write(path: Path, records: list[object]) -> None:
    """Records under 0, 1, ... and their number under `length`, in the pages that they need."""
    environment = lmdb.open(str(path), subdir=False, map_size=1 << 24, meminit=False, lock=False)
    with environment.begin(write=True) as transaction:
        for number, record in enumerate(records):
            content = record if isinstance(record, bytes) else pickle.dumps(record, protocol=-1)
            transaction.put(str(number).encode(), content)
        transaction.put(b"length", pickle.dumps(len(records), protocol=-1))
    environment.close()


def of_version_1(values: dict[str, object]) -> bytes:
    """The pickle of a Data object whose attributes are its own, as up to torch_geometric 1.x."""
    import torch_geometric.data.data as module

    class Plain:
        """In the place of `Data` while it is pickled."""

    Plain.__module__, Plain.__qualname__, Plain.__name__ = module.__name__, "Data", "Data"
    real, module.Data = module.Data, Plain
    try:
        graph = Plain()
        graph.__dict__.update({"x": None, "edge_index": torch.zeros(2, 4, dtype=torch.long), **values})
        return pickle.dumps(graph, protocol=-1)
    finally:
        module.Data = real


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    frames = slabs()
    write(folder / "oc20.lmdb", [of_version_1(attributes(a, k)) for k, a in enumerate(frames)])
    oc22 = [Data(**attributes(a, k), nads=1, oc22=1) for k, a in enumerate(frames)]
    write(folder / "oc22.lmdb", oc22)
    with LMDBDatabase(folder / "slabs.aselmdb", use_lock_file=False) as database:
        for number, atoms in enumerate(frames):
            database.write(atoms, data={"sid": f"slab{number}", "charge": 0, "REF_energy": -1.5})
        database.delete([2])
    for left in folder.glob("*-lock"):
        left.unlink()
