"""Learning rates: the best at each size, whether it carries over to larger models, and recipes at their best.

Recipes between two others, each at the best of its rates, show the effect of the parts of a recipe.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megagnn.drawing.figures import Drawn, colours, make_axes, plain_ticks
from megagnn.scaling.laws.analysis import Options, select
from megagnn.scaling.laws.record import RunRecord
from megagnn.scaling.records import geometric_mean

Curve = Mapping[float, float]
"""Loss by learning rate, the geometric mean over seeds."""
Along = Literal["width", "depth"]
ENDS = {"width": ("narrowest", "widest"), "depth": ("shallowest", "deepest")}


def along(records: Sequence[RunRecord]) -> Along:
    """In what the models of a search differ: their depth, where all have one width, or their width."""
    return "depth" if len({r.width for r in records}) == 1 < len({r.depth for r in records}) else "width"


def curves(records: Sequence[RunRecord], loss: str, size: Along = "width") -> dict[int, Curve]:
    """The curve of each width (of each depth), of the runs of one recipe."""
    found: dict[int, dict[float, list[float]]] = {}
    for r in records:
        found.setdefault(getattr(r, size), {}).setdefault(r.learning_rate, []).append(r.losses[loss][0])
    return {
        at: {rate: geometric_mean(values) for rate, values in sorted(of.items())}
        for at, of in sorted(found.items())
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
    """Slope of log best rate in log size; zero where it carries over, None with fewer than two minima."""
    best = {size: best_rate(curve) for size, curve in curves(records, loss, along(records)).items()}
    inner = np.log([(size, rate) for size, rate in best.items() if rate is not None])
    return float(np.polyfit(inner[:, 0], inner[:, 1], 1)[0]) if len(inner) > 1 else None


def cost_of_transfer(records: Sequence[RunRecord], loss: str) -> float | None:
    """The largest model's loss at the smallest one's best rate, over that at its own.

    Of the rates that were run; None where the largest was not run at that one.
    """
    by_size = curves(records, loss, along(records))
    small, large = by_size[min(by_size)], by_size[max(by_size)]
    best = min(small, key=lambda rate: small[rate])
    return large[best] / min(large.values()) if best in large else None


def describe(records: Sequence[RunRecord], options: Options) -> list[str]:
    """Best rates of every recipe, as lines of text."""
    lines = []
    for recipe in sorted({r.recipe for r in records}):
        chosen, loss, _ = select(records, Options(loss=options.loss, recipe=recipe))
        size = along(chosen)
        best = {at: best_rate(curve) for at, curve in curves(chosen, loss, size).items()}
        shown = ", ".join(f"{at}: {'at an end' if b is None else f'{b:.2g}'}" for at, b in best.items())
        lines.append(f"best learning rate of '{recipe}' by {size}: {shown}")
        slope, cost = drift(chosen, loss), cost_of_transfer(chosen, loss)
        if slope is not None:
            lines.append(f"  goes with {size}^{slope:.2f}")
        if cost is not None:
            small, large = ENDS[size]
            lines.append(
                f"  the {small} model's best rate costs the {large} {100 * (cost - 1):.1f} % of {loss}"
            )
    return lines


def draw(records: Sequence[RunRecord], options: Options) -> Drawn:
    """Loss against learning rate, a line for each width or depth, a panel for each recipe."""
    recipes = sorted({r.recipe for r in records})
    figure, axes = make_axes(len(recipes))
    figure.set_size_inches(3.4 * len(recipes) + 1.0, 3.4)
    for ax, recipe in zip(axes, recipes, strict=True):
        chosen, loss, unit = select(records, Options(loss=options.loss, recipe=recipe))
        size = along(chosen)
        by_size = curves(chosen, loss, size)
        for colour, (at, curve) in zip(colours(len(by_size)), by_size.items(), strict=True):
            ax.loglog(
                list(curve), list(curve.values()), "o-", color=colour, markersize=3, label=f"{size} {at}"
            )
            best = min(curve, key=lambda rate: curve[rate])
            ax.loglog([best], [curve[best]], "*", color="crimson", markersize=8)
        ax.set(title=recipe, xlabel="learning rate")
        plain_ticks(ax.xaxis)
        plain_ticks(ax.yaxis)
        ax.legend(fontsize=7, frameon=False)
    axes[0].set_ylabel(loss if unit == loss else f"{loss}, {unit}")
    text = "Stars: the best rate of each size. " + " ".join(
        line.strip() + "." for line in describe(records, options)
    )
    return Drawn("rates", "Learning rate against size", figure, text)


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
