"""Forms of scaling laws, as the logarithm of the loss and its derivatives, for many parameter sets at once.

Shapes: B parameter sets (starts, bootstrap replicates), G points of the design, P parameters, V variables.
`x_GV` are logarithms of the variables less their means, `y` those of the loss less their minimum, so that
parameters are of order one; `natural` gives them back in the user's units.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

Array = NDArray[np.float64]

# An exponent this far from 0 is no scaling law; in a saturating law a smaller one than MIN_EXPONENT cannot be
# told from a constant.
MAX_EXPONENT, MIN_EXPONENT = 4.0, 0.02
MAX_LOG = 12.0


class Law(ABC):
    """A form of a scaling law."""

    name: str
    formula: str
    parameters: tuple[str, ...]
    num_variables: int

    @abstractmethod
    def log_loss(self, theta_BP: Array, x_GV: Array) -> Array:
        """(B, G)."""

    @abstractmethod
    def jacobian(self, theta_BP: Array, x_GV: Array) -> Array:
        """Derivatives of `log_loss`, (B, G, P)."""

    @abstractmethod
    def bounds(self) -> tuple[Array, Array]:
        """Lowest and highest value of each parameter, (P,) each."""

    @abstractmethod
    def starts(self, x_GV: Array, y_G: Array, weight_G: Array) -> Array:
        """Parameters to begin a fit from, (starts, P)."""

    @abstractmethod
    def natural(self, theta_P: Array, mean_V: Array, low: float) -> dict[str, float]:
        """Parameters in the user's units; `low` is the logarithm that was taken from y."""


@dataclass(frozen=True)
class SumOfPowers(Law):
    """L = sum over variables v of A_v x_v^-a_v, with or without a constant L_inf.

    Parameters: L_inf in units of the lowest loss (if there is one), then (log A_v, a_v) of each variable.
    L_inf is linear, so that a fit can leave zero again.
    """

    name: str
    formula: str
    parameters: tuple[str, ...]
    num_variables: int
    constant: bool

    def _terms(self, theta_BP: Array, x_GV: Array) -> Array:
        """log of each power, (B, G, V)."""
        first = int(self.constant)
        log_a_BV, a_BV = theta_BP[:, first::2], theta_BP[:, first + 1 :: 2]
        return log_a_BV[:, None] - a_BV[:, None] * x_GV

    def log_loss(self, theta_BP: Array, x_GV: Array) -> Array:
        total_BG = np.exp(self._terms(theta_BP, x_GV)).sum(-1)
        if self.constant:
            total_BG = total_BG + theta_BP[:, :1]
        return np.log(total_BG)

    def jacobian(self, theta_BP: Array, x_GV: Array) -> Array:
        powers_BGV = np.exp(self._terms(theta_BP, x_GV))
        total_BG = powers_BGV.sum(-1) + (theta_BP[:, :1] if self.constant else 0.0)
        share_BGV = powers_BGV / total_BG[..., None]
        result = np.empty((*total_BG.shape, len(self.parameters)))
        first = int(self.constant)
        if self.constant:
            result[..., 0] = 1 / total_BG
        result[..., first::2] = share_BGV
        result[..., first + 1 :: 2] = -share_BGV * x_GV
        return result

    def bounds(self) -> tuple[Array, Array]:
        lowest = MIN_EXPONENT if self.constant or self.num_variables > 1 else -MAX_EXPONENT
        low = [0.0] * self.constant + [-MAX_LOG, lowest] * self.num_variables
        high = [2.0] * self.constant + [MAX_LOG, MAX_EXPONENT] * self.num_variables
        return np.array(low), np.array(high)

    def starts(self, x_GV: Array, y_G: Array, weight_G: Array) -> Array:
        grid = np.meshgrid(*[[0.05, 0.15, 0.3, 0.5, 0.9, 1.5]] * self.num_variables)
        found = []
        scale_G = np.sqrt(weight_G) * np.exp(-y_G)  # residuals of the loss, as shares of it
        for a_V in np.stack([axis.ravel() for axis in grid], -1):
            columns = np.exp(-a_V * x_GV)
            if self.constant:
                columns = np.concatenate([np.ones((len(y_G), 1)), columns], 1)
            amounts, norm = nnls(columns * scale_G[:, None], np.exp(y_G) * scale_G)
            theta = list(amounts[: int(self.constant)])
            for amount, a in zip(amounts[int(self.constant) :], a_V, strict=True):
                theta += [np.log(max(amount, 1e-4)), a]
            found.append((norm, theta))
        found.sort(key=lambda pair: pair[0])
        low, high = self.bounds()
        return np.clip(np.array([theta for _, theta in found[:6]]), low, high)

    def natural(self, theta_P: Array, mean_V: Array, low: float) -> dict[str, float]:
        values = [theta_P[0] * np.exp(low)] if self.constant else []
        pairs = theta_P[int(self.constant) :].reshape(-1, 2)
        for (log_a, a), mean in zip(pairs, mean_V, strict=True):
            values += [np.exp(log_a + low + a * mean), a]
        return dict(zip(self.parameters, map(float, values), strict=True))


