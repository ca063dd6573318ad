"""Fits of laws to runs, and which law the runs ask for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megagnn.scaling.laws.forms import Array, Law
from megagnn.scaling.laws.robust import HUBER, Design, huber, minimise

SMALLEST_SCALE = 1e-6  # of residuals: exact curves leave rounding errors only


@dataclass(frozen=True)
class Fit:
    """A law at its best parameters, with the runs it was fitted to: points of the design and their seeds."""

    law: Law
    theta: Array
    """(P,) internal parameters, see forms.py."""
    x_GV: Array
    """Logarithms of the variables less `mean_V`."""
    y_GS: Array
    """Logarithms of the losses less `low`; NaN where a point has fewer seeds."""
    mean_V: Array
    low: float
    delta: float
    """Huber's threshold of log residuals."""
    value: float
    """Sum of Huber losses."""

    @property
    def num_runs(self) -> int:
        return int(np.isfinite(self.y_GS).sum())

    @property
    def num_seeds(self) -> Array:
        return np.isfinite(self.y_GS).sum(1).astype(np.float64)

    @property
    def spare(self) -> int:
        """Points beyond the number of parameters."""
        return len(self.x_GV) - len(self.theta)

    def design(self, y_BGS: Array | None = None) -> Design:
        """What is minimised, for other losses where given."""
        return Design(self.x_GV, self.y_GS[None] if y_BGS is None else y_BGS, self.delta)

    def parameters(self) -> dict[str, float]:
        """By name, in the user's units."""
        return self.law.natural(self.theta, self.mean_V, self.low)

    def coordinates(self, variables: Sequence[float]) -> Array:
        """(1, V) internal coordinates of a point."""
        return (np.log(np.array([variables], dtype=np.float64)) - self.mean_V).reshape(1, -1)

    def predict(self, variables: Sequence[float]) -> float:
        x_1V = self.coordinates(variables)
        return float(np.exp(self.law.log_loss(self.theta[None], x_1V)[0, 0] + self.low))

    def residuals(self) -> Array:
        """log loss less log prediction, (G, S)."""
        return self.y_GS - self.law.log_loss(self.theta[None], self.x_GV)[0][:, None]

    def spread(self) -> float:
        """Root mean square of the log residuals, corrected for the parameters: scatter of one run."""
        left = max(self.num_runs - len(self.theta), 1)
        return float(np.sqrt(np.nansum(self.residuals() ** 2) / left))

    def seed_spread(self) -> float | None:
        """Standard deviation of log losses between runs of one point; None where no point has two runs."""
        left = self.num_runs - len(self.y_GS)
        if not left:
            return None
        deviations = self.y_GS - np.nanmean(self.y_GS, 1, keepdims=True)
        return float(np.sqrt(np.nansum(deviations**2) / left))


def group_variance(residual_BGS: Array, delta: float, num_parameters: int) -> Array:
    """Variance of a run as the points' mean residuals show it, (B,): seeds' scatter and lack of fit both."""
    seeds = np.isfinite(residual_BGS).sum(-1)
    mean = np.nansum(residual_BGS, -1) / seeds
    total = (seeds * 2 * huber(mean, delta)).sum(-1)
    result: Array = np.maximum(total / max(mean.shape[-1] - num_parameters, 1), SMALLEST_SCALE**2)
    return result


def group_runs(variables_RV: Array, losses_R: Array) -> tuple[Array, Array]:
    """Runs to distinct points (G, V) and their losses (G, S), padded by NaN."""
    points, which = np.unique(variables_RV, axis=0, return_inverse=True)
    which = which.reshape(-1)
    rows = [losses_R[which == g] for g in range(len(points))]
    padded = np.full((len(points), max(map(len, rows))), np.nan)
    for g, row in enumerate(rows):
        padded[g, : len(row)] = row
    return points, padded


