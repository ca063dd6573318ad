"""Figures of a scaling study, from an Analysis; where data are missing there is a sentence instead."""

from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from megagnn.drawing.figures import Drawn, colours, make_axes, plain_ticks, short
from megagnn.scaling.laws.analysis import PUBLISHED, Analysis
from megagnn.scaling.laws.forms import Array


def draw_all(analysis: Analysis) -> list[Drawn]:
    """All figures of the report, in its order."""
    makers: tuple[Callable[[Analysis], Drawn], ...] = (
        loss_against_size,
        loss_against_data,
        depth_against_width,
        techniques,
        iso_flop_curves,
        compute_frontier,
        residuals,
        exponents,
    )
    return [make(analysis) for make in makers]


def _curves(
    analysis: Analysis, varied: Array, fixed: Array, joint: Callable[[float, float], float] | None, name: str
) -> tuple[Figure, Axes]:
    figure, (ax,) = make_axes()
    losses, values = analysis.losses(), np.unique(fixed)
    shades = colours(len(values))
    if len(values) > 8:  # by value, as the colour bar says
        shades = matplotlib.colormaps["viridis"](LogNorm(values.min(), values.max())(values))
    for colour, value in zip(shades, values, strict=True):
        rows = fixed == value
        ax.loglog(
            varied[rows], losses[rows], "o", color=colour, markersize=4, label=f"{name} = {short(value)}"
        )
        if joint is not None:
            line = np.geomspace(varied.min(), varied.max(), 60)
            ax.loglog(line, [joint(x, value) for x in line], "-", color=colour, linewidth=1)
    ax.set_ylabel(f"{analysis.loss}, {analysis.unit}")
    plain_ticks(ax.yaxis)
    if len(values) <= 8:
        ax.legend(fontsize=7, frameon=False)
    else:
        scale = LogNorm(values.min(), values.max())
        mapped = ScalarMappable(scale, matplotlib.colormaps["viridis"])
        figure.colorbar(mapped, ax=ax, label=name)
    return figure, ax


def _joint(analysis: Analysis) -> Callable[[float, float], float] | None:
    joint = analysis.joint
    return None if joint is None else lambda n, d: joint.fit.predict((n, d))


_LINES = "Points are runs, seeds side by side; lines are the joint law."


def loss_against_size(analysis: Analysis) -> Drawn:
    """Loss against parameters, a line for each data size."""
    name, title, sizes = "loss-size", "Loss against model size", analysis.sizes()
    if len(np.unique(sizes)) < 2:
        return Drawn(name, title, None, "All runs have one model size.")
    figure, ax = _curves(analysis, sizes, analysis.data(), _joint(analysis), "D")
    ax.set_xlabel("parameters, N")
    return Drawn(name, title, figure, _LINES if analysis.joint else "Points are runs.")


def loss_against_data(analysis: Analysis) -> Drawn:
    """Loss against data, a line for each model size."""
    name, title, data = "loss-data", "Loss against data size", analysis.data()
    if len(np.unique(data)) < 2:
        return Drawn(name, title, None, "All runs have one data size.")
    joint = _joint(analysis)
    swapped = None if joint is None else lambda d, n: joint(n, d)
    figure, ax = _curves(analysis, data, analysis.sizes(), swapped, "N")
    ax.set_xlabel(f"training {analysis.options.data_unit}, D")
    return Drawn(name, title, figure, _LINES if analysis.joint else "Points are runs.")


