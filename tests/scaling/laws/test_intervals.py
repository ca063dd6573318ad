"""Intervals hold the truth as often as they say. `--full` runs tools/law_coverage.py, 200 trials."""

import law_coverage
import numpy as np
import pytest

from megagnn.scaling.laws.fitting import fit_law
from megagnn.scaling.laws.forms import POWER, SATURATING
from megagnn.scaling.laws.intervals import HARD, Bootstrap, Interval, _crossing

# 84 to 96 % in 200 trials is the rule; with 20, at 90 % true coverage, fewer than 14 come once in 400 times.
FEW_TRIALS, AT_LEAST = 20, 14


def shares(number: int, trials: int, replicates: int = 199) -> dict[str, float]:
    table = law_coverage.coverage(law_coverage.CASES[number], trials, replicates)
    return {name: share for name, (share, _, _) in table.items()}


@pytest.mark.parametrize("number", [2, 7])
def test_intervals_hold_the_truth(number: int) -> None:
    for name, share in shares(number, FEW_TRIALS).items():
        assert share * FEW_TRIALS >= AT_LEAST, name


def test_the_test_sees_intervals_that_are_too_narrow() -> None:
    """Ends that take no account of the few points: a third as far from the estimate as they should be."""
    held = 0
    for trial in range(FEW_TRIALS):
        rng = np.random.default_rng((0, trial))
        interval, truth = law_coverage.intervals(law_coverage.CASES[2], rng, 199)["a"]
        low, high = (interval.value + (end - interval.value) / 3 for end in (interval.low, interval.high))
        held += Interval(interval.value, low, high, 0.9).covers(truth)
    assert held < AT_LEAST


