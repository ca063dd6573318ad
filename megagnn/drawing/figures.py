"""Common parts of figures: a figure with its caption, axes, colours, files."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter


@dataclass(frozen=True)
class Drawn:
    """A figure, or the sentence that says why there is none."""

    name: str
    """Name of its files."""
    title: str
    figure: Figure | None
    text: str
    """Caption, or what is missing."""


def make_axes(columns: int = 1, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure and its axes, row by row."""
    figure = Figure(figsize=(6.0 if columns == 1 else 8.4, 3.9 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes:
        ax.grid(True, which="major", alpha=0.25, linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def colours(count: int) -> Iterable[Any]:
    """So many colours that rise in lightness."""
    return matplotlib.colormaps["viridis"](np.linspace(0.0, 0.88, max(count, 1)))


def short(value: float) -> str:
    """1.2k, 3.4M: numbers in legends."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


class _Plain(LogFormatter):  # type: ignore[misc,unused-ignore]
    """Its choice of ticks that have a label, in plain numbers."""

    def _num_to_string(self, x: float, vmin: float, vmax: float) -> str:
        return f"{x:.3g}"


def plain_ticks(axis: Axis) -> None:
    """0.2, 0.4 in place of powers of ten, on a logarithmic axis that may hold no whole decade."""
    axis.set_major_formatter(_Plain())
    axis.set_minor_formatter(_Plain(minor_thresholds=(2.0, 0.5)))
    axis.set_tick_params(which="minor", labelsize="small")


def save_figures(drawn: Sequence[Drawn], folder: Path) -> list[Path]:
    """PNG and PDF of each figure that there is."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for one in drawn:
        if one.figure is None:
            continue
        for suffix in ("png", "pdf"):
            paths.append(folder / f"{one.name}.{suffix}")
            # without a date the file of the same runs is the same
            one.figure.savefig(
                paths[-1], dpi=200, metadata={"CreationDate": None} if suffix == "pdf" else None
            )
    return paths


def write_tensorboard(drawn: Sequence[Drawn], folder: Path) -> None:
    """The figures of a scaling study as images."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for one in drawn:
            if one.figure is not None:
                writer.add_figure(f"scaling/{one.name}", one.figure, close=False)