def fit_law(law: Law, variables: object, losses: object, delta: float | None = None) -> Fit:
    """Fit a law to runs.

    Args:
        variables: (R, V) or (R,), positive: model sizes, data sizes, compute.
        losses: (R,), positive. Runs at equal variables are seeds of one point.
        delta: Huber's threshold of log residuals; HUBER times their scale if not given.

    Raises:
        ValueError: values that are not positive and finite, or too few distinct points.
    """
    variables_RV = np.asarray(variables, dtype=np.float64)
    variables_RV = variables_RV.reshape(len(variables_RV), -1)
    losses_R = np.asarray(losses, dtype=np.float64)
    for what, values in (("variables", variables_RV), ("losses", losses_R)):
        if not (np.isfinite(values) & (values > 0)).all():
            raise ValueError(f"{what} of a scaling law must be positive and finite; leave out diverged runs")
    points_GV, padded = group_runs(variables_RV, losses_R)
    _check_points(law, points_GV)
    logs = np.log(points_GV)
    mean_V, low = logs.mean(0), float(np.log(losses_R.min()))
    x_GV, y_GS = logs - mean_V, np.log(padded) - low
    first = delta or 0.02
    theta, value = _best(law, Design(x_GV, y_GS[None], first))
    fit = Fit(law, theta, x_GV, y_GS, mean_V, low, first, value)
    if delta is not None:
        return fit
    for _ in range(2):  # the scale of the residuals sets delta, and delta changes them a little
        delta = HUBER * _scale(fit)
        theta, value = _best(law, replace(fit.design(), delta=delta), fit.theta)
        fit = replace(fit, theta=theta, value=value, delta=delta)
    return fit


def _check_points(law: Law, points_GV: Array) -> None:
    if points_GV.shape[1] != law.num_variables:
        raise ValueError(
            f"the law '{law.formula}' has {law.num_variables} variable(s), got {points_GV.shape[1]}"
        )
    needed = len(law.parameters) + 1
    if len(points_GV) < needed:
        raise ValueError(
            f"the law '{law.formula}' needs at least {needed} different points, got {len(points_GV)}; "
            "add runs, or fit a law with fewer parameters"
        )
    for v in range(points_GV.shape[1]):
        if len(np.unique(points_GV[:, v])) < (3 if law.num_variables == 1 else 2):
            raise ValueError(
                f"the law '{law.formula}' needs different values of each variable, got "
                f"{np.unique(points_GV[:, v])}; add runs"
            )


def _best(law: Law, design: Design, also: Array | None = None) -> tuple[Array, float]:
    mean_G = np.nanmean(design.y_BGS[0], 1)
    starts = law.starts(design.x_GV, mean_G, np.isfinite(design.y_BGS[0]).sum(1).astype(np.float64))
    if also is not None:
        starts = np.concatenate([also[None], starts])
    theta, value = minimise(law, starts, design)
    best = int(value.argmin())
    return theta[best], float(value[best])


def _scale(fit: Fit) -> float:
    """Deviation of log residuals from their median size, the P smallest left out: bent to by the fit."""
    size = np.sort(np.abs(fit.residuals()[np.isfinite(fit.y_GS)]))[len(fit.theta) :]
    return max(1.4826 * float(np.median(size)), SMALLEST_SCALE)


@dataclass(frozen=True)
class Choice:
    """One law in a comparison."""

    fit: Fit
    aicc: float
    bic: float


def compare(laws: Sequence[Law], variables: object, losses: object) -> list[Choice]:
    """Laws by AICc (Hurvich and Tsai 1989), the best first; those with too many parameters are left out.

    Every law is judged by the same Huber loss: n log(2 sum/n) takes the place of n log(mean square). Each
    run counts as one observation, so the scatter of seeds is the yardstick.

    Raises:
        ValueError: no law has few enough parameters.
    """
    fits, reason = [], ""
    for law in laws:
        try:
            fits.append(fit_law(law, variables, losses))
        except ValueError as error:
            reason = reason or str(error)
    if not fits:
        raise ValueError(reason)
    delta = min(fit.delta for fit in fits)
    choices = []
    for fit in (fit_law(fit.law, variables, losses, delta) for fit in fits):
        n, k = fit.num_runs, len(fit.theta) + 1  # and the scale of the noise
        deviance = n * math.log(max(2 * fit.value / n, SMALLEST_SCALE**2))
        small = 2 * k * (k + 1) / (n - k - 1) if n > k + 1 else math.inf
        choices.append(Choice(fit, deviance + 2 * k + small, deviance + k * math.log(n)))
    return sorted(choices, key=lambda choice: choice.aicc)
