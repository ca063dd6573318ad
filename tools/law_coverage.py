"""How often intervals of scaling laws hold the truth: synthetic runs with known laws and noise.

    python tools/law_coverage.py --trials 200 --markdown docs/results/law-coverage.md

A case is a law, a design (sizes and seeds) and a noise: normal, of the logarithm, of each run; optionally one
more that the seeds of a point share (lack of fit), and optionally runs that went wrong. A trial draws the
runs, fits, and asks whether the 90 % interval of each exponent, of the constant and of a new, larger run
holds the true value. Of 200 trials 90 % gives 180 +- 4.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megagnn.scaling.laws.fitting import fit_law
from megagnn.scaling.laws.forms import JOINT, POWER, SATURATING, Array, SumOfPowers
from megagnn.scaling.laws.intervals import Bootstrap, Interval
from megagnn.scaling.laws.optimum import optimal_exponents

SIZES = {n: np.geomspace(1e4, 1e7, n) for n in range(5, 13)}


@dataclass(frozen=True)
class Case:
    """A law with its true parameters, and how it is observed."""

    name: str
    law: SumOfPowers
    truth: dict[str, float]
    points: Array
    """(G, V)."""
    seeds: int
    noise: float = 0.03
    shared: float = 0.0
    """Noise that the seeds of a point share."""
    wrong: float = 0.0
    """Share of runs whose loss is half as much again."""

    def loss(self, points: Array) -> Array:
        """True losses at (G, V)."""
        t = self.truth
        if self.law.num_variables == 1:
            return np.asarray(t.get("L_inf", 0.0) + t["A"] * points[:, 0] ** -t["a"])
        return np.asarray(t["L_inf"] + t["A"] * points[:, 0] ** -t["a"] + t["B"] * points[:, 1] ** -t["b"])

    def draw(self, rng: np.random.Generator) -> tuple[Array, Array]:
        """(R, V) variables and (R,) losses."""
        shared = self.shared * rng.normal(size=(len(self.points), 1))
        noise = self.noise * rng.normal(size=(len(self.points), self.seeds)) + shared
        noise += np.log(1.5) * (rng.random(noise.shape) < self.wrong)
        losses = self.loss(self.points)[:, None] * np.exp(noise)
        return np.repeat(self.points, self.seeds, 0), losses.ravel()

    def larger(self, rng: np.random.Generator) -> tuple[tuple[float, ...], float]:
        """Variables four times the largest, and one run there."""
        variables = 4 * self.points.max(0)
        noise = self.noise * rng.normal() + self.shared * rng.normal()
        noise += np.log(1.5) * (rng.random() < self.wrong)
        return tuple(map(float, variables)), float(self.loss(variables[None])[0] * np.exp(noise))


ONE = {"L_inf": 0.02, "A": 2.0, "a": 0.35}
LOW = {"L_inf": 0.012, "A": 6.0, "a": 0.40, "B": 2.0, "b": 0.45}
TWO = {"L_inf": 0.01, "A": 2.0, "a": 0.39, "B": 3.0, "b": 0.39}


def _grid(sizes: int, data: int) -> Array:
    return np.array(list(itertools.product(SIZES[sizes], np.geomspace(1e3, 1e6, data))))


def _line(points: int) -> Array:
    return SIZES[points][:, None]


CASES = (
    Case("power, 6 points x 2 seeds", POWER, {"A": 2.0, "a": 0.26}, _line(6), 2),
    Case("saturating, 8 points x 1 seed", SATURATING, ONE, _line(8), 1),
    Case("saturating, 8 points x 3 seeds", SATURATING, ONE, _line(8), 3),
    Case("the same with lack of fit", SATURATING, ONE, _line(8), 3, shared=0.02),
    Case("the same, 6 % of runs went wrong", SATURATING, ONE, _line(8), 3, wrong=0.06),
    Case("saturating, 12 points x 2 seeds", SATURATING, ONE, _line(12), 2),
    Case("joint, 5 x 3 points x 2 seeds", JOINT, TWO, _grid(5, 3), 2),
    Case("joint, 5 x 5 points x 2 seeds", JOINT, TWO, _grid(5, 5), 2),
    Case("the same with lack of fit", JOINT, TWO, _grid(5, 5), 2, shared=0.02),
    # a constant at a quarter of the lowest loss: some fits put it at 0
    Case("joint, 5 x 4 points x 2 seeds, low L_inf", JOINT, LOW, _grid(5, 4) * [0.5, 0.1], 2),
)


def intervals(
    case: Case, rng: np.random.Generator, replicates: int, level: float = 0.9
) -> dict[str, tuple[Interval, float]]:
    """Interval and truth of every quantity, of one trial."""
    variables, losses = case.draw(rng)
    fit = fit_law(case.law, variables, losses)
    bootstrap = Bootstrap(fit, replicates, seed=int(rng.integers(2**31)))
    result = {
        name: (bootstrap.parameter(name, level), case.truth[name])
        for name in case.law.parameters
        if name in ("a", "b", "L_inf")
    }
    where, run = case.larger(rng)
    result["new run"] = (bootstrap.prediction(where, level), run)
    if case.law is JOINT:
        a, b = case.truth["a"], case.truth["b"]
        functional = optimal_exponents(JOINT)["N_opt"]
        result["N_opt exponent"] = (bootstrap.interval(functional, level), b / (a + b))
    return result


def coverage(
    case: Case, trials: int, replicates: int, seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """{quantity: (share of trials whose interval holds the truth, median width, share unbounded)}."""
    held: dict[str, list[tuple[bool, float]]] = {}
    for trial in tqdm(range(trials), desc=case.name, unit="trial", file=sys.stderr, mininterval=10):
        rng = np.random.default_rng((seed, trial))
        for name, (interval, truth) in intervals(case, rng, replicates).items():
            held.setdefault(name, []).append((interval.covers(truth), interval.high - interval.low))
    return {
        name: (
            float(np.mean([c for c, _ in rows])),
            float(np.median([w for _, w in rows])),
            float(np.mean([not np.isfinite(w) for _, w in rows])),
        )
        for name, rows in held.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--replicates", type=int, default=399)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, nargs="*", help="numbers of the cases (default: all)")
    parser.add_argument("--markdown", type=Path, help="also write the table here")
    args = parser.parse_args(argv)
    lines = [
        "| case | quantity | truth held, % | median width | without an end, % |",
        "|---|---|---|---|---|",
    ]
    for number, case in enumerate(CASES):
        if args.cases and number not in args.cases:
            continue
        for name, (share, width, open_) in coverage(case, args.trials, args.replicates, args.seed).items():
            lines.append(f"| {case.name} | {name} | {100 * share:.1f} | {width:.3g} | {100 * open_:.0f} |")
            print(lines[-1], flush=True)
    if args.markdown:
        args.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
