"""From runs to laws: everything that `megagnn fit` prints and `megagnn report` draws."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megagnn.scaling.laws.fitting import Choice, Fit, compare
from megagnn.scaling.laws.forms import BROKEN, JOINT, JOINT_POWER, POWER, SATURATING, Array, Law
from megagnn.scaling.laws.intervals import Bootstrap, Interval
from megagnn.scaling.laws.optimum import (
    ComputeLaw,
    IsoFlop,
    IsoFlopLaw,
    fit_compute,
    frontier,
    iso_flop_law,
    iso_flops,
    mean_of_seeds,
    optimal_exponents,
)
from megagnn.scaling.laws.record import RunRecord, describe_loss

SINGLE = (POWER, SATURATING, BROKEN)
DATA_UNITS = ("structures", "atoms")

# Laws whose AICc differs by less than this are both reported (Burnham and Anderson 2002, section 2.6).
UNDECIDED = 4.0

# Exponents that others found, to compare ours with. They belong to their losses, models and data.
PUBLISHED = (
    ("equivariant potentials, data or size", 0.26, "Frey et al. 2023"),
    ("EGNN, model size a", 0.39, "Ngo and Ravanbakhsh 2025"),
    ("EGNN, data size b", 0.39, "Ngo and Ravanbakhsh 2025"),
    ("EGNN, compute", 0.17, "Ngo and Ravanbakhsh 2025"),
)


@dataclass(frozen=True)
class Options:
    """How runs are fitted."""

    loss: str | None = None
    """Name of the loss; the first that all runs have if not given."""
    recipe: str | None = None
    """Which runs; needed where the files hold several recipes."""
    depth: int | None = None
    """Laws of the runs with so many layers only; the others are for depth against width."""
    data_unit: str = "structures"
    """What D counts."""
    level: float = 0.9
    """Probability that an interval holds the true value."""
    replicates: int = 399
    """Number of bootstraps."""
    seed: int = 0
    """Seed of the bootstraps."""


@dataclass(frozen=True)
class LawResult:
    """A fit that the runs chose, with its intervals."""

    what: str
    """Such as "L(N) at D = 1000"."""
    choices: list[Choice]
    """The best first; of joint laws the one with a constant, so that intervals hold its doubt."""
    bootstrap: Bootstrap
    """Intervals of the best choice."""
    intervals: dict[str, Interval]
    others: dict[str, dict[str, Interval]]
    """Intervals of laws, by name, that the runs cannot tell from the best: their exponents may differ."""

    @property
    def fit(self) -> Fit:
        """The best law's."""
        return self.choices[0].fit


@dataclass
class Analysis:
    """Laws of one recipe and one loss; `missing` says in sentences what the runs do not determine."""

    records: list[RunRecord]
    loss: str
    unit: str
    options: Options
    by_size: dict[float, LawResult] = field(default_factory=dict)
    """L(N) at each data size."""
    by_data: dict[float, LawResult] = field(default_factory=dict)
    """L(D) at each model size."""
    joint: LawResult | None = None
    compute_law: ComputeLaw | None = None
    optimum: dict[str, Interval] = field(default_factory=dict)
    """Exponents in C of N_opt, D_opt and L - L_inf."""
    envelope: LawResult | None = None
    """L(C) on the frontier."""
    frontier_points: tuple[Array, Array] | None = None
    """Compute and loss of the frontier."""
    groups: list[IsoFlop] = field(default_factory=list)
    iso_law: IsoFlopLaw | None = None
    """N_opt against C through iso-FLOP minima."""
    missing: list[str] = field(default_factory=list)
    other_depths: list[RunRecord] = field(default_factory=list)
    """Runs that the laws leave out for their depth."""

    def sizes(self) -> Array:
        return np.array([float(r.parameters) for r in self.records])

    def data(self) -> Array:
        """Data size of each run, in the chosen unit."""
        return np.array([float(getattr(r, self.options.data_unit)) for r in self.records])

    def flops(self) -> Array:
        return np.array([r.flops for r in self.records])

    def losses(self) -> Array:
        return np.array([r.losses[self.loss][0] for r in self.records])

    def loss_in_words(self) -> str:
        """The loss that exponents belong to."""
        return describe_loss(self.loss, self.unit)


