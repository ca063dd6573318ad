"""Compute-optimal sizes: from a joint law in closed form, from iso-FLOP parabolas, and the frontier of runs.

With L = L_inf + A N^-a + B D^-b and compute C = k N^p D^q, the loss at fixed C is least where
p^-1 a A N^-a = q^-1 b B D^-b (Lagrange), so that

    N_opt ~ C^(b / (a q + b p)),   D_opt ~ C^(a / (a q + b p)),   L - L_inf ~ C^(-a b / (a q + b p)),

which for p = q = 1 is Hoffmann et al. 2022, eq. 4.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megagnn.scaling.laws.forms import Array, SumOfPowers
from megagnn.scaling.laws.intervals import Interval
from megagnn.scaling.laws.robust import Functional

SAME = 0.2  # runs whose compute differs by less than this (in log) are one iso-FLOP group


@dataclass(frozen=True)
class ComputeLaw:
    """C = k N^p D^q, fitted to runs by least squares of logarithms."""

    k: float
    p: float
    q: float
    scatter: float
    """Root mean square deviation of log C."""


def fit_compute(parameters: Array, data: Array, flops: Array) -> ComputeLaw:
    """From the runs' own counts.

    Raises:
        ValueError: the runs do not vary both sizes, so that compute cannot be told apart.
    """
    columns = np.stack([np.ones(len(flops)), np.log(parameters), np.log(data)], 1)
    if np.linalg.matrix_rank(columns - columns.mean(0) * [0, 1, 1]) < 3:
        raise ValueError(
            "compute-optimal sizes need runs that vary model size and data size independently; add runs"
        )
    solution, *_ = np.linalg.lstsq(columns, np.log(flops), rcond=None)
    scatter = float(np.sqrt(np.mean((columns @ solution - np.log(flops)) ** 2)))
    return ComputeLaw(float(np.exp(solution[0])), float(solution[1]), float(solution[2]), scatter)


def optimal_exponents(law: SumOfPowers, p: float = 1.0, q: float = 1.0) -> dict[str, Functional]:
    """Exponents of N_opt, D_opt and L - L_inf in C, as functions of a joint law's internal parameters."""
    first = int(law.constant) + 1

    def exponent(numerator: Callable[[Array, Array], Array]) -> Functional:
        def of(theta_BP: Array) -> Array:
            a, b = theta_BP[:, first], theta_BP[:, first + 2]
            return numerator(a, b) / (a * q + b * p)

        return of

    return {
        "N_opt": exponent(lambda a, b: b),
        "D_opt": exponent(lambda a, b: a),
        "L - L_inf": exponent(lambda a, b: a * b),
    }


def optimal_sizes(law: dict[str, float], compute: ComputeLaw, flops: float) -> tuple[float, float, float]:
    """(N, D, loss) that a joint law's parameters put at the least loss for a compute."""
    a, b, p, q = law["a"], law["b"], compute.p, compute.q
    ratio = np.log(a * law["A"] * q / (b * law["B"] * p))
    budget = np.log(flops / compute.k)
    log_n = (ratio + b / q * budget) / (a + b * p / q)
    size, data = float(np.exp(log_n)), float(np.exp((budget - p * log_n) / q))
    loss = law.get("L_inf", 0.0) + law["A"] * size**-a + law["B"] * data**-b
    return size, data, float(loss)


@dataclass(frozen=True)
class IsoFlop:
    """Runs of about equal compute, and the parabola of log loss in log N through them."""

    flops: float
    sizes: Array
    losses: Array
    coefficients: Array
    """Coefficients of the parabola, highest power first."""
    optimum: float | None
    """N at the minimum; None where the runs do not enclose one."""


def iso_flops(parameters: Array, flops: Array, losses: Array) -> list[IsoFlop]:
    """Groups of equal compute with at least three sizes (Hoffmann et al. 2022, approach 2).

    Where the lowest runs are at an end of the sizes, the minimum would be extrapolated, and is not given.
    """
    order = np.argsort(flops)
    logs = np.log(flops[order])
    groups: list[list[int]] = []
    for position, index in enumerate(order):
        if groups and logs[position] - np.log(flops[groups[-1][0]]) < SAME:
            groups[-1].append(int(index))
        else:
            groups.append([int(index)])
    return [
        _parabola(parameters[group], flops[group], losses[group])
        for group in groups
        if len(_different(parameters[group])) >= 3
    ]


