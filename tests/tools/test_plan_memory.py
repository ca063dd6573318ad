"""Plans of memory against the peaks that were measured for docs/results/memory-table.md."""

from pathlib import Path

import pytest

from tools.bench.plan_memory import planned_bytes, read_page, table

PAGE = Path(__file__).parents[2] / "docs/results/memory-table.md"


def test_plans_of_all_measured_layouts_are_within_a_tenth() -> None:
    rows = read_page(PAGE.read_text())
    assert len(rows) == 33
    assert {size.ranks for _, size, _ in rows} == {2, 4}
    for row, size, most in rows:
        assert planned_bytes(row, size) == pytest.approx(most, rel=0.1), (row.name, size.forces, size.ranks)
    assert table(rows).splitlines()[-1].startswith("33 layouts, ")


def test_a_page_without_tables_is_refused() -> None:
    with pytest.raises(ValueError, match="no table as"):
        read_page("# Nothing")
