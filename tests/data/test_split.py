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
    groups = [f"{s} {g}" for s, g in zip(sources, groups, strict=True)]  # no group is shared
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
    split = split_groups(groups, ["A"] * 12, (0.5, 0.25, 0.25), seed=3)
    assert split.tolist() == [1, 2, 0, 2, 1, 0, 0, 0, 2, 1, 0, 0]


def test_the_seed_matters_and_the_name_of_a_source_does_not():
    groups = [f"g{k}" for k in range(100)]
    first = split_groups(groups, ["A"] * 100, seed=0)
    assert not np.array_equal(first, split_groups(groups, ["A"] * 100, seed=1))
    assert np.array_equal(first, split_groups(groups, ["B"] * 100, seed=0))
    assert np.bincount(first).tolist() == [80, 10, 10]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000))
def test_one_name_is_one_group_over_all_sources(seed):
    rng = np.random.default_rng(seed)
    groups = [f"g{g}" for g in rng.integers(0, 60, 600)]
    sources = [f"source {s}" for s in rng.integers(0, 3, 600)]
    split = split_groups(groups, sources, seed=seed)
    side = {}
    for group, k in zip(groups, split.tolist(), strict=True):
        assert side.setdefault(group, k) == k
    for source in set(sources):
        shares = np.bincount(split[np.array(sources) == source], minlength=3) / sources.count(source)
        assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.05)


def test_sources_that_share_nothing_do_not_disturb_each_other():
    groups, others = [f"g{k % 17}" for k in range(100)], [f"h{k % 4}" for k in range(30)]
    alone = split_groups(groups, ["A"] * 100)
    together = split_groups(groups + others, ["A"] * 100 + ["B"] * 30)
    assert np.array_equal(together[:100], alone)


def test_pinned_groups_stay_and_count():
    groups = [f"g{k}" for k in range(20)]
    split = split_groups(groups, ["A"] * 20, (0.8, 0.0, 0.2), pinned={f"g{k}": 2 for k in range(4)})
    assert split.tolist() == [2] * 4 + [0] * 16


def test_a_source_that_wants_no_test_part_shares_one_only_where_another_needs_it():
    groups, sources = [f"g{k}" for k in range(20)] * 2, ["A"] * 20 + ["B"] * 20
    groups[30:] = [f"own {k}" for k in range(10)]
    split = split_groups(groups, sources, fractions_of={"A": (0.9, 0.1, 0.0)})
    assert set(split[:20]) == {0, 1}
    assert set(split[20:]) == {0, 1, 2}
    split = split_groups(groups[:20] * 2, sources, fractions_of={"A": (0.9, 0.1, 0.0)})
    assert np.array_equal(split[:20], split[20:])  # B has no group of its own, so A follows it to test
    assert 2 in split


def test_shared_groups_that_cannot_fill_a_split_tell_the_way_out():
    # Each pair of sources shares a group: with two groups each, three sources cannot all have two sides.
    groups, sources = ["x", "y", "y", "z", "x", "z"], ["A", "A", "B", "B", "C", "C"]
    with pytest.raises(ValueError, match=r"source '.' gets no structure in .*shared.*--test.*--group-by"):
        split_groups(groups, sources, (0.5, 0.5, 0.0))


@pytest.mark.parametrize("fractions", [(0.8, 0.2), (0.9, 0.2, -0.1), (0.5, 0.1, 0.1), (0.0, 0.0, 0.0)])
def test_refuses_fractions(fractions):
    with pytest.raises(ValueError, match=r"split fractions are three numbers.*0\.8,0\.1,0\.1"):
        split_groups(["a", "b", "c"], ["A"] * 3, fractions)


def test_one_group_tells_the_way_out():
    with pytest.raises(ValueError, match=r"source 'A' has 1 group.*--test.*--group-by"):
        split_groups(["a"] * 50, ["A"] * 50)


def test_frames_that_are_groups_already_are_told_another_way():
    with pytest.raises(
        ValueError, match=r"has 2 group.*each frame is a group already.*--valid FILE"
    ) as error:
        split_groups(["frame a", "frame b"], ["A"] * 2)
    assert "--group-by frame" not in str(error.value)
    with pytest.raises(ValueError, match=r"has 1 group.*--valid FILE") as error:
        split_groups(["a"], ["A"])
    assert "--group-by frame" not in str(error.value)  # a single structure


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="equally long"):
        split_groups(["a"], ["A", "B"])
