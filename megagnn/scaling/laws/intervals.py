"""Bootstrap intervals of a fit's parameters, of what follows from them, and of a run not yet made.

Exponents of saturating laws have skewed, long-tailed estimates, and a design has few points, so percentiles
of bootstrap estimates cover too seldom. Here the bootstrap calibrates a likelihood-ratio test instead, and
the interval is what the test does not reject:

    R(c) = sign(g - c) sqrt(2 (S(g = c) - S) / s^2)

S is the sum of Huber losses at the best parameters, S(g = c) with the quantity g tied to c, s^2 the variance
of a run as the points' mean residuals show it. The distribution of R at the true value is that of the
replicates at the fit's own. A quantile of normal or t theory appears nowhere; R does not depend on the
parametrisation.

For a new run g is its log loss and the tie is as weak as one run: S(y = c) - S is what the run adds.

Replicates are drawn over points and seeds: each point takes the mean residual of a random point (corrected
for leverage), and around it seeds' deviations from all points. A lack of fit, or anything else that the
seeds of a point share, so widens the intervals.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megagnn.scaling.laws.fitting import Fit, group_variance
from megagnn.scaling.laws.forms import Array
from megagnn.scaling.laws.robust import Functional, Tie, minimise

HARD = 1e5  # weight of a tie that holds g at c; a run weighs 1
GRID = 40  # values of c on each side


@dataclass(frozen=True)
class Interval:
    """An estimate between two ends; an end is infinite where the runs do not bound the quantity."""

    value: float
    low: float
    high: float
    level: float

    def map(self, function: Callable[[float], float]) -> "Interval":
        value, low, high = (float(function(v)) for v in (self.value, self.low, self.high))
        return Interval(value, low, high, self.level)

    def covers(self, truth: float) -> bool:
        return self.low <= truth <= self.high


class Bootstrap:
    """Replicates of a fit, made once and used for all its intervals.

    Args:
        fit: of the runs.
        replicates: number of them; the ends of a 90 % interval are their 5 % and 95 % quantiles.
        seed: of the draws.
    """

    def __init__(self, fit: Fit, replicates: int = 399, seed: int = 0) -> None:
        self.fit, self.replicates = fit, replicates
        rng = np.random.default_rng(seed)
        self.point_errors, self.seed_errors = _errors(fit)
        predicted_G = fit.law.log_loss(fit.theta[None], fit.x_GV)[0]
        shape = (replicates, *fit.y_GS.shape)
        drawn = predicted_G[:, None] + self._draw(rng, shape)
        self.y_BGS = np.where(np.isfinite(fit.y_GS), drawn, np.nan)
        self.new_run_B = self._draw_runs(rng, replicates)
        self.theta_BP, self.value_B = self._minimise(self.y_BGS, None)
        residual = self.y_BGS - fit.law.log_loss(self.theta_BP, fit.x_GV)[..., None]
        self.variance_B = group_variance(residual, fit.delta, len(fit.theta))
        self.variance = float(group_variance(fit.residuals()[None], fit.delta, len(fit.theta))[0])

    def _draw(self, rng: np.random.Generator, shape: tuple[int, int, int]) -> Array:
        """Mean and deviations of one point together: of a run that went wrong both are large."""
        num_seeds = self.fit.num_seeds[:, None]
        drawn = rng.integers(len(self.point_errors), size=shape[:2])
        deviations = np.where(np.isfinite(self.fit.y_GS), self.seed_errors[drawn], np.nan)
        deviations = deviations - np.nansum(deviations, -1, keepdims=True) / num_seeds
        return self.point_errors[drawn][..., None] / np.sqrt(num_seeds) + deviations

    def _draw_runs(self, rng: np.random.Generator, count: int) -> Array:
        """Errors of single new runs: what the seeds of a point share, and what they do not."""
        drawn, seeds = rng.integers(len(self.point_errors), size=count), self.fit.num_seeds.mean()
        which = rng.integers(self.seed_errors.shape[1], size=count)
        return self.point_errors[drawn] / np.sqrt(seeds) + self.seed_errors[drawn, which]

    def _minimise(self, y_BGS: Array, tie: Tie | None) -> tuple[Array, Array]:
        start_BP = np.repeat(self.fit.theta[None], len(y_BGS) if tie is None else len(tie.target_B), 0)
        return minimise(self.fit.law, start_BP, self.fit.design(y_BGS), tie)

    def _signed_root(
        self, functional: Functional, target_B: Array, y_BGS: Array | None, weight: float
    ) -> Array:
        """R at each target, of the replicates or (None) of the runs themselves."""
        theta, value, variance = self.theta_BP, self.value_B, self.variance_B
        if y_BGS is None:
            theta = np.repeat(self.fit.theta[None], len(target_B), 0)
            value, variance = np.full(len(target_B), self.fit.value), np.array([self.variance])
        y = self.fit.y_GS[None] if y_BGS is None else y_BGS
        _, tied = self._minimise(y, Tie(functional, target_B, weight))
        sign = np.sign(functional(theta) - target_B)
        result: Array = sign * np.sqrt(2 * np.maximum(tied - value, 0) / variance)
        return result

    def interval(self, functional: Functional, level: float = 0.9, lowest: float = -np.inf) -> Interval:
        """Interval of a quantity of the parameters; `lowest` is its smallest possible value."""
        value = float(functional(self.fit.theta[None])[0])
        target_B = np.full(self.replicates, value)
        return self._invert(functional, value, target_B, HARD, level, lowest)

    def parameter(self, name: str, level: float = 0.9) -> Interval:
        """Interval of an exponent or of L_inf, by name; amounts such as A belong to the units of x.

        Raises:
            ValueError: the law has no such exponent or constant.
        """
        names, low = self.fit.law.parameters, self.fit.low
        known = [n for n in names if n in ("L_inf", "a", "b", "d")]
        if name not in known:
            raise ValueError(f"the law '{self.fit.law.formula}' has intervals of {known}, got '{name}'")
        index = names.index(name)
        if name == "L_inf":
            return self.interval(lambda t: t[:, index], level, lowest=0.0).map(
                lambda v: v * float(np.exp(low))
            )
        return self.interval(lambda t: t[:, index], level)

    def prediction(self, variables: tuple[float, ...], level: float = 0.9) -> Interval:
        """Interval of the loss of one run at other variables, with the scatter of a run."""
        x_1V, low = self.fit.coordinates(variables), self.fit.low

        def log_loss(theta_BP: Array) -> Array:
            return self.fit.law.log_loss(theta_BP, x_1V)[:, 0]

        value = float(log_loss(self.fit.theta[None])[0])
        inner = self._invert(log_loss, value, value + self.new_run_B, 1.0, level, -np.inf)
        return inner.map(lambda v: float(np.exp(v + low)))

    def _at_bound(self) -> float:
        """Share of replicates that have a parameter at its lowest value."""
        low, _ = self.fit.law.bounds()
        return float((self.theta_BP <= low).any(1).mean())

    def _invert(
        self,
        functional: Functional,
        value: float,
        target_B: Array,
        weight: float,
        level: float,
        lowest: float,
    ) -> Interval:
        roots = self._signed_root(functional, target_B, self.y_BGS, weight)
        tail = (1 - level) / 2
        q_low, q_high = np.quantile(roots, [tail, 1 - tail])
        if self._at_bound() > tail:
            # [Note: at the bound] where L_inf is estimated near 0, replicates cannot err below it, and one
            # tail of R is cut off although the truth may lie on that side: the other tail stands for both
            q_low, q_high = min(q_low, -q_high), max(q_high, -q_low)
        # how far to look: the spread of the replicates, several times
        spread = float(np.quantile(np.abs(functional(self.theta_BP) - target_B), 0.9)) + 1e-9
        distance = 12 * spread * np.linspace(0, 1, GRID + 1)[1:] ** 2
        grid = np.concatenate([value - distance[::-1], [value], value + distance])
        grid = np.unique(np.maximum(grid, lowest))
        curve = self._signed_root(functional, grid, None, weight)
        curve = np.minimum.accumulate(curve)  # R falls; a local minimum of a tied fit does not break that
        low = _crossing(grid, curve, q_high, max(lowest, -np.inf), -1)
        high = _crossing(grid, curve, q_low, np.inf, 1)
        return Interval(value, low, high, level)


def _crossing(grid: Array, curve: Array, level: float, beyond: float, side: int) -> float:
    """Where a falling curve takes a value; `beyond` where it does not reach it on that side."""
    if side < 0 and curve[0] < level:
        return beyond
    if side > 0 and curve[-1] > level:
        return beyond
    return float(np.interp(-level, -curve, grid))


def _errors(fit: Fit) -> tuple[Array, Array]:
    """Errors to draw from: (G,) of points, times sqrt(seeds), leverage corrected; (G, S) of seeds."""
    residual = fit.residuals()
    num_seeds = fit.num_seeds
    mean_G = np.nansum(residual, 1) / num_seeds
    jacobian = fit.law.jacobian(fit.theta[None], fit.x_GV)[0] * np.sqrt(num_seeds)[:, None]
    leverage_G = np.einsum("gp,pg->g", jacobian, np.linalg.pinv(jacobian, rcond=1e-8))
    points = mean_G * np.sqrt(num_seeds) / np.sqrt(1 - np.minimum(leverage_G, 0.8))
    points = points - points.mean()
    wanted = np.sum(num_seeds * mean_G**2) / max(fit.spare, 1)
    points = points * np.sqrt(wanted / max(float(np.mean(points**2)), 1e-300))
    seeds = np.arange(residual.shape[1])[None] % num_seeds[:, None].astype(int)
    return points, np.take_along_axis(residual, seeds, 1) - mean_G[:, None]
