import numpy as np
import pytest

from megagnn.data.labels.splits import hash_splits


def test_split_depends_on_the_group_alone() -> None:
    groups = [f"molecule/{'C' * n}" for n in range(1, 200)]
    splits = dict(zip(groups, hash_splits(groups), strict=True))
    other = [*groups[50:150][::-1], "slab/fcc111/2x2x3/Cu12"]
    for group, split in zip(other[:-1], hash_splits(other)[:-1], strict=True):
        assert splits[group] == split


def test_splits_never_change_between_versions() -> None:
    # Published test splits hang on these numbers: a change of hash is a change of every data set's splits.
    groups = [f"molecule/{'C' * n}" for n in range(1, 31)]
    found = "".join(map(str, hash_splits(groups)))
    assert found == EXPECTED


EXPECTED = "000100000000000020000000020010"


def test_fractions_are_met_on_average() -> None:
    splits = hash_splits((f"group {i}" for i in range(20_000)), (0.6, 0.3, 0.1))
    shares = np.bincount(splits, minlength=3) / 20_000
    np.testing.assert_allclose(shares, (0.6, 0.3, 0.1), atol=4 * np.sqrt(0.25 / 20_000))


@pytest.mark.parametrize("fractions", [(0.8, 0.1, 0.2), (1.1, -0.1, 0.0)])
def test_impossible_fractions(fractions: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="must be non-negative and sum to 1"):
        hash_splits(["a"], fractions)