def select(records: Sequence[RunRecord], options: Options) -> tuple[list[RunRecord], str, str]:
    """The runs of one recipe, the name of the loss, and its unit.

    Raises:
        ValueError: several recipes and none chosen, a loss that some run lacks, or units that differ.
    """
    recipes = sorted({r.recipe for r in records})
    if options.recipe is None and len(recipes) > 1:
        raise ValueError(
            f"the runs are of several recipes, {', '.join(recipes)}; choose one with --recipe NAME"
        )
    if options.recipe is not None and options.recipe not in recipes:
        raise ValueError(f"no run has the recipe '{options.recipe}'; there are: {', '.join(recipes)}")
    chosen = [r for r in records if options.recipe in (None, r.recipe)]
    names = [n for n in chosen[0].losses if all(n in r.losses for r in chosen)]
    loss = options.loss or (names[0] if names else None)
    if loss not in names:
        raise ValueError(f"the loss must be one that every run has, {names}, got {loss!r}; set --loss NAME")
    units = sorted({r.losses[loss][1] for r in chosen})
    if len(units) > 1:
        raise ValueError(f"the loss '{loss}' comes in different units, {', '.join(units)}; convert the runs")
    return chosen, loss, units[0]


def law_of(
    what: str,
    laws: Sequence[Law],
    variables: Array,
    losses: Array,
    options: Options,
    first: Law | None = None,
) -> LawResult:
    """Fit, choose and bootstrap.

    Args:
        first: take this law, if it can be fitted, whatever the information criterion says.

    Raises:
        ValueError: too few points.
    """
    choices = compare(laws, variables, losses)
    if first is not None:
        choices.sort(key=lambda choice: choice.fit.law is not first)

    def intervals(bootstrap: Bootstrap) -> dict[str, Interval]:
        names = [n for n in bootstrap.fit.law.parameters if n in ("L_inf", "a", "b", "d")]
        return {name: bootstrap.parameter(name, options.level) for name in names}

    bootstrap = Bootstrap(choices[0].fit, options.replicates, options.seed)
    others = {
        other.fit.law.name: intervals(Bootstrap(other.fit, options.replicates, options.seed))
        for other in choices[1:]
        if other.aicc - choices[0].aicc < UNDECIDED
    }
    return LawResult(what, choices, bootstrap, intervals(bootstrap), others)


def analyse(records: Sequence[RunRecord], options: Options) -> Analysis:
    """Every law that the runs determine.

    Raises:
        ValueError: see `select`; no run of the depth.
    """
    chosen, loss, unit = select(records, options)
    of_depth = [r for r in chosen if options.depth in (None, r.depth)]
    if not of_depth:
        depths = ", ".join(str(d) for d in sorted({r.depth for r in chosen}))
        raise ValueError(f"no run has {options.depth} layers; there are runs of {depths}; set --depth L")
    others = [r for r in chosen if options.depth not in (None, r.depth)]
    result = Analysis(of_depth, loss, unit, options, other_depths=others)
    _single_laws(result)
    _joint_law(result)
    _compute(result)
    _iso_flop(result)
    return result


def _single_laws(result: Analysis) -> None:
    sizes, data, losses = result.sizes(), result.data(), result.losses()
    plans = (
        ("L(N) at D = ", data, sizes, result.by_size, "model sizes at one data size"),
        ("L(D) at N = ", sizes, data, result.by_data, "data sizes at one model size"),
    )
    for what, fixed, varied, into, need in plans:
        for value in np.unique(fixed):
            rows = fixed == value
            if len(np.unique(varied[rows])) < 3:
                continue
            try:
                into[value] = law_of(f"{what}{value:.4g}", SINGLE, varied[rows], losses[rows], result.options)
            except ValueError:
                continue
        if not into:
            result.missing.append(f"No {what[:4]}: it takes at least three {need}.")


