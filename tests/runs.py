"""A small labelled data set and a short run on it, for tests of training and of what comes after it."""

import dataclasses
import os
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.cluster import Octahedron

from megagnn.cli import main
from megagnn.config import load_config
from megagnn.data.record import Structure
from megagnn.data.store import write_store
from megagnn.parallel.context import ParallelContext
from megagnn.train.trainer import Trainer

CONFIG = """
[model]
width = 16
num_layers = 2
num_radial = 8
cutoff = 4.0
stress = true
[data]
max_atoms = 64
max_edges = 2000
[loss]
stress_weight = 0.1
[optim]
learning_rate = 5e-3
warmup_steps = 5
[train]
num_steps = 60
validate_every = 20
checkpoint_every = 10
log_every = 5
"""


def labelled(atoms: Atoms, source: str, group: str) -> Structure:
    """A structure with EMT labels, positions as float32 holds them."""
    atoms.positions = atoms.positions.astype(np.float32)
    atoms.calc = EMT()
    return Structure(
        atomic_numbers=atoms.numbers.astype(np.uint8),
        positions=atoms.positions,
        cell=atoms.cell.array,
        pbc=atoms.pbc,
        energy=float(atoms.get_potential_energy()),
        forces=atoms.get_forces(),
        stress=atoms.get_stress(voigt=False) if atoms.pbc.all() else None,
        group=group,
        source=source,
        level="EMT",
    )


def structures() -> list[Structure]:
    """Rattled clusters and crystals of copper and silver: 24 groups of 3."""
    rng = np.random.default_rng(0)
    result = []
    for group in range(24):
        source = ("clusters", "crystals")[group % 2]
        element = ("Cu", "Ag")[group // 2 % 2]
        base = Octahedron(element, 2, 0) if source == "clusters" else bulk(element, cubic=True)
        for _ in range(3):
            atoms = base.copy()
            atoms.positions += rng.normal(scale=0.12, size=atoms.positions.shape)
            result.append(labelled(atoms, source, str(group)))
    return result


def write_data(path: Path, records: list[Structure] | None = None) -> Path:
    """The store: of each source, 8 groups to train, 2 to validate, 2 to test."""
    records = records or structures()
    by_group = np.array([0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 1, 2], dtype=np.uint8)
    splits = np.array([by_group[int(s.group) // 2] for s in records], dtype=np.uint8)
    write_store(path, records, splits=splits)
    return path


def gold(level: str = "EMT", source: str = "gold", element: str = "Au", seed: int = 3) -> list[Structure]:
    """12 rattled crystals of an alloy of copper with an element that the first data lack; each its group."""
    rng, found = np.random.default_rng(seed), []
    for k in range(12):
        atoms = bulk(element, "fcc", a=3.9, cubic=True)
        atoms.numbers[: k % 3] = 29
        atoms.positions += rng.normal(scale=0.1, size=atoms.positions.shape)
        found.append(dataclasses.replace(labelled(atoms, source, f"{source} {k}"), level=level))
    return found


def write_gold(path: Path, records: list[Structure] | None = None) -> Path:
    """The store: of each six crystals, four to train, one to validate, one to test."""
    records = gold() if records is None else records
    splits = np.array([(0, 0, 1, 0, 0, 2)[k % 6] for k in range(len(records))], dtype=np.uint8)
    write_store(path, records, splits=splits)
    return path


def train(store: Path, out_dir: Path, *arguments: str) -> int:
    """`megagnn train` of the small configuration, in this process; returns the exit code."""
    config = out_dir.parent / "config.toml"
    config.write_text(CONFIG)
    overrides = ["--data.paths", str(store), "--out_dir", str(out_dir), "--train.threads", "1"]
    return main(["train", str(config), *overrides, *arguments])


def make_trainer(store: Path, out_dir: Path, *overrides: str, resume: bool = False) -> Trainer:
    """A trainer of the small configuration, not yet run."""
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    config = out_dir.parent / "config.toml"
    config.write_text(CONFIG)
    arguments = ["--data.paths", str(store), "--out_dir", str(out_dir), *overrides]
    return Trainer(load_config(config, arguments), ParallelContext(), resume)


def readers() -> list[int]:
    """Processes of this one that read data."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    lines = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
    return [pid for pid, line in lines.items() if b"spawn_main" in line]
