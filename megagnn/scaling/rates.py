"""Which learning rate was best at each width: whether it carries over from narrow models to wide ones."""

from collections.abc import Mapping, Sequence

import numpy as np

from megagnn.scaling.drawing import Drawn, colours, make_axes, plain_ticks
from megagnn.scaling.laws.analysis import Options, select
from megagnn.scaling.laws.record import RunRecord
from megagnn.scaling.records import geometric_mean

Curve = Mapping[float, float]
"""Loss by learning rate, the geometric mean over seeds."""


def curves(records: Sequence[RunRecord], loss: str) -> dict[int, Curve]:
    """The curve of each width, of the runs of one recipe."""
    found: dict[int, dict[float, list[float]]] = {}
    for r in records:
        found.setdefault(r.width, {}).setdefault(r.learning_rate, []).append(r.losses[loss][0])
    return {
        width: {rate: geometric_mean(values) for rate, values in sorted(of.items())}
        for width, of in sorted(found.items())
    }


def best_rate(curve: Curve) -> float | None:
    """The minimum of a parabola in log rate through the best rate and its neighbours; None at an end."""
    rates, losses = np.array(list(curve)), np.log(list(curve.values()))
    best = int(losses.argmin())
    if not 0 < best < len(rates) - 1:
        return None
    near = slice(best - 1, best + 2)
    curvature, slope, _ = np.polyfit(np.log(rates[near]), losses[near], 2)
    return float(np.exp(-slope / (2 * curvature)))


def drift(records: Sequence[RunRecord], loss: str) -> float | None:
    """Slope of log best rate in log width; zero where it carries over, None with fewer than two minima."""
    best = {width: best_rate(curve) for width, curve in curves(records, loss).items()}
    inner = np.log([(width, rate) for width, rate in best.items() if rate is not None])
    return float(np.polyfit(inner[:, 0], inner[:, 1], 1)[0]) if len(inner) > 1 else None


def cost_of_transfer(records: Sequence[RunRecord], loss: str) -> float | None:
    """The widest model's loss at the narrowest one's best rate, over that at its own.

    Of the rates that were run; None where the widest was not run at that one.
    """
    by_width = curves(records, loss)
    narrow, wide = by_width[min(by_width)], by_width[max(by_width)]
    best = min(narrow, key=lambda rate: narrow[rate])
    return wide[best] / min(wide.values()) if best in wide else None


def describe(records: Sequence[RunRecord], options: Options) -> list[str]:
    """Best rates of every recipe, as lines of text."""
    lines = []
    for recipe in sorted({r.recipe for r in records}):
        chosen, loss, _ = select(records, Options(loss=options.loss, recipe=recipe))
        best = {width: best_rate(curve) for width, curve in curves(chosen, loss).items()}
        shown = ", ".join(f"{w}: {'at an end' if b is None else f'{b:.2g}'}" for w, b in best.items())
        lines.append(f"best learning rate of '{recipe}' by width: {shown}")
        slope, cost = drift(chosen, loss), cost_of_transfer(chosen, loss)
        if slope is not None:
            lines.append(f"  goes with width^{slope:.2f}")
        if cost is not None:
            lines.append(
                f"  the narrowest model's best rate costs the widest {100 * (cost - 1):.1f} % of {loss}"
            )
    return lines


def draw(records: Sequence[RunRecord], options: Options) -> Drawn:
    """Loss against learning rate, a line for each width, a panel for each recipe."""
    recipes = sorted({r.recipe for r in records})
    figure, axes = make_axes(len(recipes))
    figure.set_size_inches(3.4 * len(recipes) + 1.0, 3.4)
    for ax, recipe in zip(axes, recipes, strict=True):
        chosen, loss, unit = select(records, Options(loss=options.loss, recipe=recipe))
        by_width = curves(chosen, loss)
        for colour, (width, curve) in zip(colours(len(by_width)), by_width.items(), strict=True):
            ax.loglog(
                list(curve), list(curve.values()), "o-", color=colour, markersize=3, label=f"width {width}"
            )
            best = min(curve, key=lambda rate: curve[rate])
            ax.loglog([best], [curve[best]], "*", color="crimson", markersize=8)
        ax.set(title=recipe, xlabel="learning rate")
        plain_ticks(ax.yaxis)
    axes[0].set_ylabel(f"{loss}, {unit}")
    axes[0].legend(fontsize=7, frameon=False)
    text = "Stars: the best rate of each width. " + " ".join(
        line.strip() + "." for line in describe(records, options)
    )
    return Drawn("rates", "Learning rate against width", figure, text)
