import math

import numpy as np
import pytest

from megagnn.scaling.laws.fitting import compare, fit_law, group_variance
from megagnn.scaling.laws.forms import BROKEN, JOINT, JOINT_POWER, POWER, SATURATING, Law
from megagnn.scaling.laws.robust import Design, Tie, _step, huber, minimise, objective

SIZES = np.geomspace(1e4, 1e7, 10)
LAWS = (POWER, SATURATING, BROKEN, JOINT, JOINT_POWER)


def broken(x: np.ndarray) -> np.ndarray:
    return 30 * x**-0.2 * (1 + (x / 3e5) ** (1 / 0.3)) ** (-0.25 * 0.3)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_derivatives(law: Law) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, law.num_variables))
    theta = np.abs(rng.normal(size=(3, len(law.parameters)))) + 0.1
    for p in range(theta.shape[1]):
        step = np.zeros_like(theta)
        step[:, p] = 1e-6
        numeric = (law.log_loss(theta + step, x) - law.log_loss(theta - step, x)) / 2e-6
        np.testing.assert_allclose(law.jacobian(theta, x)[..., p], numeric, rtol=1e-6, atol=1e-8)


def test_curves_without_noise() -> None:
    """The parameters come back; the forms were written down once more here."""
    assert fit_law(POWER, SIZES, 3 * SIZES**-0.26).parameters() == pytest.approx({"A": 3, "a": 0.26})
    found = fit_law(SATURATING, SIZES, 0.02 + 3 * SIZES**-0.4).parameters()
    assert found == pytest.approx({"L_inf": 0.02, "A": 3, "a": 0.4}, rel=1e-4)
    found = fit_law(BROKEN, SIZES, broken(SIZES)).parameters()
    assert found == pytest.approx({"A": 30, "a": 0.2, "d": 0.25, "x0": 3e5}, rel=1e-3)
    n, d = (axis.ravel() for axis in np.meshgrid(SIZES[::2], np.geomspace(1e3, 1e6, 4)))
    fit = fit_law(JOINT, np.stack([n, d], 1), 0.01 + 2 * n**-0.39 + 5 * d**-0.3)
    expected = {"L_inf": 0.01, "A": 2, "a": 0.39, "B": 5, "b": 0.3}
    assert fit.parameters() == pytest.approx(expected, rel=1e-3)
    assert fit.predict((1e8, 1e7)) == pytest.approx(0.01 + 2 * 1e8**-0.39 + 5 * 1e7**-0.3, rel=1e-4)


def test_units_do_not_matter() -> None:
    rng = np.random.default_rng(0)
    losses = (0.02 + 3 * SIZES**-0.4) * np.exp(0.03 * rng.normal(size=len(SIZES)))
    one, other = fit_law(SATURATING, SIZES, losses), fit_law(SATURATING, SIZES / 1e6, losses * 1e3)
    assert other.parameters()["a"] == pytest.approx(one.parameters()["a"], rel=1e-5)
    assert other.parameters()["L_inf"] == pytest.approx(1e3 * one.parameters()["L_inf"], rel=1e-5)


def test_scatter_of_seeds_and_of_the_law() -> None:
    """Two seeds 2 % apart around a curve that is no power: the law's residuals are more than the seeds'."""
    sizes, losses = np.repeat(SIZES, 2), np.repeat(0.2 + 3 * SIZES**-0.2, 2)
    fit = fit_law(POWER, sizes, losses * np.exp(np.tile([0.01, -0.01], len(SIZES))))
    assert fit.seed_spread() == pytest.approx(0.01 * 2**0.5)
    assert fit.spread() > 1.5 * 0.01 * 2**0.5
    assert fit_law(POWER, SIZES, losses[::2]).seed_spread() is None


def test_squared_losses_have_twice_the_exponent() -> None:
    losses = 3 * SIZES**-0.26
    assert fit_law(POWER, SIZES, losses**2).parameters()["a"] == pytest.approx(0.52)


def test_a_run_that_went_wrong() -> None:
    """Huber's fit hardly moves; least squares (a huge delta) moves far."""
    rng = np.random.default_rng(1)
    sizes = np.repeat(SIZES, 2)
    losses = 3 * sizes**-0.26 * np.exp(0.02 * rng.normal(size=len(sizes)))
    clean = fit_law(POWER, sizes, losses).parameters()["a"]
    losses[-1] *= 3
    robust, squares = (fit_law(POWER, sizes, losses, delta).parameters()["a"] for delta in (None, 1e3))
    assert abs(robust - clean) < 0.005
    assert abs(squares - clean) > 0.03


