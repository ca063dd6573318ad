"""Reference energies: the least squares solution, source by source, weighted by 1 / atoms."""

from itertools import pairwise

import numpy as np
import pytest

from megagnn.data import references
from megagnn.data.references import ReferenceFit

TRUE = {0: {1: -13.6, 6: -1030.0, 8: -2040.0}, 2: {1: -0.5, 6: -3.0, 8: 4.0}}


def fitted(atomic_numbers, offsets, energies, sources, num_sources, **known) -> ReferenceFit:
    """The fit with the elements that the structures hold, unless others are given."""
    if "elements" not in known:
        of_atoms = np.repeat(sources, np.resize(np.diff(offsets), len(sources)))[: len(atomic_numbers)]
        seen = [atomic_numbers[: len(of_atoms)][of_atoms == k] for k in range(num_sources)]
        known["elements"] = [np.unique(numbers) for numbers in seen]
    return references.fit_references(atomic_numbers, offsets, energies, sources, num_sources, **known)


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
    result = fitted(*data(), num_sources=3).energies
    assert result.shape == (3, 119)
    assert result.dtype == np.float64
    for source, energies in TRUE.items():
        for z, energy in energies.items():
            assert result[source, z] == pytest.approx(energy, abs=1e-9)
    assert np.count_nonzero(result) == 6  # nothing for absent elements or the empty source


def test_equals_the_weighted_normal_equations():
    numbers, offsets, energies, sources = data(noise=0.3)
    result = fitted(numbers, offsets, energies, sources, 3).energies
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


def water(energy, num_structures=4):
    numbers = np.array([1, 1, 8] * num_structures)
    offsets = np.arange(0, 3 * num_structures + 1, 3)
    return numbers, offsets, np.full(num_structures, energy), np.zeros(num_structures, int)


@pytest.mark.parametrize(
    ("energy", "hydrogen", "oxygen", "tolerance"),
    [
        (-2079.0, -13.6, -2042.0, 10.0),  # all electrons
        (-468.0, -13.0, -430.0, 20.0),  # valence electrons
        (-14.2, -14.2 / 3, -14.2 / 3, 1e-9),  # relative to atoms
    ],
)
def test_constant_composition_takes_references_of_usual_size(energy, hydrogen, oxygen, tolerance):
    fit = fitted(*water(energy), 1)
    assert 2 * fit.energies[0, 1] + fit.energies[0, 8] == pytest.approx(energy, abs=1e-8)
    assert fit.energies[0, [1, 8]] == pytest.approx([hydrogen, oxygen], abs=tolerance)
    (direction,) = fit.unspanned[0]
    assert np.linalg.norm(direction) == pytest.approx(1.0)
    assert direction @ np.bincount([1, 1, 8], minlength=119) == pytest.approx(0.0, abs=1e-12)
    assert abs(direction @ np.bincount([1, 1], minlength=119)) > 0.5  # hydrogen is not determined


def test_an_element_without_energy_is_open_and_takes_a_usual_value():
    fit = fitted(*water(-2079.0), 1, elements=[np.array([1, 6, 8])])
    assert len(fit.unspanned[0]) == 2
    assert fit.energies[0, 6] == pytest.approx(-1029.0, rel=0.02)


def test_known_references_stay_and_determine_the_others():
    fixed = np.full((1, 119), np.nan)
    fixed[0, 1] = -13.6
    fit = fitted(*water(-2079.0), 1, fixed=fixed)
    assert fit.energies[0, 1] == -13.6
    assert fit.energies[0, 8] == pytest.approx(-2079.0 + 27.2, abs=1e-9)
    assert len(fit.unspanned[0]) == 0


def test_determined_references_are_those_of_plain_least_squares():
    numbers, offsets, energies, sources = data(noise=0.3)
    fit = fitted(numbers, offsets, energies, sources, 3)
    rows = np.flatnonzero(sources == 2)
    counts = np.array([np.bincount(numbers[offsets[r] : offsets[r + 1]], minlength=9) for r in rows])
    shares = counts[:, [1, 6, 8]] / counts.sum(axis=1, keepdims=True)
    expected = np.linalg.lstsq(shares, energies[rows] / counts.sum(axis=1), rcond=None)[0]
    assert np.array_equal(fit.energies[2, [1, 6, 8]], expected)
    assert [len(rows) for rows in fit.unspanned] == [0, 0, 0]


@pytest.mark.parametrize("elements", [(1, 6, 8), (1, 6, 8, 9)])
def test_blocks_give_the_same_as_all_at_once(monkeypatch, elements):
    """Well determined, and with fluorine always beside two hydrogen atoms."""
    numbers, offsets, energies, sources = data(noise=0.3, num_structures=500)
    if 9 in elements:
        groups = np.split(
            numbers[numbers != 1], np.cumsum([np.sum(numbers[a:b] != 1) for a, b in pairwise(offsets)])[:-1]
        )
        groups = [np.concatenate([group, [6], [9, 1, 1] * (k % 4)]) for k, group in enumerate(groups)]
        numbers, offsets = np.concatenate(groups).astype(int), np.cumsum([0, *map(len, groups)])
    whole = fitted(numbers, offsets, energies, sources, 3)
    monkeypatch.setattr(references, "ROWS_AT_ONCE", 16)
    blocks = fitted(numbers, offsets, energies, sources, 3)
    assert np.allclose(blocks.energies, whole.energies, rtol=0, atol=1e-9)
    for one, other in zip(blocks.unspanned, whole.unspanned, strict=True):
        assert one.shape == other.shape
        assert np.allclose(one.T @ one, other.T @ other, atol=1e-12)  # the same directions
    assert len(blocks.unspanned[0]) == len(elements) - 3


def test_no_structures():
    empty = np.zeros(0, dtype=int)
    assert not fitted(empty, np.zeros(1, dtype=int), np.zeros(0), empty, 2).energies.any()


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
        fitted(**arguments, num_sources=2)


def test_sources_with_little_or_nothing():
    """One structure of one element fixes it; a source without energies leaves its elements open."""
    one = fitted(np.array([1, 1]), np.array([0, 2]), np.array([-4.0]), np.array([0]), 1)
    assert one.energies[0, 1] == pytest.approx(-2.0)
    assert one.unspanned[0].shape == (0, 119)
    numbers, offsets, energies, sources = data()
    elements = [np.array([1, 6, 8]), np.array([1, 8]), np.array([1, 6, 8])]
    fit = fitted(numbers, offsets, energies, sources, 3, elements=elements)
    assert not fit.energies[1].any()
    assert np.argwhere(fit.unspanned[1]).tolist() == [[0, 1], [1, 8]]


def test_one_structure_of_two_elements_leaves_one_direction():
    fit = fitted(*water(-14.2, num_structures=1), 1)
    (direction,) = fit.unspanned[0]
    assert direction[[1, 8]] @ [2, 1] == pytest.approx(0, abs=1e-12)


def test_sums_over_structures_begin_at_zero():
    equations = references._Equations(2)
    equations.add(np.array([[0.5, 0.5], [1.0, 0.0]]), np.array([-3.0, -1.0]))
    equations.add(np.array([[0.0, 1.0]]), np.array([-2.0]))
    assert equations.num_rows == 3
    assert equations.sum_energies == -6.0
    assert equations.sum_shares.tolist() == [1.5, 1.5]


def test_atoms_beyond_the_last_structure_are_refused():
    numbers, offsets, energies, sources = data()
    for wrong in (numbers[:-1], np.append(numbers, 1)):
        with pytest.raises(ValueError, match="offsets are of 60 structures"):
            fitted(wrong, offsets, energies, sources, 3)
