"""Effect of the parts of a recipe: recipes between two others, each at the best of its learning rates."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megagnn.scaling.drawing import Drawn, colours, make_axes, plain_ticks
from megagnn.scaling.laws.analysis import Options, select
from megagnn.scaling.laws.record import RunRecord
from megagnn.scaling.rates import curves


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


def describe(records: Sequence[RunRecord], options: Options) -> list[str]:
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


def draw(records: Sequence[RunRecord], options: Options) -> Drawn:
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