def depth_against_width(analysis: Analysis) -> Drawn:
    """Loss against width for each depth, at the data size that most (width, depth) pairs share."""
    name, title = "depth-width", "Depth against width at fixed data"
    records = [*analysis.records, *analysis.other_depths]
    data = np.array([float(getattr(r, analysis.options.data_unit)) for r in records])
    losses = np.array([r.losses[analysis.loss][0] for r in records])
    shapes = {
        d: {(r.width, r.depth) for r, x in zip(records, data, strict=True) if x == d} for d in set(data)
    }
    fixed = max(shapes, key=lambda d: (len({depth for _, depth in shapes[d]}), len(shapes[d]), d))
    depths = sorted({depth for _, depth in shapes[fixed]})
    if len(depths) < 2:
        return Drawn(name, title, None, f"At each data size all runs have one depth ({depths[0]} layers).")
    figure, (ax,) = make_axes()
    for colour, depth in zip(colours(len(depths)), depths, strict=True):
        rows = [k for k, r in enumerate(records) if r.depth == depth and data[k] == fixed]
        widths = np.array([records[k].width for k in rows])
        means = [np.exp(np.log(losses[rows][widths == w]).mean()) for w in np.unique(widths)]
        ax.loglog(widths, losses[rows], "o", color=colour, markersize=3, alpha=0.5)
        ax.loglog(np.unique(widths), means, "-", color=colour, label=f"{depth} layer{'s' * (depth > 1)}")
    ticks: list[int] = []
    for width in sorted({r.width for r, d in zip(records, data, strict=True) if d == fixed}):
        if not ticks or width > 1.15 * ticks[-1]:  # else their numbers would lie on each other
            ticks.append(width)
    ax.set_xticks(ticks, [str(t) for t in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set(xlabel="width, channels of a node", ylabel=f"{analysis.loss}, {analysis.unit}")
    plain_ticks(ax.yaxis)
    ax.legend(fontsize=7, frameon=False)
    caption = f"D = {short(fixed)} {analysis.options.data_unit}; lines join the means over seeds."
    return Drawn(name, title, figure, caption)


def techniques(analysis: Analysis) -> Drawn:
    """Peak memory and time of a step for each technique, of the largest model that all of them ran."""
    name, title = "techniques", "Memory and time per technique"
    rows = [r for r in analysis.records if r.technique and r.memory_gib and r.seconds]
    names = list(dict.fromkeys(r.technique for r in rows))
    if len(names) < 2:
        return Drawn(
            name,
            title,
            None,
            "Fewer than two techniques come with memory and time (`technique`, `memory_gib`, `seconds`).",
        )
    shared = set.intersection(*({(r.width, r.depth) for r in rows if r.technique == t} for t in names))
    if not shared:
        return Drawn(name, title, None, "No width and depth was run with every technique.")
    shape = max(shared, key=lambda pair: pair[0] ** 2 * pair[1])
    of = {t: [r for r in rows if r.technique == t and (r.width, r.depth) == shape] for t in names}
    figure, (left, right) = make_axes(2)
    positions = np.arange(len(names))
    left.barh(positions, [np.median([r.memory_gib or 0.0 for r in of[t]]) for t in names], color="#3b6ea5")
    right.barh(
        positions, [np.median([(r.seconds or 0.0) / r.steps for r in of[t]]) for t in names], color="#3b6ea5"
    )
    left.set_yticks(positions, [str(t) for t in names], fontsize=8)
    right.set_yticks(positions, [""] * len(names))
    left.set_xlabel("peak memory of a rank, GiB")
    right.set_xlabel("time of a step, s")
    left.invert_yaxis()
    right.invert_yaxis()
    return Drawn(name, title, figure, f"Width {shape[0]}, {shape[1]} layers; medians over runs.")


def iso_flop_curves(analysis: Analysis) -> Drawn:
    """Loss against size at equal compute, with parabolas and their minima."""
    name, title = "iso-flop", "Iso-FLOP curves"
    if not analysis.groups:
        missing = next((m for m in analysis.missing if "iso-FLOP" in m), "No runs of equal compute.")
        return Drawn(name, title, None, missing)
    figure, (ax,) = make_axes()
    for colour, group in zip(colours(len(analysis.groups)), analysis.groups, strict=True):
        ax.loglog(group.sizes, group.losses, "o", color=colour, markersize=4, label=f"{group.flops:.2g} FLOP")
        line = np.geomspace(group.sizes.min(), group.sizes.max(), 50)
        centre = np.log(group.sizes).mean()
        fitted = np.exp(np.polyval(group.coefficients, np.log(line) - centre))
        ax.loglog(line, fitted, "-", color=colour, linewidth=1)
        if group.optimum is not None:
            best = np.exp(np.polyval(group.coefficients, np.log(group.optimum) - centre))
            ax.loglog([group.optimum], [best], "*", color="crimson", markersize=9)
    ax.set(xlabel="parameters, N", ylabel=f"{analysis.loss}, {analysis.unit}")
    plain_ticks(ax.yaxis)
    ax.legend(fontsize=7, frameon=False)
    text = "Runs whose compute differs by less than 20 %; stars are minima that the sizes enclose."
    if analysis.iso_law is not None:
        found, count = analysis.iso_law.exponent, analysis.iso_law.num_minima
        text += f" N_opt ~ C^{found.value:.2f} [{found.low:.2f}, {found.high:.2f}] through {count} minima."
    return Drawn(name, title, figure, text)


def compute_frontier(analysis: Analysis) -> Drawn:
    """All runs by compute, the lower envelope and its law."""
    name, title = "frontier", "Compute frontier"
    assert analysis.frontier_points is not None
    flops, best = analysis.frontier_points
    if len(flops) < 3:
        return Drawn(name, title, None, f"Only {len(flops)} run(s) are beaten by no cheaper one.")
    figure, (ax,) = make_axes()
    ax.loglog(analysis.flops(), analysis.losses(), "o", color="0.75", markersize=3, label="runs")
    ax.loglog(flops, best, "o", color="#3b6ea5", markersize=4, label="frontier, means over seeds")
    text = "No cheaper run beats those on the frontier."
    if analysis.envelope is not None:
        line = np.geomspace(flops.min(), flops.max(), 60)
        fit, a = analysis.envelope.fit, analysis.envelope.intervals["a"]
        ax.loglog(
            line, [fit.predict((c,)) for c in line], "-", color="crimson", linewidth=1, label=fit.law.name
        )
        text += f" Exponent {a.value:.3f} [{a.low:.3f}, {a.high:.3f}]."
    ax.set(xlabel="compute of the training, FLOP", ylabel=f"{analysis.loss}, {analysis.unit}")
    plain_ticks(ax.yaxis)
    ax.legend(fontsize=7, frameon=False)
    return Drawn(name, title, figure, text)


def residuals(analysis: Analysis) -> Drawn:
    """Residuals of the joint law against both sizes."""
    name, title = "residuals", "Residuals of the joint law"
    if analysis.joint is None:
        return Drawn(name, title, None, "There is no joint law to have residuals of.")
    fit = analysis.joint.fit
    figure, axes = make_axes(2)
    percent = 100 * np.expm1(fit.residuals())
    variables = np.exp(fit.x_GV + fit.mean_V)
    for ax, v, label in zip(
        axes, (0, 1), ("parameters, N", f"training {analysis.options.data_unit}, D"), strict=True
    ):
        other = np.log(variables[:, 1 - v])
        for seed in range(percent.shape[1]):
            ax.scatter(variables[:, v], percent[:, seed], c=other, cmap="viridis", s=14)
        ax.axhline(0.0, color="0.4", linewidth=0.8)
        ax.set_xscale("log")
        ax.set_xlabel(label)
    axes[0].set_ylabel("loss over prediction - 1, %")
    return Drawn(
        name, title, figure, f"Scatter of a run {100 * fit.spread():.1f} %; the colour is the other variable."
    )


def exponents(analysis: Analysis) -> Drawn:
    """Every exponent with its interval, beside the published ones."""
    name, title = "exponents", "Exponents and their intervals"
    rows = [
        (f"{law.what}, {p}", i)
        for law in _laws(analysis)
        for p, i in law.intervals.items()
        if p in ("a", "b")
    ]
    if not rows:
        return Drawn(name, title, None, "No law could be fitted.")
    figure, (ax,) = make_axes()
    figure.set_size_inches(6.4, 1.2 + 0.27 * len(rows))
    for y, (_, interval) in enumerate(rows):
        low, high = max(interval.low, -9.0), min(interval.high, 9.0)
        ax.plot([low, high], [y, y], "-", color="#3b6ea5", linewidth=1.5)
        ax.plot([interval.value], [y], "o", color="#3b6ea5", markersize=4)
    for value in sorted({value for _, value, _ in PUBLISHED}):
        ax.axvline(value, color="crimson", linewidth=0.8, linestyle=":")
    ax.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=7)
    ax.invert_yaxis()
    middle = np.array([interval.value for _, interval in rows])
    ax.set_xlim(min(-0.05, middle.min() - 0.1), max(0.8, middle.max() + 0.3))
    ax.set_xlabel(f"exponent of {analysis.loss}")
    text = "; ".join(f"{value} {what} ({source})" for what, value, source in PUBLISHED)
    level = 100 * analysis.options.level
    return Drawn(
        name,
        title,
        figure,
        f"Lines are {level:g} % intervals, cut off at the frame; dotted, published: {text}.",
    )


def _laws(analysis: Analysis) -> list[Any]:
    laws: list[Any] = [*analysis.by_size.values(), *analysis.by_data.values()]
    return laws + [law for law in (analysis.joint, analysis.envelope) if law is not None]
