"""The order of a step's micro-batches."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from megagnn.data.micro_batches import hill, rounds_of


def test_rounds() -> None:
    """Of 8 on two ranks: neighbours by cost side by side, small, large, small; ranks take turns."""
    rounds = rounds_of([5, 1, 8, 3, 7, 2, 6, 4], 2)
    assert [{[5, 1, 8, 3, 7, 2, 6, 4][k] for k in one} for one in rounds] == [{1, 2}, {5, 6}, {7, 8}, {3, 4}]
    sums = [sum([5, 1, 8, 3, 7, 2, 6, 4][one[rank]] for one in rounds) for rank in (0, 1)]
    assert sums == [18, 18]


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 8), st.data())
def test_everything_once(dp_size: int, m: int, data: st.DataObject) -> None:
    costs = data.draw(st.lists(st.integers(0, 100), min_size=m * dp_size, max_size=m * dp_size))
    rounds = rounds_of(costs, dp_size)
    assert [len(one) for one in rounds] == [dp_size] * m
    assert sorted(k for one in rounds for k in one) == list(range(m * dp_size))
    loads = [sum(costs[one[rank]] for one in rounds) for rank in range(dp_size)]
    assert max(loads) - min(loads) <= max(costs)
    if dp_size == 1:
        assert [costs[one[0]] for one in rounds] == [costs[k] for k in hill(costs)]
