"""The benchmark of precisions: what it compares, and its table."""

from __future__ import annotations

import argparse

from tools.bench import precision as bench


def test_a_small_case() -> None:
    """bfloat16 is further from float64 than float32, and near it."""
    args = argparse.Namespace(rounds=1, seconds=0.0)
    rows = {row.variant: row for row in bench.measured("conservative", 1000, 16, 2, args)}
    assert list(rows) == ["weights rounded", *bench.VARIANTS]
    for name, row in rows.items():
        low, high = (0.0, 1e-4) if name.startswith("float32") else (1e-4, 0.05)
        assert low < row.force_error < high
        assert low < row.gradient_error < high
        assert row.cosine > 0.99
    assert all(row.milliseconds and row.peak_bytes for row in list(rows.values())[1:])
    assert rows["float32 save"].ratio == 1.0
    text = bench.markdown(list(rows.values()))
    assert text.count("\n") == 4 + len(rows)
    assert "| weights rounded | - | - | - |" in text
