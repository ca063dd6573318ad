"""Robust fits of many replicates at once: Huber loss of log residuals by Levenberg-Marquardt.

A fit minimises sum over runs of huber(y - f(x; theta)) + weight/2 (target - g(theta))^2. The second term, if
there, ties a functional g to a target: heavily, for profiles, or as one more run, for predictions. A
bootstrap is hundreds of such fits of a few parameters: they are done together in numpy, replicate by
replicate the same algorithm.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megagnn.scaling.laws.forms import Array, Law

Mask = NDArray[np.bool_]
Functional = Callable[[Array], Array]
"""(B, P) parameters to (B,) values."""

MAX_ITERATIONS = 60
HUBER = 1.345  # times the scale: 95 % efficient where residuals are normal (Huber 1964)


@dataclass(frozen=True)
class Tie:
    """weight/2 (target - g(theta))^2."""

    functional: Functional
    target_B: Array
    weight: float


@dataclass(frozen=True)
class Design:
    """Points and runs: y_BGS is (replicates, points, seeds), NaN where a point has fewer seeds."""

    x_GV: Array
    y_BGS: Array
    delta: float
    """Residual at which the loss turns from square to linear."""


def huber(residual: Array, delta: float) -> Array:
    """r^2/2 below delta, delta (|r| - delta/2) above; NaN (no run) counts 0."""
    size = np.abs(residual)
    value = np.where(size < delta, 0.5 * residual**2, delta * (size - 0.5 * delta))
    return np.where(np.isnan(size), 0.0, value)


def objective(law: Law, theta_BP: Array, design: Design, tie: Tie | None = None) -> Array:
    """(B,) values of what is minimised."""
    residual = design.y_BGS - law.log_loss(theta_BP, design.x_GV)[..., None]
    value: Array = huber(residual, design.delta).sum((1, 2))
    if tie is not None:
        value = value + 0.5 * tie.weight * (tie.target_B - tie.functional(theta_BP)) ** 2
    return value


def gradient_of(functional: Functional, theta_BP: Array) -> Array:
    """Central differences, (B, P)."""
    columns = []
    for p in range(theta_BP.shape[1]):
        step = np.zeros(theta_BP.shape[1])
        step[p] = 1e-5
        columns.append((functional(theta_BP + step) - functional(theta_BP - step)) / 2e-5)
    return np.stack(columns, -1)


def _normal_equations(law: Law, theta_BP: Array, design: Design, tie: Tie | None) -> tuple[Array, Array]:
    """Gauss-Newton matrix (B, P, P) and descent direction's right-hand side (B, P)."""
    residual = design.y_BGS - law.log_loss(theta_BP, design.x_GV)[..., None]
    weight = np.minimum(1.0, design.delta / np.maximum(np.abs(residual), 1e-300))
    weight = np.where(np.isnan(residual), 0.0, weight)
    jacobian = law.jacobian(theta_BP, design.x_GV)
    weighted = jacobian * weight.sum(-1)[..., None]
    matrix = np.swapaxes(jacobian, 1, 2) @ weighted
    pull = (weight * np.nan_to_num(residual)).sum(-1)
    right = (np.swapaxes(jacobian, 1, 2) @ pull[..., None])[..., 0]
    if tie is not None:
        slope = gradient_of(tie.functional, theta_BP)
        matrix = matrix + tie.weight * slope[:, :, None] * slope[:, None]
        right = right + tie.weight * (tie.target_B - tie.functional(theta_BP))[:, None] * slope
    return matrix, right


def _step(matrix: Array, right: Array, damping_B: Array, at_low: Mask, at_high: Mask) -> Array:
    """Damped step; a parameter at a bound that it would cross stays."""
    stays = (at_low & (right < 0)) | (at_high & (right > 0))
    free = ~stays
    matrix = matrix * (free[:, :, None] & free[:, None])
    diagonal = np.einsum("bpp->bp", matrix)
    added = damping_B[:, None] * np.maximum(diagonal, 1e-9) + 1e-13 + stays
    damped = matrix + added[:, :, None] * np.eye(matrix.shape[1])
    step: Array = np.linalg.solve(damped, (right * free)[..., None])[..., 0]
    return step


def minimise(law: Law, theta_BP: Array, design: Design, tie: Tie | None = None) -> tuple[Array, Array]:
    """Levenberg-Marquardt within the law's bounds, with Huber's weights; (B, P) and (B,) objectives."""
    low, high = law.bounds()
    theta = np.array(theta_BP, dtype=np.float64)
    value = objective(law, theta, design, tie)
    damping = np.full(len(theta), 1e-3)
    active = np.arange(len(theta))
    for _ in range(MAX_ITERATIONS):
        part = Design(
            design.x_GV, design.y_BGS[active] if len(design.y_BGS) > 1 else design.y_BGS, design.delta
        )
        part_tie = tie and Tie(tie.functional, tie.target_B[active], tie.weight)
        now = theta[active]
        matrix, right = _normal_equations(law, now, part, part_tie)
        step = _step(matrix, right, damping[active], now <= low, now >= high)
        new = np.clip(now + step, low, high)
        new_value = objective(law, new, part, part_tie)
        better = new_value < value[active]
        gain = value[active] - new_value
        accepted = active[better]
        theta[accepted], value[accepted] = new[better], new_value[better]
        damping[active] = np.clip(np.where(better, damping[active] * 0.2, damping[active] * 6), 1e-9, 1e9)
        settled = (better & (gain < 1e-9 * (value[active] + 1e-12))) | (~better & (damping[active] > 1e4))
        active = active[~settled]
        if len(active) == 0:
            break
    return theta, value
