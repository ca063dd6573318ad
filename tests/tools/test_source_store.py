"""One source of a store as a store of its own keeps what is known of the source, and nothing of others."""

from pathlib import Path

import numpy as np
import pytest
import source_store

from megagnn.data.store import Store, write_store
from tests.data.conftest import make_structure


def test_what_is_known_of_a_source_goes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [make_structure(2, k, source="AB"[k % 2]) for k in range(4)]
    write_store(
        tmp_path / "both",
        records,
        splits=np.zeros(4, np.uint8),
        provenance={"B": {"method": "toy"}},
        references={"A": {"H": -13.6}, "B": {"H": -1.0}},
        warnings=["A: odd", "B: odd, too", "a file was odd"],
        isolated_distance=9.0,
    )
    for source, provenance in (("A", {}), ("B", {"B": {"method": "toy"}})):
        monkeypatch.setattr(
            "sys.argv", ["source_store", str(tmp_path / "both"), source, str(tmp_path / source)]
        )
        assert source_store.main() == 0
        header = Store.open(tmp_path / source).header
        assert header.num_structures == 2
        assert header.provenance == provenance
        assert header.references == {source: {"H": {"A": -13.6, "B": -1.0}[source]}}
        assert header.warnings == (f"{source}: odd" + ", too" * (source == "B"), "a file was odd")
        assert header.isolated_distance == 9.0


def test_fewer_training_structures_and_all_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [make_structure(2, k, source="A") for k in range(10)]
    write_store(tmp_path / "all", records, splits=np.array([0] * 7 + [1, 2, 2], np.uint8))
    for number, status in ((3, 0), (8, 2), (0, 2)):
        out = tmp_path / str(number)
        monkeypatch.setattr(
            "sys.argv", ["source_store", str(tmp_path / "all"), "A", str(out), "--train", str(number)]
        )
        assert source_store.main() == status
        assert out.exists() == (status == 0)
    store = Store.open(tmp_path / "3")
    assert [len(store.indices(split)) for split in ("train", "valid", "test")] == [3, 1, 2]
