"""Plans by windows: what plans of few structures are held to, and how they compare."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagnn.data import order
from megagnn.data.sampler import BudgetSampler


def sampler(num: int, dp_size: int = 1, dp_rank: int = 0, **options: Any) -> BudgetSampler:
    rng = np.random.default_rng(num)
    atoms = rng.integers(1, 30, num)
    defaults: dict[str, Any] = {"max_atoms": 100, "max_edges": 1200, "seed": 5}
    edges = atoms * rng.integers(0, 20, num)
    return BudgetSampler(atoms, edges, dp_size=dp_size, dp_rank=dp_rank, **{**defaults, **options})


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("WHOLE", 20), ("BLOCK", 8), ("WINDOW", 64)):
        monkeypatch.setattr(order, name, size)


OPTIONS = (
    st.integers(21, 400),
    st.integers(1, 7),
    st.integers(1, 3),
    st.sampled_from([None, 1, 4]),
    st.booleans(),
)


@settings(deadline=None, max_examples=30)
@given(*OPTIONS)
def test_every_structure_once_within_budget(
    num: int, dp_size: int, per_step: int, most: int | None, shuffle: bool
) -> None:
    made = sampler(num, dp_size, per_step=per_step, max_structures=most, shuffle=shuffle)
    plan = made.plan(2)
    assert len(plan) % per_step == 0
    drawn = np.concatenate(list(made.order.windows(2)))
    start = 0
    for k in range(0, len(plan), per_step):  # steps are runs of the order
        together = np.concatenate([batch for entry in plan[k : k + per_step] for batch in entry])
        assert sorted(together) == sorted(drawn[start : start + len(together)])
        start += len(together)
    assert start == num
    for batch in (batch for entry in plan for batch in entry):
        assert made.num_atoms[batch].sum() <= 100
        assert made.num_edges[batch].sum() <= 1200
        assert most is None or len(batch) <= most


@settings(deadline=None, max_examples=15)
@given(st.integers(21, 300), st.integers(1, 4), st.integers(1, 3), st.data())
def test_ranks_and_places_agree(num: int, dp_size: int, per_step: int, data: st.DataObject) -> None:
    whole = sampler(num, dp_size, per_step=per_step)
    plan = whole.plan(1)
    assert whole.num_batches(1) == len(plan)
    start = data.draw(st.integers(0, len(plan)))
    for rank in range(dp_size):
        own = list(sampler(num, dp_size, rank, per_step=per_step).batches_from(1, start))
        assert [b.tolist() for b in own] == [entry[rank].tolist() for entry in plan[start:]]
    taken = start // per_step * per_step
    seen = [int(k) for entry in plan[:taken] for batch in entry for k in batch]
    assert whole.num_structures(1, taken) == len(seen)
    rest = [int(k) for entry in whole.on_ranks(3).plan(1, len(seen)) for batch in entry for k in batch]
    assert sorted(seen + rest) == list(range(num))
    with pytest.raises(ValueError, match=f"the epoch has {len(plan)} steps"):
        list(whole.batches_from(1, len(plan) + 1))


def test_as_full_and_as_even_as_the_rule_for_few(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"max_atoms": 600, "max_edges": 6000}
    monkeypatch.setattr(order, "WINDOW", 2000)
    windowed = sampler(6000, 4, **options).plan(0)
    monkeypatch.setattr(order, "WHOLE", 10**6)
    whole = sampler(6000, 4, **options)
    assert len(windowed) <= 1.04 * len(whole.plan(0))
    cost = whole.num_atoms + whole.num_edges
    work = np.array([[cost[batch].sum() for batch in entry] for entry in windowed[:-1]])
    assert (work.max(1) / work.mean(1)).mean() < 1.02
    assert np.abs(work.mean() / work.mean(1) - 1).max() < 0.2, "no step is half empty"


def test_steps_without_room_are_divided() -> None:
    """Of structures of 6 for batches of 10 each batch takes one."""
    made = BudgetSampler(np.full(64, 6), np.zeros(64, int), max_atoms=10, max_edges=1, dp_size=4)
    assert [len(batch) for entry in made.plan(0) for batch in entry].count(1) == 64


def test_oversized_structures_alone() -> None:
    atoms = np.full(100, 5)
    atoms[::25] = 70
    made = BudgetSampler(atoms, np.zeros(100, int), max_atoms=60, max_edges=1, dp_size=2, oversized="alone")
    found = [batch for entry in made.plan(0) for batch in entry]
    assert sorted(np.concatenate(found)) == list(range(100))
    assert sum(atoms[batch].sum() == 70 and len(batch) == 1 for batch in found) == made.num_oversized == 4
    assert all(atoms[batch].sum() <= 60 for batch in found if len(batch) > 1)
