"""What all figures of scaling studies share: a figure with its caption, axes, colours, files."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Drawn:
    """A figure, or the sentence that says why there is none."""

    name: str
    """Of its files."""
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


def save_figures(drawn: Sequence[Drawn], folder: Path) -> list[Path]:
    """PNG and PDF of each figure that there is."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for one in drawn:
        if one.figure is None:
            continue
        for suffix in ("png", "pdf"):
            paths.append(folder / f"{one.name}.{suffix}")
            one.figure.savefig(paths[-1], dpi=200)
    return paths


def write_tensorboard(drawn: Sequence[Drawn], folder: Path) -> None:
    """The figures as images."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for one in drawn:
            if one.figure is not None:
                writer.add_figure(f"scaling/{one.name}", one.figure, close=False)