@pytest.mark.parametrize("number", range(len(law_coverage.CASES)))
def test_coverage_of_every_case(number: int, request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--full"):
        pytest.skip("minutes: with --full")
    for name, share in shares(number, 200, replicates=399).items():
        assert 0.84 <= share <= 0.96, f"{law_coverage.CASES[number].name}: {name} {share}"


def bootstrap(noise: float = 0.03, law: object = SATURATING, seeds: int = 2) -> Bootstrap:
    sizes = np.repeat(np.geomspace(1e4, 1e7, 8), seeds)
    rng = np.random.default_rng(5)
    losses = (0.02 + 2 * sizes**-0.35) * np.exp(noise * rng.normal(size=len(sizes)))
    return Bootstrap(fit_law(law, sizes, losses), 199)  # type: ignore[arg-type]


def test_levels_and_noise_order_the_widths() -> None:
    def width(interval: Interval) -> float:
        return interval.high - interval.low

    a = bootstrap()
    half, most = a.parameter("a", 0.5), a.parameter("a", 0.95)
    assert most.low < half.low < half.value < half.high < most.high
    assert width(bootstrap(0.01).parameter("a")) < width(a.parameter("a"))
    # a new run scatters, the law's own value at the same place does not
    x_1V = a.fit.coordinates((4e7,))
    law = a.interval(lambda theta: SATURATING.log_loss(theta, x_1V)[:, 0])
    run = a.prediction((4e7,))
    assert np.log(run.high / run.low) > width(law)


def test_the_same_seed_gives_the_same_interval() -> None:
    assert bootstrap().parameter("a") == bootstrap().parameter("a")


def test_a_constant_is_never_negative_and_may_be_zero() -> None:
    """Runs of a pure power: the interval of L_inf begins at 0."""
    sizes = np.repeat(np.geomspace(1e4, 1e7, 8), 2)
    rng = np.random.default_rng(6)
    losses = 2 * sizes**-0.35 * np.exp(0.03 * rng.normal(size=len(sizes)))
    assert Bootstrap(fit_law(SATURATING, sizes, losses), 199).parameter("L_inf").low == 0


def test_points_with_unequal_seeds() -> None:
    sizes = np.repeat(np.geomspace(1e4, 1e7, 8), [1, 2, 3, 1, 2, 3, 1, 2])
    rng = np.random.default_rng(7)
    losses = 2 * sizes**-0.35 * np.exp(0.03 * rng.normal(size=len(sizes)))
    made = Bootstrap(fit_law(POWER, sizes, losses), 199)
    np.testing.assert_array_equal(np.isfinite(made.y_BGS).sum(-1)[0], [1, 2, 3, 1, 2, 3, 1, 2])
    assert made.parameter("a").covers(0.35)


def test_what_has_no_interval() -> None:
    with pytest.raises(ValueError, match=r"has intervals of \['L_inf', 'a'\], got 'A'"):
        bootstrap().parameter("A")


def test_where_a_falling_curve_takes_a_value() -> None:
    grid, curve = np.array([0.0, 1.0, 2.0]), np.array([2.0, 0.0, -2.0])
    assert [_crossing(grid, curve, 1.0, -np.inf, side) for side in (-1, 1)] == [0.5, 0.5]
    assert _crossing(grid, curve, 3.0, -np.inf, -1) == -np.inf
    assert _crossing(grid, curve, -3.0, np.inf, 1) == np.inf
    assert _crossing(grid, curve, -3.0, -np.inf, -1) == 2.0
    assert _crossing(grid, curve, 3.0, np.inf, 1) == 0.0


def unequal() -> Bootstrap:
    """Points of one, two and three seeds."""
    sizes = np.repeat(np.geomspace(1e4, 1e7, 8), [1, 2, 3, 1, 2, 3, 1, 2])
    rng = np.random.default_rng(8)
    return Bootstrap(
        fit_law(POWER, sizes, 2 * sizes**-0.35 * np.exp(0.03 * rng.normal(size=len(sizes)))), 199
    )


def test_errors_that_are_drawn() -> None:
    """Mean residuals times sqrt(seeds) over sqrt(1 - leverage), centred, with the variance of the fit."""
    made = unequal()
    fit, seeds = made.fit, np.array([1.0, 2, 3, 1, 2, 3, 1, 2])
    residual = fit.residuals()
    mean = np.nanmean(residual, 1)
    j = np.stack([np.ones(8), -fit.x_GV[:, 0]], 1) * np.sqrt(seeds)[:, None]
    leverage = np.diag(j @ np.linalg.inv(j.T @ j) @ j.T)
    points = mean * np.sqrt(seeds) / np.sqrt(1 - leverage)
    points -= points.mean()
    points *= np.sqrt((seeds * mean**2).sum() / 6 / (points**2).mean())  # eight points, two parameters
    np.testing.assert_allclose(made.point_errors, points, rtol=1e-9)
    # a point of one seed repeats it, one of two repeats the first
    np.testing.assert_allclose(made.seed_errors[0], 0.0, atol=1e-15)
    np.testing.assert_allclose(made.seed_errors[1], (residual[1] - mean[1])[[0, 1, 0]])
    np.testing.assert_allclose(made.seed_errors[2], residual[2] - mean[2])


def test_what_is_drawn_from_them() -> None:
    """The mean of a drawn point's seeds is a point's error over sqrt(seeds); a new run adds a seed's."""
    made, seeds = unequal(), np.array([1.0, 2, 3, 1, 2, 3, 1, 2])
    drawn = made.y_BGS - made.fit.law.log_loss(made.fit.theta[None], made.fit.x_GV)[0][:, None]
    errors = np.nanmean(drawn, 2) * np.sqrt(seeds)
    assert np.abs(errors[..., None] - made.point_errors).min(-1).max() < 1e-12
    sums = made.point_errors[:, None, None] / np.sqrt(seeds.mean()) + made.seed_errors
    sums = np.stack([sums[k, k] for k in range(8)]).ravel()  # of one point, both
    assert np.abs(made.new_run_B[:, None] - sums).min(1).max() < 1e-12


def test_replicates_at_a_bound() -> None:
    made = bootstrap()
    made.theta_BP = np.array([[0.1, 0.0, 0.3], [0.0, 0.0, 0.3], [0.1, 0.0, 0.02], [0.1, 0.0, 0.3]])
    assert made._at_bound() == 0.5


def test_ends_are_where_the_test_rejects() -> None:
    """R at both ends is the quantile of the replicates' R, to what the grid resolves."""
    made = bootstrap()
    made.theta_BP = np.maximum(made.theta_BP, 1e-9)  # none counts as at its bound

    def exponent(theta: np.ndarray) -> np.ndarray:
        return theta[:, 2]

    found = made.interval(exponent, 0.8)
    roots = made._signed_root(exponent, np.full(199, found.value), made.y_BGS, HARD)
    ends = made._signed_root(exponent, np.array([found.low, found.high]), None, HARD)
    np.testing.assert_allclose(ends, np.quantile(roots, [0.9, 0.1]), atol=0.02)
