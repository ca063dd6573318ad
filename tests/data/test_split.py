"""Splits keep groups whole and aim at the fractions."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagnn.data.split import split_groups

LABELS = st.lists(st.tuples(st.sampled_from("AB"), st.integers(0, 30)), min_size=1, max_size=150)


@settings(deadline=None, max_examples=60)
@given(LABELS, st.integers(0, 5), st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.5, 0.0), (1.0, 0.0, 0.0)]))
def test_groups_are_whole_and_fractions_near(labels, seed, fractions):
    sources, groups = [s for s, _ in labels], [f"g{g}" for _, g in labels]
    wanted = sum(f > 0 for f in fractions)
    per_source = {s: Counter(g for t, g in zip(sources, groups, strict=True) if t == s) for s in set(sources)}
    if any(len(sizes) < wanted for sizes in per_source.values()):
        with pytest.raises(ValueError, match="too few to fill"):
            split_groups(groups, sources, fractions, seed)
        return
    split = split_groups(groups, sources, fractions, seed)
    side = {}
    for s, g, k in zip(sources, groups, split.tolist(), strict=True):
        assert side.setdefault((s, g), k) == k
    for s, sizes in per_source.items():
        mine = np.bincount(split[np.array(sources) == s], minlength=3)
        for k, fraction in enumerate(fractions):
            assert (mine[k] > 0) == (fraction > 0)
            assert abs(mine[k] - fraction * sum(sizes.values())) <= 4 / 3 * max(sizes.values()) + 1


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 9), min_size=30, max_size=60), st.randoms(use_true_random=False))
def test_does_not_depend_on_the_order_of_structures(numbers, random):
    numbers += [10, 11, 12]
    groups = [f"g{n}" for n in numbers]
    first = dict(zip(groups, split_groups(groups, ["A"] * len(groups)).tolist(), strict=True))
    random.shuffle(groups)
    assert first == dict(zip(groups, split_groups(groups, ["A"] * len(groups)).tolist(), strict=True))


def test_same_result_in_every_process():
    # Written down from a run: Python's own hash would change it with every process.
    groups = [f"g{k}" for k in range(12)]
    assert split_groups(groups, ["A"] * 12, (0.5, 0.25, 0.25), seed=3).tolist() == [
        1,
        2,
        0,
        0,
        1,
        1,
        0,
        0,
        2,
        0,
        0,
        2,
    ]


def test_seed_and_source_matter():
    groups = [f"g{k}" for k in range(100)]
    first = split_groups(groups, ["A"] * 100, seed=0)
    assert not np.array_equal(first, split_groups(groups, ["A"] * 100, seed=1))
    assert not np.array_equal(first, split_groups(groups, ["B"] * 100, seed=0))
    assert np.bincount(first).tolist() == [80, 10, 10]


def test_equal_names_in_two_sources_are_two_groups():
    groups, sources = ["x", "y"] * 2, ["A", "A", "B", "B"]
    results = {tuple(split_groups(groups, sources, (0.5, 0.5, 0.0), seed)) for seed in range(20)}
    assert {(0, 1, 1, 0), (0, 1, 0, 1)} <= results


@pytest.mark.parametrize("fractions", [(0.8, 0.2), (0.9, 0.2, -0.1), (0.5, 0.1, 0.1), (0.0, 0.5, 0.5)])
def test_refuses_fractions(fractions):
    with pytest.raises(ValueError, match=r"split fractions are three numbers.*0\.8,0\.1,0\.1"):
        split_groups(["a", "b", "c"], ["A"] * 3, fractions)


def test_one_group_tells_the_way_out():
    with pytest.raises(ValueError, match=r"source 'A' has 1 group.*--test.*--group-by"):
        split_groups(["a"] * 50, ["A"] * 50)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="equally long"):
        split_groups(["a"], ["A", "B"])
