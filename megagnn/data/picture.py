"""A picture of one structure: atoms and bonds, projected, as SVG."""

import itertools

import numpy as np
from ase.data import chemical_symbols, covalent_radii
from ase.data.colors import jmol_colors
from numpy.typing import NDArray

from megagnn.data.arrays import Bools, Floats
from megagnn.data.neighbours import neighbour_list

SIZE, MARGIN = 206, 8
"""Pixels of a picture, and of the room at its edge."""
BOND = 1.25
"""Atoms nearer than so many sums of covalent radii are joined."""
MAX_ATOMS = 600
"""Of larger structures there is none: the page would grow by a tenth of a megabyte with each."""
OBLIQUE = np.radians([-78.0, 18.0])
"""Turns about x and y, in which cells are seen."""


def picture(numbers: NDArray[np.integer], positions: Floats, cell: Floats, pbc: Bools) -> str:
    """An SVG element of (N,) atoms at (N, 3), Å; periodic ones in their cell, seen from the side.

    Molecules are seen along the direction in which they are thinnest. Empty where there are too many atoms.
    """
    if len(numbers) > MAX_ATOMS:
        return ""
    periodic = np.asarray(pbc, dtype=bool)
    edges = _cell_edges(cell) if periodic.all() else np.zeros((0, 2, 3))
    centre = positions.mean(axis=0)
    turn = _oblique() if periodic.any() else _principal(positions - centre)
    xyz, ends = (positions - centre) @ turn, (edges - centre) @ turn
    radii = 0.55 * covalent_radii[numbers]
    points = np.concatenate(
        [xyz[:, :2] - radii[:, None], xyz[:, :2] + radii[:, None], ends[:, :, :2].reshape(-1, 2)]
    )
    low, extent = points.min(axis=0), max(float(np.ptp(points, axis=0).max()), 1e-9)
    scale = (SIZE - 2 * MARGIN) / extent
    shift = (SIZE - scale * np.ptp(points, axis=0)) / 2

    def place(values: Floats) -> Floats:
        found = scale * (values[..., :2] - low) + shift
        found[..., 1] = SIZE - found[..., 1]
        return found

    drawn = [
        (float(z[:, 2].min()) - 1e3, _line(p, "#999", 0.8, "3 2"))
        for z, p in zip(ends, place(ends), strict=True)
    ]
    at = place(xyz)
    for i, j in _bonds(numbers, positions, periodic):
        drawn.append(
            (float(min(xyz[i, 2], xyz[j, 2])), _line(at[[i, j]], "#777", max(1.2, 0.12 * scale), ""))
        )
    for k, number in enumerate(numbers.tolist()):
        colour = "#" + "".join(f"{round(255 * c):02x}" for c in jmol_colors[number])
        circle = f'<circle cx="{at[k, 0]:.1f}" cy="{at[k, 1]:.1f}" r="{max(1.5, scale * radii[k]):.1f}"'
        title = f"<title>{chemical_symbols[number]} {k}</title>"
        drawn.append(
            (float(xyz[k, 2]), f'{circle} fill="{colour}" stroke="#333" stroke-width=".6">{title}</circle>')
        )
    body = "".join(text for _, text in sorted(drawn, key=lambda entry: entry[0]))
    return f'<svg width="{SIZE}" height="{SIZE}" viewBox="0 0 {SIZE} {SIZE}" role="img">{body}</svg>'


def _line(ends: Floats, colour: str, width: float, dashes: str) -> str:
    (x1, y1), (x2, y2) = ends
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    place = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {place} stroke="{colour}" stroke-width="{width:.1f}"{dashed}/>'


def _bonds(numbers: NDArray[np.integer], positions: Floats, periodic: Bools) -> list[tuple[int, int]]:
    """Pairs within one image; what crosses a face of the cell is not drawn."""
    radii = covalent_radii[numbers]
    cutoff = 2 * BOND * float(radii.max())
    (i, j), _ = neighbour_list(positions, np.zeros((3, 3)), np.zeros(3, dtype=bool), cutoff)
    lengths = np.linalg.norm(positions[j] - positions[i], axis=1)
    near = (i < j) & (lengths < BOND * (radii[i] + radii[j]))
    return list(zip(i[near].tolist(), j[near].tolist(), strict=True))


def _cell_edges(cell: Floats) -> Floats:
    """(12, 2, 3) both ends of the edges of a cell."""
    corners = np.array(list(itertools.product((0, 1), repeat=3)))
    pairs = [(a, b) for a in range(8) for b in range(a) if np.abs(corners[a] - corners[b]).sum() == 1]
    return np.asarray((corners @ cell)[np.array(pairs)])


def _oblique() -> Floats:
    (a, b), none = OBLIQUE, 0.0
    about_x = np.array([[1, none, none], [none, np.cos(a), np.sin(a)], [none, -np.sin(a), np.cos(a)]])
    about_y = np.array([[np.cos(b), none, -np.sin(b)], [none, 1, none], [np.sin(b), none, np.cos(b)]])
    return np.asarray(about_x @ about_y)


def _principal(relative: Floats) -> Floats:
    """(3, 3) columns: the longest direction first, the thinnest last, towards the eye; no mirror image."""
    _, vectors = np.linalg.eigh(relative.T @ relative)
    turn = np.asarray(vectors[:, ::-1])
    return turn * np.linalg.det(turn).round()
