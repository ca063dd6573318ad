"""Reference energies: the least squares solution, source by source, weighted by 1 / atoms."""

import numpy as np
import pytest

from megagnn.data.references import fit_references

TRUE = {0: {1: -13.6, 6: -1030.0, 8: -2040.0}, 2: {1: -0.5, 6: -3.0, 8: 4.0}}


def data(noise=0.0, num_structures=60):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 12, num_structures)
    numbers = rng.choice([1, 6, 8], lengths.sum())
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    sources = rng.choice([0, 2], num_structures)
    energies = np.array(
        [
            sum(TRUE[s][z] for z in numbers[a:b])
            for s, a, b in zip(sources, offsets, offsets[1:], strict=False)
        ]
    )
    return numbers, offsets, energies + noise * lengths * rng.normal(size=num_structures), sources


def test_recovers_the_references_of_each_source():
    result = fit_references(*data(), num_sources=3)
    assert result.shape == (3, 119)
    assert result.dtype == np.float64
    for source, energies in TRUE.items():
        for z, energy in energies.items():
            assert result[source, z] == pytest.approx(energy, abs=1e-9)
    assert np.count_nonzero(result) == 6  # nothing for absent elements or the empty source


def test_equals_the_weighted_normal_equations():
    numbers, offsets, energies, sources = data(noise=0.3)
    result = fit_references(numbers, offsets, energies, sources, 3)
    for source in (0, 2):
        rows = np.flatnonzero(sources == source)
        counts = np.array(
            [[np.sum(numbers[offsets[r] : offsets[r + 1]] == z) for z in (1, 6, 8)] for r in rows]
        )
        weight = 1.0 / counts.sum(axis=1)
        weighted = counts * weight[:, None]
        expected = np.linalg.solve(weighted.T @ weighted, weighted.T @ (energies[rows] * weight))
        assert np.allclose(result[source, [1, 6, 8]], expected, rtol=1e-9)
        plain = np.linalg.solve(counts.T @ counts, counts.T @ energies[rows])
        assert np.abs(plain - expected).max() > 1e-3  # the weights matter


def test_constant_composition_gives_the_solution_of_smallest_norm():
    result = fit_references(
        np.array([1, 1, 8] * 4), np.arange(0, 13, 3), np.full(4, -10.0), np.zeros(4, int), 1
    )
    assert result[0, [1, 8]] == pytest.approx([-4.0, -2.0])


def test_no_structures():
    empty = np.zeros(0, dtype=int)
    assert not fit_references(empty, np.zeros(1, dtype=int), np.zeros(0), empty, 2).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"energies": np.array([1.0, np.nan])}, "finite"),
        ({"energies": np.array([1.0])}, "2 structures and 3 atoms, but there are 1 energies"),
        ({"sources": np.array([0, 3])}, r"sources must lie in 0\.\.1"),
        ({"offsets": np.array([0, 3, 3])}, "without atoms"),
    ],
)
def test_refuses(change, message):
    arguments = {
        "atomic_numbers": np.array([1, 1, 8]),
        "offsets": np.array([0, 2, 3]),
        "energies": np.array([1.0, 2.0]),
        "sources": np.array([0, 1]),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        fit_references(**arguments, num_sources=2)
