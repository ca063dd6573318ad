"""The summary of a store says what it holds."""

from dataclasses import replace

import numpy as np

from megagnn.data.inspect import describe
from megagnn.data.store import Store, write_store
from tests.data.conftest import make_structure


def test_counts_and_rms(tmp_path):
    numbers = np.array([1, 1, 8], dtype=np.uint8)
    forces = np.array([[3.0, 0, 0], [0, 0, 0], [-3.0, 0, 0]])
    base = make_structure(3, atomic_numbers=numbers, forces=forces, source="water")
    # Training energies have mean -30: per atom the residuals are +1 and -1 eV.
    structures = [replace(base, energy=e, group=str(e)) for e in (-27.0, -33.0)] + [
        replace(base, energy=-24.0)
    ]
    write_store(
        tmp_path / "s", structures, splits=np.array([0, 0, 2]), provenance={"water": {"engine": "toy"}}
    )
    text = describe(Store.open(tmp_path / "s"))
    rows = {
        tuple(line.split()[:2]): line.split()[2:] for line in text.splitlines() if line.startswith("water ")
    }
    assert rows["water", "train"] == ["2", "2", "6", "3", "2", "2", "0", "1000.0", "1.414", "-"]
    assert rows["water", "valid"] == ["0", "0", "0", "0", "0", "0", "0", "-", "-", "-"]
    assert rows["water", "test"] == ["1", "1", "3", "3", "1", "1", "0", "2000.0", "1.414", "-"]
    assert "H 66.7%, O 33.3%; 3 molecules" in text
    assert '"engine": "toy"' in text


def test_several_sources_with_missing_labels(structures, make_store):
    text = describe(Store.open(make_store(structures)))
    assert "60 structures" in text
    assert "20 bulk or boxes" in text
    assert "levels of theory: toy, other" in text


def test_source_without_training_structures(structures, tmp_path):
    structures = [replace(s, group=f"{s.source} {s.group}") for s in structures]
    splits = np.array([2 if s.source == "B" else 0 for s in structures])
    write_store(tmp_path / "s", structures, splits=splits)
    (row,) = [r for r in describe(Store.open(tmp_path / "s")).splitlines() if r.split()[:2] == ["B", "test"]]
    assert row.split()[-3] == "-"  # no references, so no energy after them
