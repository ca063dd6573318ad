"""Small random structures and stores."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megagnn.data.record import Structure
from megagnn.data.split import split_groups
from megagnn.data.store import write_store

MakeStructure = Callable[..., Structure]
MakeStore = Callable[..., Path]


def make_structure(num_atoms: int = 5, seed: int = 0, **changes: object) -> Structure:
    """A molecule on a jittered grid of 1.5 Å, so that no atoms overlap, with random labels."""
    rng = np.random.default_rng(seed)
    side = int(np.ceil(num_atoms ** (1 / 3)))
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1).reshape(-1, 3)[:num_atoms]
    fields: dict[str, object] = {
        "atomic_numbers": rng.choice(np.array([1, 6, 8], dtype=np.uint8), num_atoms),
        "positions": 1.5 * grid + rng.uniform(-0.2, 0.2, (num_atoms, 3)),
        "cell": np.zeros((3, 3)),
        "pbc": np.zeros(3, dtype=bool),
        "energy": float(rng.normal(-10 * num_atoms)),
        "forces": rng.normal(0, 1, (num_atoms, 3)),
        "group": f"molecule {seed}",
        "source": "A",
        "level": "toy",
    }
    return Structure(**{**fields, **changes})  # type: ignore[arg-type]


def make_crystal(num_atoms: int = 4, seed: int = 0, **changes: object) -> Structure:
    """The same in a periodic cell with a little room at its faces, with a stress."""
    side = int(np.ceil(num_atoms ** (1 / 3)))
    rng = np.random.default_rng(seed)
    cell = 1.5 * (side + 1) * np.eye(3) + np.tril(rng.uniform(-0.1, 0.1, (3, 3)))
    fields = {
        "cell": cell,
        "pbc": np.ones(3, dtype=bool),
        "stress": rng.normal(0, 0.01, (3, 3)),
        "source": "B",
    }
    return make_structure(num_atoms, seed, **{**fields, **changes})


@pytest.fixture
def structures() -> list[Structure]:
    """40 molecules (source A) and 20 crystals (source B), two structures to a group, some labels missing."""
    molecules = [make_structure(3 + k % 7, k, group=f"m{k // 2}") for k in range(40)]
    crystals = [make_crystal(2 + k % 5, k, group=f"m{k // 2}", level="other") for k in range(20)]
    molecules[3] = make_structure(4, 3, group="m1", forces=None)
    crystals[5] = make_crystal(4, 5, group="m2", level="other", energy=None, stress=None)
    crystals[6] = make_crystal(4, 6, group="m3", level="other", fixed=np.array([True, False, True, False]))
    return molecules + crystals


@pytest.fixture
def make_store(tmp_path: Path) -> MakeStore:
    def make(structures: list[Structure], name: str = "store") -> Path:
        write_store(tmp_path / name, structures, splits=split_groups, provenance={"A": {"engine": "toy"}})
        return tmp_path / name

    return make