def test_the_law_that_made_the_curve_wins() -> None:
    rng = np.random.default_rng(2)
    sizes = np.repeat(SIZES, 2)
    noise = np.exp(0.02 * rng.normal(size=len(sizes)))
    truths = {POWER: 3 * sizes**-0.26, SATURATING: 0.03 + 30 * sizes**-0.5, BROKEN: broken(sizes)}
    for law, losses in truths.items():
        choices = compare((POWER, SATURATING, BROKEN), sizes, losses * noise)
        assert choices[0].fit.law is law
        assert choices == sorted(choices, key=lambda choice: choice.aicc)


def test_criteria_in_numbers() -> None:
    """Six runs 1 % off a power, up and down: the sum of squares is 6e-4 less what two parameters take."""
    sizes = np.array([1e3, 1e4, 1e5, 1e6, 1e7, 1e8])
    up = np.exp([0.01, -0.01, -0.01, -0.01, -0.01, 0.01])  # no slope, a mean of -1/300
    (choice,) = compare((POWER,), sizes, 3 * sizes**-0.5 * up)
    assert choice.fit.parameters() == pytest.approx({"A": 3 * math.exp(-1 / 300), "a": 0.5})
    mean_square = (2 * (4 / 300) ** 2 + 4 * (2 / 300) ** 2) / 6
    deviance = 6 * math.log(mean_square)
    # k = 3: A, a and the scale of the noise
    assert choice.aicc == pytest.approx(deviance + 2 * 3 + 2 * 3 * 4 / (6 - 3 - 1), rel=1e-4)
    assert choice.bic == pytest.approx(deviance + 3 * math.log(6), rel=1e-4)


def test_few_runs_choose_by_aicc_and_not_by_bic() -> None:
    """Six runs of a curve with a constant: one parameter more costs 30 by AICc and 2 by BIC."""
    sizes = np.geomspace(1e4, 1e7, 6)
    losses = (0.02 + 3 * sizes**-0.5) * np.exp(0.03 * np.array([1, -1, 0, 1, -1, 0]))
    choices = compare((SATURATING, POWER), sizes, losses)
    assert [choice.fit.law for choice in choices] == [POWER, SATURATING]
    assert choices[0].bic > choices[1].bic


def test_minimisation_is_at_a_minimum() -> None:
    """Every neighbour is worse, with and without a tie; a mistake in the gradient would stop elsewhere."""
    rng = np.random.default_rng(3)
    x = np.log(SIZES)[:, None] - np.log(SIZES).mean()
    y = np.log(0.5 + np.exp(-0.4 * x)) + 0.05 * rng.normal(size=(10, 2))
    design = Design(x, y[None], delta=0.05)
    tie = Tie(lambda theta: theta[:, 2], np.array([0.7]), 10.0)
    for chosen in (None, tie):
        theta, value = minimise(SATURATING, np.array([[0.1, 0.0, 0.2]]), design, chosen)
        for step in 1e-3 * np.concatenate([np.eye(3), -np.eye(3)]):
            assert objective(SATURATING, theta + step, design, chosen)[0] > value[0]


def test_replicates_do_not_touch_each_other() -> None:
    rng = np.random.default_rng(4)
    x = np.linspace(-2, 2, 8)[:, None]
    y = np.log(0.3 + np.exp(-0.5 * x)) + 0.05 * rng.normal(size=(5, 8, 1))
    start = np.tile([0.2, 0.0, 0.3], (5, 1))
    together, _ = minimise(SATURATING, start, Design(x, y, 0.1))
    for k in range(5):
        alone, _ = minimise(SATURATING, start[:1], Design(x, y[k : k + 1], 0.1))
        np.testing.assert_allclose(together[k], alone[0], rtol=1e-6, atol=1e-8)


def test_huber() -> None:
    np.testing.assert_allclose(huber(np.array([0.5, -2.0, np.nan]), 1.0), [0.125, 1.5, 0.0])
    np.testing.assert_allclose(huber(np.array([2.0, 4.0, -10.0]), 4.0), [2.0, 8.0, 32.0])