def _different(sizes: Array) -> Array:
    """Sizes that are at least SAME apart (in log): a parabola through nearly equal ones means nothing."""
    kept: list[float] = []
    for size in np.unique(sizes):
        if not kept or np.log(size / kept[-1]) >= SAME:
            kept.append(float(size))
    return np.array(kept)


def _parabola(sizes: Array, flops: Array, losses: Array) -> IsoFlop:
    x, y = np.log(sizes), np.log(losses)
    coefficients = np.polyfit(x - x.mean(), y, 2)
    optimum = None
    best = np.median(x[np.argsort(y)[: max(len(y) // 4, 1)]])  # about where the lowest runs are
    if coefficients[0] > 0 and best - x.min() >= SAME and x.max() - best >= SAME:
        vertex = x.mean() - coefficients[1] / (2 * coefficients[0])
        optimum = float(np.exp(vertex)) if x.min() < vertex < x.max() else None
    return IsoFlop(float(np.exp(np.log(flops).mean())), sizes, losses, coefficients, optimum)


@dataclass(frozen=True)
class IsoFlopLaw:
    """N_opt ~ C^exponent through the minima of iso-FLOP curves."""

    exponent: Interval
    """Its ends are infinite where too few runs lie beside the parabolas to judge their scatter."""
    num_minima: int
    kept: float
    """Share of the replicates whose curves still enclosed two minima; the interval is of those."""


def iso_flop_law(groups: Sequence[IsoFlop], level: float, replicates: int, seed: int) -> IsoFlopLaw | None:
    """Slope of log N_opt in log C, and its interval by a parametric bootstrap of the curves' log losses.

    Their scatter is that about the parabolas, one for all curves. That a parabola is not the law's own shape
    is not in the interval. None with fewer than two minima.
    """
    found = [g for g in groups if g.optimum is not None]
    if len(found) < 2:
        return None
    slope = _slope([g.flops for g in found], [g.optimum for g in found])
    spare = sum(len(g.sizes) - 3 for g in found)
    if spare < 2:
        return IsoFlopLaw(Interval(slope, -np.inf, np.inf, level), len(found), 1.0)
    fitted = [np.polyval(g.coefficients, np.log(g.sizes) - np.log(g.sizes).mean()) for g in found]
    residuals = [np.log(g.losses) - f for g, f in zip(found, fitted, strict=True)]
    scatter = np.sqrt(sum(float(r @ r) for r in residuals) / spare)
    rng, slopes = np.random.default_rng(seed), []
    for _ in range(replicates):
        drawn = [
            _parabola(g.sizes, np.full(len(g.sizes), g.flops), np.exp(f + scatter * rng.normal(size=len(f))))
            for g, f in zip(found, fitted, strict=True)
        ]
        kept = [g for g in drawn if g.optimum is not None]
        if len(kept) > 1:
            slopes.append(_slope([g.flops for g in kept], [g.optimum for g in kept]))
    if len(slopes) < replicates / 2:
        return IsoFlopLaw(Interval(slope, -np.inf, np.inf, level), len(found), len(slopes) / replicates)
    low, high = np.quantile(slopes, [(1 - level) / 2, (1 + level) / 2])
    interval = Interval(slope, min(float(low), slope), max(float(high), slope), level)
    return IsoFlopLaw(interval, len(found), len(slopes) / replicates)


def _slope(flops: Sequence[float], sizes: Sequence[float | None]) -> float:
    return float(np.polyfit(np.log(np.array(flops)), np.log(np.array(sizes, float)), 1)[0])


def frontier(flops: Array, losses: Array) -> list[int]:
    """Indices of the runs that no cheaper run beats, by rising compute: the lower envelope."""
    best, result = np.inf, []
    for index in np.lexsort((losses, flops)):
        if losses[index] < best:
            best = losses[index]
            result.append(int(index))
    return result


def mean_of_seeds(keys: Sequence[tuple[object, ...]], *values: Array) -> list[Array]:
    """Geometric means over runs of one key, in the order of the keys' first appearance.

    A frontier of single runs would pick lucky seeds.
    """
    which: dict[tuple[object, ...], list[int]] = {}
    for index, key in enumerate(keys):
        which.setdefault(key, []).append(index)
    return [np.array([np.exp(np.log(v[rows]).mean()) for rows in which.values()]) for v in values]
