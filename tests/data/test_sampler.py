"""The sampler: budgets, balance, agreement of ranks, resume."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagnn.data.sampler import BudgetSampler, hill, rounds_of


def sizes(num_structures, seed=0):
    rng = np.random.default_rng(seed)
    atoms = rng.integers(1, 30, num_structures)
    return atoms, atoms * rng.integers(0, 20, num_structures)


def ranks(atoms, edges, dp_size, epoch=0, **options):
    defaults = {"max_atoms": 100, "max_edges": 1200, "seed": 5}
    return [
        BudgetSampler(atoms, edges, dp_size=dp_size, dp_rank=r, **{**defaults, **options}).batches(epoch)
        for r in range(dp_size)
    ]


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 120), st.integers(1, 7), st.integers(0, 10), st.booleans(), st.sampled_from([None, 1, 4])
)
def test_every_structure_once_within_budget(num_structures, dp_size, seed, shuffle, most):
    atoms, edges = sizes(num_structures, seed)
    plans = ranks(atoms, edges, dp_size, shuffle=shuffle, max_structures=most)
    assert len({len(plan) for plan in plans}) == 1
    chosen = [batch for plan in plans for batch in plan]
    assert sorted(np.concatenate([*chosen, np.zeros(0, dtype=int)]).tolist()) == list(range(num_structures))
    for batch in chosen:
        assert batch.dtype == np.int64
        assert atoms[batch].sum() <= 100
        assert edges[batch].sum() <= 1200
        assert most is None or len(batch) <= most
    for step in zip(*plans, strict=True):
        assert any(len(batch) for batch in step)


def test_balance_over_ranks():
    atoms, edges = sizes(3000)
    options = {"max_atoms": 600, "max_edges": 6000}
    costs = np.array(
        [[(atoms[b] + edges[b]).sum() for b in plan] for plan in ranks(atoms, edges, 4, **options)]
    )
    imbalance = (costs.max(axis=0) / costs.mean(axis=0))[:-1]
    assert imbalance.mean() < 1.02
    # Dealing the same structures out in turn, as a plain distributed sampler does, is several times worse.
    order = np.random.default_rng(0).permutation(3000)[:2800].reshape(-1, 70, 4)
    plain = (atoms + edges)[order].sum(axis=1)
    assert (plain.max(axis=1) / plain.mean(axis=1)).mean() > 1.05


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 120), st.integers(1, 4), st.integers(1, 5), st.integers(0, 10))
def test_several_batches_to_a_step(num_structures, dp_size, per_step, seed):
    """Steps are prefixes of the order, of as many batches on every rank, each within its budget."""
    atoms, edges = sizes(num_structures, seed)
    plans = ranks(atoms, edges, dp_size, per_step=per_step)
    assert len({len(plan) for plan in plans}) == 1
    assert len(plans[0]) % per_step == 0
    order = np.random.default_rng((5, 0)).permutation(num_structures)
    start = 0
    for k in range(0, len(plans[0]), per_step):
        step = [batch for plan in plans for batch in plan[k : k + per_step]]
        assert all(atoms[batch].sum() <= 100 and edges[batch].sum() <= 1200 for batch in step)
        together = np.concatenate(step)
        assert sorted(together) == sorted(order[start : start + len(together)])
        start += len(together)
    assert start == num_structures


def test_balance_over_the_batches_of_a_step():
    atoms, edges = sizes(3000)
    options = {"max_atoms": 150, "max_edges": 1500}

    def spread(per_step):
        """Largest over mean cost of the 2 x 8 batches of each step but the last."""
        plans = ranks(atoms, edges, 2, per_step=per_step, **options)
        costs = np.array([[(atoms[b] + edges[b]).sum() for b in plan] for plan in plans])
        whole = costs[:, : (costs.shape[1] - 1) // 8 * 8].reshape(2, -1, 8)
        return costs, whole, (whole.max((0, 2)) / whole.mean((0, 2))).mean()

    costs, whole, even = spread(8)
    assert even < 1.02 < 1.08 < spread(1)[2]
    assert abs(costs[0].sum() / costs[1].sum() - 1) < 0.002
    # like beside like, and up and down a hill
    assert np.abs(whole[0] - whole[1]).mean() < 0.01 * whole.mean()
    for step in whole.sum(0):
        top = step.argmax()
        assert (np.diff(step[: top + 1]) >= 0).all()
        assert (np.diff(step[top:]) <= 0).all()


def test_several_batches_are_filled_as_one_is():
    atoms, edges = sizes(3000)
    plans = ranks(atoms, edges, 2, max_atoms=600, max_edges=6000, per_step=4)
    fill = [max(atoms[b].sum() / 600, edges[b].sum() / 6000) for plan in plans for b in plan[:-4]]
    assert np.mean(fill) > 0.95


def test_batches_are_filled():
    atoms, edges = sizes(3000)
    for dp_size in (1, 4):
        plans = ranks(atoms, edges, dp_size, max_atoms=600, max_edges=6000)
        fill = [max(atoms[b].sum() / 600, edges[b].sum() / 6000) for plan in plans for b in plan[:-1]]
        assert np.mean(fill) > 0.95


def test_order_depends_on_seed_and_epoch_only():
    atoms, edges = sizes(200)
    first = ranks(atoms, edges, 2)
    assert all(np.array_equal(a, b) for a, b in zip(first[1], ranks(atoms, edges, 2)[1], strict=True))
    for change in ({"epoch": 1}, {"seed": 6}):
        other = ranks(atoms, edges, 2, **change)
        assert not np.array_equal(np.concatenate(first[0]), np.concatenate(other[0]))


def test_steps_are_the_same_set_whatever_the_rank():
    # The whole order is drawn before it is dealt, so the union over ranks follows one permutation.
    atoms, edges = sizes(200)
    order = np.random.default_rng((5, 0)).permutation(200)
    start = 0
    for step in zip(*ranks(atoms, edges, 3), strict=True):
        together = np.concatenate(step)
        assert set(together) == set(order[start : start + len(together)])
        start += len(together)


@pytest.mark.parametrize("per_step", [1, 4])
@pytest.mark.parametrize("dp_size", [1, 3])
def test_resume_is_exact(dp_size, per_step):
    atoms, edges = sizes(150)
    make = lambda: BudgetSampler(  # noqa: E731
        atoms,
        edges,
        max_atoms=60,
        max_edges=900,
        dp_size=dp_size,
        dp_rank=dp_size - 1,
        seed=3,
        per_step=per_step,
    )
    whole = [batch for epoch in range(3) for batch in make().batches(epoch)]
    steps = len(make().batches(0))
    resumed = make()
    resumed.check_position(0, 4)
    got = resumed.batches(0)[4:]
    assert len(got) == steps - 4
    for epoch in (1, 2):
        got += resumed.batches(epoch)
    assert all(np.array_equal(a, b) for a, b in zip(whole[4:], got, strict=True))


@pytest.mark.parametrize("limited", ["num_atoms", "num_edges"])
def test_budget_holds_on_each_rank_and_not_only_on_average(limited):
    # Three structures of 6 fit two ranks of 10 together, but no rank has room for two of them.
    counts = {"num_atoms": np.ones(3, int), "num_edges": np.ones(3, int), limited: np.full(3, 6)}
    samplers = [BudgetSampler(**counts, max_atoms=10, max_edges=10, dp_size=2, dp_rank=r) for r in (0, 1)]
    assert sorted(len(batch) for s in samplers for batch in s.batches(0)) == [0, 1, 1, 1]


def test_evaluation_order_is_that_of_the_data():
    atoms, edges = sizes(100)
    (plan,) = ranks(atoms, edges, 1, shuffle=False)
    assert np.concatenate(plan).tolist() == list(range(100))


def test_last_step_may_leave_ranks_without_work():
    plans = ranks(np.ones(1, dtype=int), np.zeros(1, dtype=int), 3)
    assert sorted(len(plan[0]) for plan in plans) == [0, 0, 1]


@pytest.mark.parametrize(("num_atoms", "num_edges"), [(101, 5), (5, 1201)])
def test_refuses_a_structure_over_budget(num_atoms, num_edges):
    atoms, edges = np.array([3, num_atoms, 4, num_atoms]), np.array([3, num_edges, 4, num_edges])
    message = (
        f"structure 1 and 1 more: {num_atoms} atoms and {num_edges} edges exceed .*100 atoms and 1200 edges"
    )
    with pytest.raises(ValueError, match=f"{message}; raise the budget to at least {atoms.max()} atoms"):
        ranks(atoms, edges, 2)


def test_oversized_structures_come_alone():
    atoms = np.array([3, 150, 4, 5, 2000, 6])
    options = {"shuffle": False, "oversized": "alone"}
    (plan,) = ranks(atoms, atoms, 1, **options)
    assert [b.tolist() for b in plan] == [[0], [1], [2, 3], [4], [5]]
    two = ranks(atoms, atoms, 2, **options)
    assert sorted(k for plan in two for b in plan for k in b) == list(range(6))
    assert all(len(b) == 1 for plan in two for b in plan if atoms[b].sum() > 100)
    with pytest.raises(ValueError, match=r'data\.oversized = "alone"'):
        ranks(atoms, atoms, 1)


def test_a_structure_that_just_fits_passes():
    assert [b.tolist() for b in ranks(np.array([100, 1]), np.array([1200, 0]), 1, shuffle=False)[0]] == [
        [0],
        [1],
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dp_rank": 2, "dp_size": 2}, "dp_rank"),
        ({"max_structures": 0}, "max_structures"),
        ({"per_step": 0}, "a step needs at least 1 micro-batch, got 0"),
        ({"num_edges": np.zeros(4, int)}, "num_atoms and num_edges"),
    ],
)
def test_refuses_arguments(options, message):
    arguments = {"num_atoms": np.ones(3, int), "num_edges": np.ones(3, int), "max_atoms": 9, "max_edges": 9}
    with pytest.raises(ValueError, match=message):
        BudgetSampler(**{**arguments, **options})


def test_refuses_a_position_beyond_the_epoch():
    sampler = BudgetSampler(np.ones(3, int), np.ones(3, int), max_atoms=1, max_edges=9)
    sampler.check_position(0, 0)
    sampler.check_position(2, 3)
    for step in (4, -1):
        with pytest.raises(ValueError, match="the epoch has 3 steps; was the run started with other data"):
            sampler.check_position(0, step)
    with pytest.raises(ValueError, match="epochs count from 0"):
        sampler.check_position(-1, 0)


@pytest.mark.parametrize(("atoms", "edges"), [(1, 0), (0, 12)])
def test_a_step_takes_what_fits_and_no_less(atoms, edges):
    """300 atoms for batches of 100, or 300 x 12 edges for batches of 1200."""
    (plan,) = ranks(np.full(300, atoms), np.full(300, edges), 1)
    assert [len(batch) for batch in plan] == [100, 100, 100]


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