@pytest.mark.parametrize(
    ("law", "variables", "losses", "message"),
    [
        (POWER, [1.0, 2.0, 4.0], [1.0, np.nan, 0.5], "losses of a scaling law must be positive and finite"),
        (POWER, [0.0, 2.0, 4.0], [1.0, 0.7, 0.5], "variables of a scaling law must be positive"),
        (SATURATING, [1.0, 2.0, 4.0], [1.0, 0.7, 0.5], "needs at least 4 different points, got 3"),
        (JOINT, SIZES, SIZES, r"has 2 variable\(s\), got 1"),
        (JOINT, np.stack([SIZES, np.ones(10)], 1), SIZES, "needs different values of each variable"),
    ],
)
def test_what_cannot_be_fitted(law: Law, variables: object, losses: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_law(law, variables, losses)


def test_variance_of_runs_in_numbers() -> None:
    """Points of two runs and of one, three points and one parameter: (2 x 0.2^2 + 0.1^2 + 2 x 0) / 2."""
    residual = np.array([[[0.1, 0.3], [-0.1, np.nan], [0.4, -0.4]], [[0.0, 0.0], [0.0, np.nan], [0.0, 0.0]]])
    np.testing.assert_allclose(group_variance(residual, 1.0, 1), [0.045, 1e-12])
    # beyond the threshold a mean counts less: 2 x 0.1 (0.2 - 0.05) = 0.03 in place of 0.2^2
    np.testing.assert_allclose(group_variance(residual, 0.1, 1), [(2 * 0.03 + 0.01) / 2, 1e-12])


def test_scale_of_residuals_in_numbers() -> None:
    """The threshold is 1.345 x 1.4826 x the median of the residuals' sizes, the smallest two left out."""
    sizes = np.array([1e3, 1e4, 1e5, 1e6, 1e7, 1e8])
    fit = fit_law(POWER, sizes, 3 * sizes**-0.5 * np.exp([0.01, -0.01, -0.01, -0.01, -0.01, 0.01]))
    # -1/300 is the mean: four residuals of 2/300, two of 4/300
    assert fit.delta == pytest.approx(1.345 * 1.4826 * 3 / 300, rel=0.01)
    squares = 2 * (4 / 300) ** 2 + 4 * (2 / 300) ** 2
    assert fit.spread() == pytest.approx((squares / 4) ** 0.5, rel=1e-3)
    three = fit_law(POWER, sizes[:3], 3 * sizes[:3] ** -0.5 * np.exp([0.01, -0.02, 0.01]))
    assert three.spread() == pytest.approx(6e-4**0.5, rel=1e-3), "one spare point"


def test_exact_curves_have_the_smallest_scale() -> None:
    (choice,) = compare((POWER,), SIZES, 3 * SIZES**-0.26)
    assert choice.bic == pytest.approx(10 * math.log(1e-12) + 3 * math.log(10))


def test_a_parameter_at_its_bound_stays() -> None:
    """Of [[2, 1], [1, 2]] and a pull of (-1, 1): at its lowest the first stays, the second moves by 1/2."""
    matrix, right = np.array([[[2.0, 1.0], [1.0, 2.0]]] * 3), np.array([[-1.0, 1.0]] * 3)
    low = np.array([[True, False], [False, False], [False, False]])
    high = np.array([[False, False], [False, True], [False, False]])
    step = _step(matrix, right, np.zeros(3), low, high)
    np.testing.assert_allclose(step, [[0.0, 0.5], [-0.5, 0.0], [-1.0, 1.0]], atol=1e-9)


def test_bounds() -> None:
    bounds = {law.name: [end.tolist() for end in law.bounds()] for law in LAWS}
    assert bounds == {
        "power": [[-12, -4], [12, 4]],
        "saturating power": [[0, -12, 0.02], [2, 12, 4]],
        "broken power": [[-12, -4, -4, -12], [12, 4, 4, 12]],
        "joint": [[0, -12, 0.02, -12, 0.02], [2, 12, 4, 12, 4]],
        "joint without constant": [[-12, 0.02, -12, 0.02], [12, 4, 12, 4]],
    }


@pytest.mark.parametrize("exponent", [0.05, 0.15, 0.3, 0.5, 0.9, 1.5])
def test_the_best_start_comes_first(exponent: float) -> None:
    """Curves with an exponent of the grid are found at once."""
    x = np.log(SIZES)[:, None] - np.log(SIZES).mean()
    y = np.log(0.4 + 2 * np.exp(-exponent * x[:, 0]))
    start = SATURATING.starts(x, y, np.ones(10))[0]
    np.testing.assert_allclose(start, [0.4, np.log(2), exponent], rtol=1e-6)


def test_the_best_break_comes_first() -> None:
    x = np.linspace(-4, 4, 9)[:, None]
    y = BROKEN.log_loss(np.array([[0.5, 0.2, 0.6, 2.0]]), x)[0]  # a break at the sixth of seven places
    np.testing.assert_allclose(BROKEN.starts(x, y, np.ones(9))[0], [0.5, 0.2, 0.6, 2.0], rtol=1e-6)


@pytest.mark.parametrize("start", [[0, 8, 3], [2, -5, 0.02], [0, -8, 4], [1.5, 10, 0.02], [0, 0, 4]])
def test_far_starts(start: list[float]) -> None:
    x = np.linspace(-3.5, 3.5, 10)[:, None]
    y = np.log(0.3 + np.exp(-0.5 * x))[None]
    theta, _ = minimise(SATURATING, np.array([start], dtype=float), Design(x, y, 0.05))
    np.testing.assert_allclose(theta[0], [0.3, 0, 0.5], atol=1e-6)
