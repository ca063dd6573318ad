import numpy as np
import pytest

from megagnn.scaling.laws.forms import JOINT
from megagnn.scaling.laws.optimum import (
    ComputeLaw,
    fit_compute,
    frontier,
    iso_flop_law,
    iso_flops,
    mean_of_seeds,
    optimal_exponents,
    optimal_sizes,
)

LAW = {"L_inf": 0.01, "A": 2.0, "a": 0.4, "B": 5.0, "b": 0.3}


def loss(n: np.ndarray, d: np.ndarray) -> np.ndarray:
    return LAW["L_inf"] + LAW["A"] * n ** -LAW["a"] + LAW["B"] * d ** -LAW["b"]


@pytest.mark.parametrize(("p", "q"), [(1.0, 1.0), (0.9, 1.1)])
def test_closed_form_against_a_search(p: float, q: float) -> None:
    compute = ComputeLaw(6.0, p, q, 0.0)
    found = []
    for flops in (1e15, 1e16):
        n = np.geomspace(1e2, 1e14, 400_001)
        d = (flops / (compute.k * n**p)) ** (1 / q)
        best = int(loss(n, d).argmin())
        size, data, least = optimal_sizes(LAW, compute, flops)
        assert size == pytest.approx(n[best], rel=1e-3)
        assert data == pytest.approx(d[best], rel=1e-3)
        assert least == pytest.approx(loss(n, d).min(), rel=1e-9)
        found.append((size, data, least - LAW["L_inf"]))
    theta = np.array([[0.01, 0.7, 0.4, 1.6, 0.3]])
    slopes = np.log10(np.array(found[1]) / np.array(found[0]))
    exponents = {k: float(f(theta)[0]) for k, f in optimal_exponents(JOINT, p, q).items()}
    assert slopes == pytest.approx([exponents["N_opt"], exponents["D_opt"], -exponents["L - L_inf"]])


def test_compute_law() -> None:
    n, d = np.array([1e4, 1e5, 1e4, 1e6]), np.array([1e3, 1e3, 1e5, 1e4])
    found = fit_compute(n, d, 7 * n**0.95 * d)
    assert (found.k, found.p, found.q) == pytest.approx((7, 0.95, 1))
    with pytest.raises(ValueError, match="vary model size and data size independently"):
        fit_compute(n, 3 * n, 7 * n**2)


def test_iso_flop_minima() -> None:
    n = np.geomspace(1e4, 1e7, 7)
    flops = np.repeat([1e14, 1e16], 7)
    sizes = np.tile(n, 2)
    groups = iso_flops(sizes, flops, loss(sizes, flops / (6 * sizes)))
    assert [g.flops for g in groups] == pytest.approx([1e14, 1e16])
    for group in groups:
        size, _, _ = optimal_sizes(LAW, ComputeLaw(6.0, 1.0, 1.0, 0.0), group.flops)
        assert group.optimum is not None
        assert abs(np.log(group.optimum / size)) < 0.5  # a parabola over three decades is not the law


def test_iso_flop_exponent_and_its_interval() -> None:
    """Noisy parabolas whose minima go with C^0.6: 90 % intervals hold it in most of 80 trials."""
    n, budgets = np.geomspace(1e4, 1e7, 6), np.array([1e14, 1e15, 1e16])
    flops, sizes = np.repeat(budgets, 6), np.tile(n, 3)
    minima = 10**5.4 * (flops / 1e15) ** 0.6
    held, widths = 0, []
    for trial in range(80):
        noise = 0.03 * np.random.default_rng(trial).normal(size=len(sizes))
        losses = np.exp(0.05 * np.log(sizes / minima) ** 2 + noise)
        found = iso_flop_law(iso_flops(sizes, flops, losses), 0.9, 100, trial)
        assert found is not None
        assert found.num_minima == 3
        held += found.exponent.covers(0.6)
        widths.append(found.exponent.high - found.exponent.low)
    assert 64 <= held <= 79, held
    assert np.median(widths) < 0.2
    three = np.tile(n[::2], 2)
    exact = np.exp(0.05 * np.log(three / np.repeat([1e5, 4e5], 3)) ** 2)
    unknown = iso_flop_law(iso_flops(three, np.repeat([1e14, 1e15], 3), exact), 0.9, 100, 0)
    assert unknown is not None
    assert unknown.exponent.value == pytest.approx(np.log10(4))
    assert unknown.exponent.high == np.inf
    assert iso_flop_law(iso_flops(n, np.full(6, 1e14), n**-0.3), 0.9, 100, 0) is None


