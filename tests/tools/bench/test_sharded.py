"""The benchmark of sharding: what the arithmetic says, and that implementations which differ are told."""

from __future__ import annotations

from typing import Any

import pytest

from tools.bench import sharded as bench_sharded


def record(name: str, loss: float, **values: Any) -> dict[str, Any]:
    """A line of the benchmark."""
    sizes = {"tensor_bytes": 16e6, "peak_bytes": 17e6, "resident_bytes": 18e6, "seconds": 2.0}
    row = {
        "implementation": name,
        "dtype": "float32",
        "rule": "muon",
        "ranks": 2,
        "tensor": 1,
        "loss": [loss],
    }
    row |= {"floor_bytes": 8e6, "one_matrix_bytes": 0.5e6, "parameters": 1_000_000}
    return row | sizes | values


def test_row() -> None:
    first, second = record("megagnn stage 0", 1.0), record("torch FSDP2", 1.0, seconds=3.0)
    line = bench_sharded.row_of(second, [first, second])
    assert "| 2 | float32 | torch FSDP2 | 8 | 0.5 | 16 | +100.0% | 17 | 18 | 3.00 | 1.50 |" in line


def test_losses_must_agree() -> None:
    bench_sharded.check([record("megagnn stage 0", 1.0), record("torch FSDP2", 1.004)])
    with pytest.raises(ValueError, match="torch FSDP2 and megagnn stage 0 must train alike"):
        bench_sharded.check([record("megagnn stage 0", 1.0), record("torch FSDP2", 1.1)])
    with pytest.raises(ValueError, match="must train alike"):
        bench_sharded.check([record("megagnn stage 0", 1.0), record("torch FSDP2", float("nan"))])
