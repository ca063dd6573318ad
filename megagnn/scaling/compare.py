"""Two recipes at equal sizes, run by run, and at equal compute, frontier by frontier."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megagnn.drawing.figures import Drawn, colours, make_axes, plain_ticks, short
from megagnn.scaling.laws.analysis import Analysis
from megagnn.scaling.laws.forms import Array
from megagnn.scaling.laws.record import RunRecord
from megagnn.scaling.records import geometric_mean

Shape = tuple[int, int, int]
SAME_SIZE = 1.25
"""Models of two families are of one size if their parameters are within this factor."""


@dataclass(frozen=True)
class Match:
    """Runs of both recipes on the same data, of the same depth and steps and like parameters; means over
    seeds."""

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
    """Every size that both recipes have, by data and size: of each the other's nearest, within SAME_SIZE."""
    of = [_by_shape([*a.records, *a.other_depths]) for a in (first, second)]
    found = []
    for shape in sorted(set(of[0]) & set(of[1]), key=lambda s: (s[1], s[0])):
        sizes = list(of[0][shape]), list(of[1][shape])
        for size in sorted(sizes[0]):
            other = _nearest(size, sizes[1])
            if _nearest(other, sizes[0]) != size or not 1 / SAME_SIZE < other / size < SAME_SIZE:
                continue
            runs = of[0][shape][size], of[1][shape][other]
            losses = [geometric_mean([r.losses[first.loss][0] for r in seeds]) for seeds in runs]
            flops = [geometric_mean([r.flops for r in seeds]) for seeds in runs]
            depth, structures, _ = shape
            found.append(
                Match(depth, structures, (size, other), (flops[0], flops[1]), (losses[0], losses[1]))
            )
    return found


def _nearest(size: int, sizes: Sequence[int]) -> int:
    return min(sizes, key=lambda other: max(other / size, size / other))


def _by_shape(records: Sequence[RunRecord]) -> dict[Shape, dict[int, list[RunRecord]]]:
    """Seeds by (depth, structures, steps) and parameters."""
    found: dict[Shape, dict[int, list[RunRecord]]] = {}
    for r in records:
        sizes = found.setdefault((r.depth, r.structures, r.steps), {})
        sizes.setdefault(r.parameters, []).append(r)
    return found


@dataclass(frozen=True)
class EqualCompute:
    """Losses of two recipes at equal compute, on straight lines between the runs of each frontier."""

    flops: Array
    """(K,) rising: the compute of every run of either frontier, where they overlap, and those ends."""
    losses: tuple[Array, Array]

    def at(self, flops: float) -> tuple[float, float]:
        """Losses of both, interpolated in logarithms."""
        first, second = (np.exp(np.interp(np.log(flops), np.log(self.flops), np.log(v))) for v in self.losses)
        return float(first), float(second)

    def crossings(self) -> list[float]:
        """Compute at which the one that is behind changes."""
        x, ahead = np.log(self.flops), np.log(self.losses[1] / self.losses[0])
        changes = np.flatnonzero(ahead[:-1] * ahead[1:] < 0)
        steps = ahead[changes] / (ahead[changes] - ahead[changes + 1])
        found: list[float] = np.exp(x[changes] + steps * (x[changes + 1] - x[changes])).tolist()
        return found


def at_equal_compute(first: Analysis, second: Analysis) -> EqualCompute | None:
    """Both frontiers where they overlap; None where they do not, or one has none."""
    if first.frontier_points is None or second.frontier_points is None:
        return None
    logs = [(np.log(x), np.log(y)) for x, y in (first.frontier_points, second.frontier_points)]
    low, high = max(x[0] for x, _ in logs), min(x[-1] for x, _ in logs)
    if low >= high:
        return None
    nodes = np.unique(np.concatenate([x for x, _ in logs]).clip(low, high))
    losses = [np.exp(np.interp(nodes, x, y)) for x, y in logs]
    return EqualCompute(np.exp(nodes), (losses[0], losses[1]))


def describe(first: Analysis, second: Analysis) -> list[str]:
    """Tables of all sizes that both have, and of both frontiers at equal compute."""
    names = [a.records[0].recipe for a in (first, second)]
    lines = [
        f"{first.loss} of '{names[0]}' and '{names[1]}' at equal depth, data and steps and like parameters; "
        "the ratio is the second's over the first's:",
        f"{'depth':>6}{'data':>7}{'parameters':>22}{'FLOP':>20}{'first':>10}{'second':>10}{'ratio':>7}",
    ]
    lines += [
        f"{m.depth:>6}{m.structures:>7}{m.parameters[0]:>11,}{m.parameters[1]:>11,}{m.flops[0]:>10.2g}"
        f"{m.flops[1]:>10.2g}{m.losses[0]:>10.4g}{m.losses[1]:>10.4g}{m.ratio:>7.2f}"
        for m in matches(first, second)
    ]
    return [*lines, "", *_compute_table(names, at_equal_compute(first, second))]


def _compute_table(names: Sequence[str], both: EqualCompute | None) -> list[str]:
    if both is None:
        return [f"the frontiers of '{names[0]}' and '{names[1]}' have no compute in common"]
    ends = np.log10(both.flops[[0, -1]]) * 4  # in quarters of a decade
    lines = [
        "at equal compute, on straight lines between the runs of each frontier:",
        f"{'FLOP':>10}{'first':>10}{'second':>10}{'ratio':>7}",
    ]
    for quarter in range(int(np.ceil(ends[0])), int(np.floor(ends[1])) + 1):
        losses = both.at(10 ** (quarter / 4))
        lines.append(
            f"{10 ** (quarter / 4):>10.2g}{losses[0]:>10.4g}{losses[1]:>10.4g}{losses[1] / losses[0]:>7.2f}"
        )
    if where := both.crossings():
        return [*lines, f"they cross at {', '.join(f'{c:.2g}' for c in where)} FLOP"]
    ahead = names[0] if both.losses[1].mean() > both.losses[0].mean() else names[1]
    return [*lines, f"'{ahead}' is ahead at all of it"]


def draw(first: Analysis, second: Analysis) -> Drawn:
    """Ratio of losses by size, and both recipes' runs by compute."""
    name, title = "recipes", "Recipes at equal sizes and at equal compute"
    found, names = matches(first, second), [a.records[0].recipe for a in (first, second)]
    none_common = f"'{names[0]}' and '{names[1]}' have no size in common."
    if not found and at_equal_compute(first, second) is None:
        return Drawn(name, title, None, none_common)
    figure, (left, right) = make_axes(2)
    same = [m for m in found if first.options.depth in (None, m.depth)]
    data = sorted({m.structures for m in same})
    for colour, d in zip(colours(len(data)), data, strict=False):
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
    if same:
        left.legend(fontsize=7, frameon=False)
    for analysis, marker, colour in ((first, "o", "#3b6ea5"), (second, "s", "crimson")):
        if analysis.frontier_points is not None:
            right.loglog(*analysis.frontier_points, color=colour, linewidth=1)
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
    left_text = (
        f"Left: above one '{names[0]}' has the lower loss. Of {len(found)} sizes '{names[1]}' is better at "
        f"{worse}. Means over seeds;"
    )
    text = (
        f"{left_text if found else none_common[:-1] + ';'} right, all runs and the frontiers of their means."
    )
    return Drawn(name, title, figure, text)