def test_no_minimum_is_extrapolated() -> None:
    n = np.geomspace(1e4, 1e6, 5)
    (falling,) = iso_flops(n, np.full(5, 1e15), n**-0.3)
    assert falling.optimum is None
    assert iso_flops(np.array([1e4, 1.01e4, 1e5]), np.full(3, 1e15), np.ones(3)) == []


def test_frontier_and_means() -> None:
    flops, losses = np.array([1.0, 2.0, 3.0, 3.0, 9.0]), np.array([5.0, 6.0, 4.0, 3.0, 3.5])
    assert frontier(flops, losses) == [0, 3]
    means = mean_of_seeds([("a",), ("b",), ("a",)], np.array([1.0, 2.0, 4.0]))
    np.testing.assert_allclose(means[0], [2.0, 2.0])


def test_exponents_for_compute_as_the_product_of_both() -> None:
    """Hoffmann et al. 2022, eq. 4: b/(a + b), a/(a + b), a b/(a + b)."""
    theta = np.array([[0.01, 0.7, 0.4, 1.6, 0.1]])
    found = {name: float(f(theta)[0]) for name, f in optimal_exponents(JOINT).items()}
    assert found == pytest.approx({"N_opt": 0.2, "D_opt": 0.8, "L - L_inf": 0.08})


def test_groups_are_as_wide_as_from_their_first_run() -> None:
    n = np.geomspace(1e4, 1e6, 5)
    (group,) = iso_flops(n, 1e15 * np.array([1.0, 1.1, 1.2, 1.3, 1.4]), np.ones(5))
    assert len(group.sizes) == 3, "1.3 and 1.4 lie further than 0.2 (in log) from 1"
    assert iso_flops(np.array([1e4, 1.3e4, 1.5e4]), np.full(3, 1e15), np.ones(3)) == [], "1.5 is as 1.3"


def test_where_a_parabola_has_its_minimum() -> None:
    """Six sizes 0.3 apart (in log), the lowest the second: at 0.25, found from the lowest run alone."""
    x = 0.3 * np.arange(6)
    (group,) = iso_flops(np.exp(x), np.full(6, 1e15), np.exp((x - 0.25) ** 2))
    assert group.optimum == pytest.approx(np.exp(0.25))
    np.testing.assert_allclose(group.coefficients, [1.0, 1.0, 0.25], atol=1e-9)
    wide = np.arange(8.0)
    (hill,) = iso_flops(np.exp(wide), np.full(8, 1e15), np.exp(-0.5 * (wide - 3.5) ** 2))
    assert hill.optimum is None, "a maximum"


def test_an_interval_of_level_zero_is_the_median() -> None:
    x = np.tile(np.arange(8.0), 2)
    noise = 0.05 * np.random.default_rng(3).normal(size=16)
    losses = np.exp(0.1 * (x - np.repeat([3.0, 4.0], 8)) ** 2 + noise)
    groups = iso_flops(np.exp(x), np.repeat([1e14, 1e15], 8), losses)
    none, most = (iso_flop_law(groups, level, 300, 0) for level in (0.0, 0.9))
    assert none is not None
    assert most is not None
    width = most.exponent.high - most.exponent.low
    assert none.exponent.high - none.exponent.low < 0.05 * width
    assert most.exponent.value - most.exponent.low == pytest.approx(width / 2, rel=0.15)
