"""Plans against the peaks and times that the documents have."""

import pytest

from tools.bench.planning import PAGE, STEPS_PAGE, planned_bytes, read_page, read_steps, step_table, table


def test_plans_of_all_measured_layouts_are_within_a_tenth() -> None:
    rows = read_page(PAGE.read_text())
    assert len(rows) == 33
    assert {size.ranks for _, size, _ in rows} == {2, 4}
    for row, size, most in rows:
        assert planned_bytes(row, size) == pytest.approx(most, rel=0.1), (row.name, size.forces, size.ranks)
    assert table(rows).splitlines()[-1].startswith("33 layouts, ")


def test_steps_of_trainings_are_planned_to_a_fifth_and_their_memory_to_a_twentieth() -> None:
    steps = read_steps(STEPS_PAGE.read_text())
    assert len(steps) == 8
    for s in steps:
        assert s.planned_seconds == pytest.approx(s.seconds, rel=0.2), s.name
        assert s.planned_peak == pytest.approx(s.peak, rel=0.05), s.name
    assert len(step_table(steps).splitlines()) == 10


def test_a_page_without_tables_is_refused() -> None:
    with pytest.raises(ValueError, match="no table as"):
        read_page("# Nothing")
    with pytest.raises(ValueError, match="no steps of trainings"):
        read_steps("# Nothing")
    with pytest.raises(ValueError, match="has 94785 parameters, not 5"):
        read_steps("| megagnn: egnn, direct, 64 | 5 | 88 | 51 |")