def _joint_law(result: Analysis) -> None:
    variables = np.stack([result.sizes(), result.data()], 1)
    try:
        result.joint = law_of(
            "L(N, D)", (JOINT, JOINT_POWER), variables, result.losses(), result.options, first=JOINT
        )
    except ValueError as error:
        result.missing.append(f"No joint law L(N, D): {error}.")


def _compute(result: Analysis) -> None:
    sizes, data, flops, losses = result.sizes(), result.data(), result.flops(), result.losses()
    if result.joint is not None:
        try:
            law = result.compute_law = fit_compute(sizes, data, flops)
            functionals = optimal_exponents(result.joint.fit.law, law.p, law.q)  # type: ignore[arg-type]
            for name, functional in functionals.items():
                result.optimum[name] = result.joint.bootstrap.interval(functional, result.options.level)
        except ValueError as error:
            result.missing.append(f"No compute-optimal sizes from the joint law: {error}.")
    keys = [(r.width, r.depth, r.structures, r.steps, r.learning_rate) for r in result.records]
    mean_flops, mean_losses = mean_of_seeds(keys, flops, losses)
    best = frontier(mean_flops, mean_losses)
    result.frontier_points = mean_flops[best], mean_losses[best]
    try:
        result.envelope = law_of(
            "L(C) on the frontier", (POWER, SATURATING), *result.frontier_points, result.options
        )
    except ValueError as error:
        result.missing.append(f"No law L(C): of the frontier's runs, {error}.")


def _iso_flop(result: Analysis) -> None:
    result.groups = iso_flops(result.sizes(), result.flops(), result.losses())
    minima = [(g.flops, g.optimum) for g in result.groups if g.optimum is not None]
    if not result.groups:
        result.missing.append(
            "No iso-FLOP curves: they take at least three model sizes of equal compute (within 20 %)."
        )
    elif len(minima) < 2:
        result.missing.append(
            f"No iso-FLOP scaling of N_opt: {len(minima)} of {len(result.groups)} groups of equal compute "
            "enclose their minimum, and it takes two."
        )
    else:
        options = result.options
        result.iso_law = iso_flop_law(result.groups, options.level, options.replicates, options.seed)


@dataclass(frozen=True)
class HeldOut:
    """A run that was predicted from the others."""

    run: str
    predicted: Interval
    observed: float


def predict(analysis: Analysis, sizes: tuple[float, float]) -> Interval:
    """Loss of one run of N parameters on D data, by the joint law.

    Raises:
        ValueError: there is no joint law.
    """
    if analysis.joint is None:
        raise ValueError("a prediction needs the joint law: " + " ".join(analysis.missing))
    return analysis.joint.bootstrap.prediction(sizes, analysis.options.level)


def hold_out_largest(records: Sequence[RunRecord], options: Options) -> list[HeldOut]:
    """Predict the runs of the greatest compute, all seeds of one size, from all others.

    Raises:
        ValueError: see `select` and `predict`.
    """
    chosen, loss, _ = select(records, options)
    chosen = [r for r in chosen if options.depth in (None, r.depth)]
    largest = max(chosen, key=lambda r: r.flops)
    size = (largest.width, largest.depth, largest.structures)
    held = [r for r in chosen if (r.width, r.depth, r.structures) == size]
    rest = [r for r in chosen if r not in held]
    if not rest:
        raise ValueError("all runs are of one size; a held-out prediction needs smaller runs to learn from")
    analysis = analyse(rest, options)
    where = (float(largest.parameters), float(getattr(largest, options.data_unit)))
    interval = predict(analysis, where)
    return [HeldOut(r.run, interval, r.losses[loss][0]) for r in held]
