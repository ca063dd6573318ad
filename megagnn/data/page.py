"""`megagnn inspect STORE --html PAGE`: figures of a store, and its farthest structures, as one page."""

import html
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
from ase.data import chemical_symbols
from matplotlib.colors import LogNorm
from matplotlib.patches import Rectangle

import megagnn
from megagnn.data import keys
from megagnn.data.formats.groups import symbols
from megagnn.data.inspect import baseline_of, describe
from megagnn.data.picture import picture
from megagnn.data.store import Store
from megagnn.data.survey import DISTANCE_BINS, FORCE_BINS, MEASURES, Survey, survey
from megagnn.drawing import pages
from megagnn.drawing.figures import Drawn, make_axes, short

CUTOFF = 5.0
"""Å, of edges, unless another is asked for."""
NUM_SAMPLED = 5000
"""Structures of each source: a minute or so of neighbour lists for ten sources."""
NUM_FARTHEST = 3
"""Structures shown of each measure."""
NUM_BINS = 60
TAIL = 0.001
"""Share of the structures beyond each end of an axis; they count in the outermost bins."""

STYLE = """
.frames { display: flex; flex-wrap: wrap; gap: 1rem; }
.frame { border: 1px solid #ddd; border-radius: 4px; padding: .5rem; width: 206px; font-size: .8rem;
  line-height: 1.35; overflow-wrap: anywhere; }
.frame:target { border-color: #c60; box-shadow: 0 0 0 2px #c60; } .frame p { margin: .3rem 0 0; }
"""


def write_page(store: Store, path: Path, cutoff: float = CUTOFF, num_sampled: int = NUM_SAMPLED) -> None:
    """Write the page of a store.

    Args:
        path: of the page.
        cutoff: Å, of edges.
        num_sampled: structures of each source that are looked at, evenly over all.

    Raises:
        ValueError: see `survey`.
    """
    known = baseline_of(store, store.isolated_atoms())
    parts = [
        f"<p>Edges within {cutoff:g} Å. Energies are per atom, less reference energies of the training split "
        "(and the mean bond energy where those are of isolated atoms). What a figure does not reach counts "
        f"in its outermost bins. Made by megagnn {megagnn.__version__}.</p>",
        f"<details open><summary>In words</summary><pre>{html.escape(describe(store))}</pre></details>",
    ]
    for number, found in enumerate(survey(store, known, cutoff, num_sampled)):
        parts += _of_source(store, found, number)
    text = pages.page(f"{store.path.name}: {len(store):,} structures", parts, STYLE)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _of_source(store: Store, found: Survey, number: int) -> Iterator[str]:
    whole = len(found.rows) == found.num_structures
    said = "all" if whole else f"a sample of {len(found.rows):,}, evenly over all,"
    yield f"<h2>{html.escape(found.source)}</h2>"
    yield f"<p>{found.num_structures:,} structures, of which {said} are shown.</p>"
    yield pages.figure(
        Drawn("elements", "Elements", _periodic_table(found), "Atoms of each element in the sample.")
    )
    yield pages.figure(_histograms(found))
    yield from _farthest(store, found, number)


def place_of(z: int) -> tuple[int, int]:
    """Row and column of an element in the long-known table; lanthanides and actinides in rows 7 and 8."""
    if z in (1, 2):
        return 0, 0 if z == 1 else 17
    starts = {1: 3, 2: 11, 3: 19, 4: 37, 5: 55, 6: 87}
    row = max(r for r, start in starts.items() if z >= start)
    k = z - starts[row]
    if row <= 2:
        return row, k if k < 2 else k + 10
    if row >= 5:
        if 2 <= k <= 16:
            return row + 2, k
        return row, k if k < 2 else k - 14
    return row, k


def _periodic_table(found: Survey) -> matplotlib.figure.Figure:
    figure, (ax,) = make_axes()
    figure.set_size_inches(8.4, 4.2)
    present = found.atoms[found.atoms > 0]
    norm, colour_map = (
        LogNorm(max(1, present.min() * 0.7), present.max() * 1.3),
        matplotlib.colormaps["viridis"],
    )
    for z in range(1, 119):
        row, column = place_of(z)
        count = int(found.atoms[z])
        colour = colour_map(norm(count)) if count else "#f2f2f2"
        ax.add_patch(Rectangle((column, -row), 0.94, 0.94, facecolor=colour))
        light = count > 0 and norm(count) > 0.6
        ink = ("#222" if light else "white") if count else "#aaa"
        ax.text(
            column + 0.47, 0.6 - row, chemical_symbols[z], ha="center", va="center", fontsize=8, color=ink
        )
        if count:
            ax.text(column + 0.47, 0.22 - row, short(count), ha="center", va="center", fontsize=5, color=ink)
    ax.set(xlim=(0, 18), ylim=(-8, 1), aspect="equal")
    ax.axis("off")
    return figure


