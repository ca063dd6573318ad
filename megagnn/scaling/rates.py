"""Learning rates: the best at each width, whether it carries over to wide models, and recipes at their best.

Recipes between two others, each at the best of its rates, show the effect of the parts of a recipe.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Best:
    """The best learning rate of a recipe at a width."""

    recipe: str
    width: int
    parameters: int
    rate: float
    loss: float
    """Geometric mean over seeds."""
    at_end: bool
    """Whether it is the lowest or the highest rate that was run, of several."""


def best_of(records: Sequence[RunRecord], options: Options) -> tuple[list[Best], str, str]:
    """Every recipe and width, in the order of the runs; the name of the loss, and its unit.

    Raises:
        ValueError: runs without the loss.
    """
    found, loss, unit = [], "", ""
    for recipe in dict.fromkeys(r.recipe for r in records):
        chosen, loss, unit = select(records, Options(loss=options.loss, recipe=recipe))
        for width, curve in curves(chosen, loss).items():
            rate = min(curve, key=lambda r: curve[r])
            size = next(r.parameters for r in chosen if r.width == width)
            at_end = len(curve) > 1 and rate in (min(curve), max(curve))
            found.append(Best(recipe, width, size, rate, curve[rate], at_end))
    return found, loss, unit


def describe_recipes(records: Sequence[RunRecord], options: Options) -> list[str]:
    """A line for each recipe and width: its best rate, its loss, and that loss over the first recipe's."""
    found, loss, unit = best_of(records, options)
    first: dict[int, float] = {}
    for best in found:
        first.setdefault(best.width, best.loss)
    longest = max(len(best.recipe) for best in found)
    lines = [f"{'recipe':<{longest}}  width  parameters   best rate  {loss}, {unit}  of the first"]
    for best in found:
        mark = "*" if best.at_end else " "
        lines.append(
            f"{best.recipe:<{longest}}  {best.width:>5}  {best.parameters:>10,}  {best.rate:>9.2g}{mark}  "
            f"{best.loss:>{len(loss) + len(unit) + 2}.4f}  {best.loss / first[best.width]:>12.2f}"
        )
    if any(best.at_end for best in found):
        lines.append("* the lowest or highest rate that was run")
    return lines


def draw_recipes(records: Sequence[RunRecord], options: Options) -> Drawn:
    """The best loss of each recipe, a colour for each width."""
    found, loss, unit = best_of(records, options)
    recipes, widths = list(dict.fromkeys(b.recipe for b in found)), sorted({b.width for b in found})
    figure, (ax,) = make_axes()
    figure.set_size_inches(7.0, 1.2 + 0.36 * len(recipes))
    for k, (colour, width) in enumerate(zip(colours(len(widths)), widths, strict=True)):
        losses = [math.nan] * len(recipes)  # no line passes a recipe that was not run at the width
        for best in (b for b in found if b.width == width):
            row = recipes.index(best.recipe)
            losses[row] = best.loss
            at = 3 * (len(widths) - 1) - 6 * k - 2
            ax.annotate(
                f"{best.rate:.2g}",
                (best.loss, row),
                (5, at),
                textcoords="offset points",
                fontsize=6,
                color=colour,
            )
        ax.plot(losses, range(len(recipes)), "o-", color=colour, linewidth=0.8, label=f"width {width}")
    ax.set_yticks(range(len(recipes)), recipes, fontsize=8)
    ax.invert_yaxis()
    ax.set(xscale="log", xlabel=f"{loss}, {unit}")
    plain_ticks(ax.xaxis)
    ax.legend(fontsize=7, frameon=False)
    data = sorted({r.structures for r in records})
    text = (
        f"Each recipe at the best of its learning rates, which stands beside the point; "
        f"{' and '.join(f'{d:,}' for d in data)} training structures. Chosen and shown on the same split."
    )
    return Drawn("ablation", "What the parts of a recipe do", figure, text)
