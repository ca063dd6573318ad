"""Damaged files of every format are read or refused, and a fault of a reader would be found."""

import fuzz_readers
import pytest

from megagnn.data.foreign import child

for name in ("h5py", "lmdb"):
    pytest.importorskip(name, reason=f"{name} is not installed")


def test_damaged_files_are_read_or_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(child, "TIME_LIMIT", 10.0)
    outcomes, faults = fuzz_readers.fuzz(200, 1, tmp_path)
    assert not faults
    assert outcomes["read"] > 20  # the damage is small enough to get past the first bytes
    assert outcomes["refused"] > 20
    assert sum(outcomes.values()) == 200


def test_a_fault_is_found(tmp_path, monkeypatch):
    def faulty(path, options):
        raise IndexError("planted")
        yield

    monkeypatch.setattr(fuzz_readers, "read_structures", faulty)
    outcomes, faults = fuzz_readers.fuzz(2, 0, tmp_path)
    assert not outcomes
    assert len(faults) == 2
    assert "IndexError: planted" in faults[0]
