"""Two recipes at equal sizes: the same width, depth, data and steps, run by run."""

from collections.abc import Sequence
from dataclasses import dataclass

from megagnn.scaling.drawing import Drawn, colours, make_axes, plain_ticks, short
from megagnn.scaling.laws.analysis import Analysis
from megagnn.scaling.laws.record import RunRecord
from megagnn.scaling.records import geometric_mean

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Match:
    """Runs of both recipes that differ in the recipe alone; means over seeds."""

    width: int
    depth: int
    structures: int
    parameters: tuple[int, int]
    flops: tuple[float, float]
    losses: tuple[float, float]

    @property
    def ratio(self) -> float:
        """Loss of the second over that of the first; above one where the first wins."""
        return self.losses[1] / self.losses[0]


def matches(first: Analysis, second: Analysis) -> list[Match]:
    """Every size that both recipes have, by data and size."""
    of = [_by_shape([*a.records, *a.other_depths]) for a in (first, second)]
    found = []
    for shape in sorted(set(of[0]) & set(of[1]), key=lambda s: (s[2], s[1], s[0])):
        pair = [group[shape] for group in of]
        losses = [geometric_mean([r.losses[first.loss][0] for r in runs]) for runs in pair]
        flops = [geometric_mean([r.flops for r in runs]) for runs in pair]
        parameters = [runs[0].parameters for runs in pair]
        width, depth, structures, _ = shape
        found.append(
            Match(width, depth, structures, tuple(parameters), tuple(flops), tuple(losses))  # type: ignore[arg-type]
        )
    return found


def _by_shape(records: Sequence[RunRecord]) -> dict[Shape, list[RunRecord]]:
    found: dict[Shape, list[RunRecord]] = {}
    for r in records:
        found.setdefault((r.width, r.depth, r.structures, r.steps), []).append(r)
    return found


def describe(first: Analysis, second: Analysis) -> list[str]:
    """A table of all sizes that both have."""
    names = [a.records[0].recipe for a in (first, second)]
    lines = [
        f"{first.loss} of '{names[0]}' and '{names[1]}' at equal width, depth, data and steps; the ratio is "
        "the second's over the first's:",
        f"{'width':>6}{'depth':>6}{'data':>7}{'parameters':>12}{'FLOP':>10}{'first':>10}{'second':>10}{'ratio':>7}",
    ]
    lines += [
        f"{m.width:>6}{m.depth:>6}{m.structures:>7}{m.parameters[0]:>12,}{m.flops[0]:>10.2g}"
        f"{m.losses[0]:>10.4g}{m.losses[1]:>10.4g}{m.ratio:>7.2f}"
        for m in matches(first, second)
    ]
    return lines


def draw(first: Analysis, second: Analysis) -> Drawn:
    """Ratio of losses by size, and both recipes' runs by compute."""
    name, title = "recipes", "Recipes at equal sizes"
    found, names = matches(first, second), [a.records[0].recipe for a in (first, second)]
    if not found:
        return Drawn(name, title, None, f"'{names[0]}' and '{names[1]}' have no size in common.")
    figure, (left, right) = make_axes(2)
    same = [m for m in found if first.options.depth in (None, m.depth)]
    data = sorted({m.structures for m in same})
    for colour, d in zip(colours(len(data)), data, strict=True):
        rows = [m for m in same if m.structures == d]
        left.semilogx(
            [m.parameters[0] for m in rows],
            [m.ratio for m in rows],
            "o-",
            color=colour,
            markersize=4,
            label=f"D = {short(d)}",
        )
    left.axhline(1.0, color="0.4", linewidth=0.8)
    left.set(xlabel="parameters, N", ylabel=f"{first.loss}: {names[1]} over {names[0]}")
    left.legend(fontsize=7, frameon=False)
    for analysis, marker, colour in ((first, "o", "#3b6ea5"), (second, "s", "crimson")):
        right.loglog(
            analysis.flops(),
            analysis.losses(),
            marker,
            color=colour,
            markersize=3,
            alpha=0.6,
            label=analysis.records[0].recipe,
        )
    right.set(xlabel="compute of the training, FLOP", ylabel=f"{first.loss}, {first.unit}")
    plain_ticks(right.yaxis)
    right.legend(fontsize=7, frameon=False)
    worse = sum(m.ratio < 1 for m in found)
    text = (
        f"Left: above one '{names[0]}' has the lower loss. Of {len(found)} sizes '{names[1]}' is better at "
        f"{worse}. Means over seeds; right, all runs."
    )
    return Drawn(name, title, figure, text)