def _histograms(found: Survey) -> Drawn:
    figure, axes = make_axes(2, 3)
    figure.set_size_inches(8.4, 8.4)
    panels = (("atoms", "atoms of a structure"), ("edges", MEASURES["edges"]), ("energy", MEASURES["energy"]))
    for ax, (measure, label) in zip(axes, panels, strict=False):
        values = found.values[measure][np.isfinite(found.values[measure])]
        if len(values):
            low, high = np.quantile(values, [TAIL, 1 - TAIL])
            ax.hist(np.clip(values, low, high), bins=_bins(low, high, measure == "atoms"), color="#3b6ea5")
            if measure == "energy":
                ax.set_yscale("log")
        ax.set(xlabel=label, ylabel="structures")
    bins = (
        (FORCE_BINS, found.force_counts, "force of an atom, eV/Å"),
        (DISTANCE_BINS, found.distance_counts, "nearest neighbour over the sum of covalent radii"),
    )
    for ax, (edges, counts, label) in zip(axes[3:], bins, strict=False):
        there = np.flatnonzero(counts)
        ax.stairs(counts, edges, fill=True, color="#3b6ea5")
        ax.set(xlabel=label, ylabel="atoms", yscale="log")
        if len(there):
            ax.set_xlim(edges[max(0, there[0] - 1)], edges[min(len(edges) - 1, there[-1] + 2)])
    axes[3].set_xscale("log")
    ax, energies, forces = axes[5], found.values["energy"], found.values["force"]
    ax.scatter(energies, forces, s=4, alpha=0.4, color="#3b6ea5", linewidths=0, rasterized=True)
    ax.set(xlabel=MEASURES["energy"], ylabel=MEASURES["force"])
    return Drawn(
        "labels",
        "Sizes, labels and distances",
        figure,
        "Last: each structure of the sample with both labels.",
    )


def _bins(low: float, high: float, whole: bool) -> list[float]:
    """Edges of sixty bins or fewer; of whole numbers each bin holds as many of them."""
    if whole:
        width = max(1, -(-int(high - low + 1) // NUM_BINS))
        return [edge - 0.5 for edge in range(int(low), int(high) + width + 1, width)]
    edges: list[float] = np.linspace(low, max(high, low + 1e-6 * max(1.0, abs(low))), NUM_BINS + 1).tolist()
    return edges


def _farthest(store: Store, found: Survey, number: int) -> Iterator[str]:
    """A table of the structures farthest from the others, and a card of each with its picture."""
    rows: list[tuple[str, ...]] = []
    cards: dict[int, list[str]] = {}
    for measure, words in MEASURES.items():
        for row, value, score in found.farthest(measure, NUM_FARTHEST):
            link = f'<a href="#s{number}-{row}">structure {row:,}</a>'
            rows.append(
                (html.escape(words), link, f"{value:.4g}", f"{score:+.1f}" if np.isfinite(score) else "-")
            )
            cards.setdefault(row, []).append(f"{words}: {value:.4g}")
    yield "<h3>Farthest from the others</h3>"
    yield pages.table(("of", "structure", "value", "robust standard deviations"), rows)
    yield '<div class="frames">'
    for row, told in sorted(cards.items()):
        s = store.structure(row)
        numbers = s[keys.ATOMIC_NUMBERS].astype(np.int64)
        positions, cell = s[keys.POSITIONS].astype(np.float64), s[keys.CELL].astype(np.float64)
        image = picture(numbers, positions, cell, s[keys.PBC]) or "<p>(too many atoms for a picture)</p>"
        lines = [f"<b>structure {row:,}</b>, {symbols(numbers)}", *told]
        named = {"file": store.file_of(row), "kind": store.config_type_of(row)}
        lines += [f"{name}: {value}" for name, value in named.items() if value]
        text = "".join(
            f"<p>{line if line.startswith('<b>') else html.escape(str(line))}</p>" for line in lines
        )
        yield f'<div class="frame" id="s{number}-{row}">{image}{text}</div>'
    yield "</div>"