@dataclass(frozen=True)
class BrokenPower(Law):
    """A power that turns into another one: L = A x^-a (1 + (x/x0)^(1/w))^(-d w), w = 0.3.

    Parameters: log A, a, the change d of the exponent, log x0. One break of the form of Caballero et al.
    (2022), without a constant.
    """

    name: str = "broken power"
    formula: str = "A x^-a (1 + (x/x0)^(1/w))^(-d w), w = 0.3"
    parameters: tuple[str, ...] = ("A", "a", "d", "x0")
    num_variables: int = 1
    sharpness: float = 0.3

    def _bend(self, theta_BP: Array, x_GV: Array) -> Array:
        return (x_GV[:, 0] - theta_BP[:, 3:4]) / self.sharpness

    def log_loss(self, theta_BP: Array, x_GV: Array) -> Array:
        log_a, a, d = (theta_BP[:, k : k + 1] for k in range(3))
        soft = np.logaddexp(0.0, self._bend(theta_BP, x_GV))
        result: Array = log_a - a * x_GV[:, 0] - d * self.sharpness * soft
        return result

    def jacobian(self, theta_BP: Array, x_GV: Array) -> Array:
        z = self._bend(theta_BP, x_GV)
        slope = 0.5 * (1 + np.tanh(0.5 * z))
        ones = np.ones_like(z)
        columns = [
            ones,
            -ones * x_GV[:, 0],
            -self.sharpness * np.logaddexp(0.0, z),
            theta_BP[:, 2:3] * slope,
        ]
        return np.stack(columns, -1)

    def bounds(self) -> tuple[Array, Array]:
        high = np.array([MAX_LOG, MAX_EXPONENT, MAX_EXPONENT, MAX_LOG])
        return -high, high

    def starts(self, x_GV: Array, y_G: Array, weight_G: Array) -> Array:
        x, root = x_GV[:, 0], np.sqrt(weight_G)
        found = []
        for x0 in np.linspace(x.min(), x.max(), 9)[1:-1]:
            soft = self.sharpness * np.logaddexp(0.0, (x - x0) / self.sharpness)
            columns = np.stack([np.ones_like(x), -x, -soft], 1) * root[:, None]
            solution, *_ = np.linalg.lstsq(columns, y_G * root, rcond=None)
            norm = float(np.linalg.norm(columns @ solution - y_G * root))
            found.append((norm, [*solution, x0]))
        found.sort(key=lambda pair: pair[0])
        low, high = self.bounds()
        return np.clip(np.array([theta for _, theta in found[:3]]), low, high)

    def natural(self, theta_P: Array, mean_V: Array, low: float) -> dict[str, float]:
        log_a, a, d, x0 = map(float, theta_P)
        mean = float(mean_V[0])
        return {"A": float(np.exp(log_a + low + a * mean)), "a": a, "d": d, "x0": float(np.exp(x0 + mean))}


POWER = SumOfPowers("power", "A x^-a", ("A", "a"), 1, constant=False)
SATURATING = SumOfPowers("saturating power", "L_inf + A x^-a", ("L_inf", "A", "a"), 1, constant=True)
BROKEN = BrokenPower()
JOINT = SumOfPowers(
    "joint", "L_inf + A N^-a + B D^-b", ("L_inf", "A", "a", "B", "b"), num_variables=2, constant=True
)
JOINT_POWER = SumOfPowers(
    "joint without constant", "A N^-a + B D^-b", ("A", "a", "B", "b"), num_variables=2, constant=False
)
