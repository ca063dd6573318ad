"""Pictures of the memory table: what each row's peak is made of, and the course of one step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tools.bench.memory import events as memory

# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = {
    memory.PARAMETERS: "#0072B2",
    memory.GRADIENTS: "#E69F00",
    memory.STATE: "#009E73",
    memory.FILES: "#56B4E9",
    memory.MESSAGES: "#D55E00",
    memory.ACTIVATIONS: "#BBBBBB",
}
# Of what is marked; waiting for the last messages is not.
SHORT = {"forward": "F", "forward of pairs": "F'", "backward": "B", "optimizer": "S"}
MARKS = "F: forward, with the forces; F': forward of pairs; B: backward; S: optimizer"
COLUMNS = 4


def draw(records: list[dict[str, Any]], title: str, path: Path) -> None:
    """The records of one table, in its order, to a picture (png, pdf)."""
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    rows = -(-len(records) // COLUMNS)
    figure = plt.figure(figsize=(14, 3.4 + 2.5 * rows), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[3.4, 2.5 * rows])
    everything, small = top.subplots(1, 2, width_ratios=[3, 2])
    bars(everything, records, zoom=False)
    bars(small, records, zoom=True)
    axes = bottom.subplots(rows, COLUMNS, squeeze=False).flatten()
    for index, (axis, record) in enumerate(zip(axes, records, strict=False)):
        course(axis, record)
        if index % COLUMNS == 0:
            axis.set_ylabel("MB")
        if index + COLUMNS >= len(records):
            axis.set_xlabel("time in the step, s")
    for axis in axes[len(records) :]:
        axis.axis("off")
    handles = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(f"{title}\n{MARKS}", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def bars(axis: Any, records: list[dict[str, Any]], zoom: bool) -> None:
    """What the peaks are made of; zoomed, as far as the highest of the rows below half of the first."""
    totals = [record["peak_bytes"] / 1e6 for record in records]
    place = np.arange(len(records))
    left = np.zeros(len(records))
    for category, colour in COLOURS.items():
        values = np.array([record["at_peak"][category] / 1e6 for record in records])
        axis.barh(place, values, left=left, color=colour, height=0.75)
        left += values
    below = [total for total in totals if total < 0.5 * totals[0]]
    limit = 1.25 * max(below) if zoom and below else 1.2 * max(totals)
    for index, total in enumerate(totals):
        text = f"{total:.3g}" if zoom else f"{total:.3g}  ({total / totals[0]:.2f})"
        if total < 0.9 * limit:
            axis.text(total + 0.01 * limit, index, text, va="center", fontsize=8)
    axis.set_xlim(0, limit)
    axis.set_yticks(place, [] if zoom else [record["row"] for record in records], fontsize=9)
    axis.invert_yaxis()
    axis.set_xlabel("MB, the same enlarged" if zoom else "MB of a rank at its peak (share of plain)")
    axis.spines[["top", "right"]].set_visible(False)


def course(axis: Any, record: dict[str, Any]) -> None:
    """One step: what each category holds, with its phases."""
    line = record["timeline"]
    stack = [line.num_bytes[category] / 1e6 for category in COLOURS]
    polys = axis.stackplot(line.seconds, stack, colors=list(COLOURS.values()), linewidth=0, step="post")
    for poly in polys:
        poly.set_rasterized(True)
    highest, end = float(line.total.max()) / 1e6, float(line.seconds[-1])
    axis.set(xlim=(0, end), ylim=(0, 1.2 * highest))
    axis.set_title(f"{record['row']}: {highest:.3g} MB", fontsize=9, loc="left")
    for name, start, stop in line.phases:
        label = SHORT.get(name, "")
        if not label:
            continue
        axis.axvline(start, color="black", linewidth=0.6, linestyle=":")
        axis.axvline(stop, color="black", linewidth=0.6, linestyle=":")
        centre = min(0.5 * (start + stop), 0.98 * end)
        axis.text(centre, 1.1 * highest, label, ha="center", va="center", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
