"""Batches: from structures to one dict of flat tensors (see keys.py for shapes and units)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from megagnn.data import keys
from megagnn.data.arrays import Bools, Ints
from megagnn.data.neighbours import neighbour_list

if TYPE_CHECKING:
    import ase

Graph = dict[str, Any]
"""One structure ready for `collate`: the keys of keys.py as NumPy arrays without the batch axis."""


def build_graph(
    atomic_numbers: NDArray[np.integer],
    positions: NDArray[np.floating],
    cell: NDArray[np.floating],
    pbc: Bools,
    cutoff: float,
    self_edges: bool = False,
    known: tuple[Ints, Ints] | None = None,
) -> Graph:
    """One structure with its neighbour list and no labels; add labels, source and level as needed.

    Args:
        atomic_numbers: (N,); positions: (N, 3) Å; cell: (3, 3) Å; pbc: (3,) bool.
        cutoff: Å.
        self_edges: add the edge (i, i) to every atom.
        known: what `neighbour_list` would find, where that is kept.

    Raises:
        ValueError: see `neighbour_list`.
    """
    edge_index, shifts = known or neighbour_list(positions, cell, pbc, cutoff, self_edges)
    return {
        keys.ATOMIC_NUMBERS: atomic_numbers,
        keys.POSITIONS: positions,
        keys.CELL: cell if np.any(pbc) else np.zeros((3, 3)),
        keys.PBC: pbc,
        keys.EDGE_INDEX: edge_index,
        keys.CELL_SHIFTS: shifts,
    }


def collate(graphs: Sequence[Mapping[str, Any]], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Join graphs into one batch: concatenate, shift edge indices, and build the CSR and CSC row pointers.

    Args:
        graphs: from `build_graph` or a data set; may be empty, which gives a batch of no structure.
        dtype: float32 or float64, of every float tensor except the energy, which stays float64: total
            energies of 1e5 eV would lose their meV in float32. Geometry never goes below float32.

    Returns:
        Every key of keys.py. Missing labels are zero with their ``has_*`` flag False.

    Raises:
        ValueError: a dtype other than float32 or float64.
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"a batch holds geometry in float32 or float64, got {dtype}; cast inside the model instead"
        )
    counts = np.array([len(g[keys.ATOMIC_NUMBERS]) for g in graphs], dtype=np.int64)
    num_edges = np.array([g[keys.EDGE_INDEX].shape[1] for g in graphs], dtype=np.int64)
    graph_ptr = _pointer(counts)
    edge_index = _concatenate([g[keys.EDGE_INDEX] for g in graphs], (2, 0), np.int64, axis=1)
    # by rows: structures have theirs by columns, and every operation would copy both ends for itself
    edge_index = np.ascontiguousarray(edge_index + np.repeat(graph_ptr[:-1], num_edges))
    row_ptr, source_ptr, source_perm = _rows_and_sources(edge_index, int(graph_ptr[-1]))
    real = np.float64 if dtype == torch.float64 else np.float32
    arrays = {
        keys.ATOMIC_NUMBERS: _concatenate([g[keys.ATOMIC_NUMBERS] for g in graphs], (0,), np.int64),
        keys.POSITIONS: _concatenate([g[keys.POSITIONS] for g in graphs], (0, 3), real),
        keys.CELL: _stack(graphs, keys.CELL, (3, 3), real),
        keys.PBC: _stack(graphs, keys.PBC, (3,), np.bool_),
        keys.CHARGE: np.array([g.get(keys.CHARGE, 0) for g in graphs], dtype=real),
        keys.MULTIPLICITY: np.array([g.get(keys.MULTIPLICITY, 0) for g in graphs], dtype=np.int64),
        keys.BATCH: np.repeat(np.arange(len(graphs)), counts),
        keys.NUM_ATOMS: counts,
        keys.GRAPH_PTR: graph_ptr,
        keys.EDGE_INDEX: edge_index,
        keys.CELL_SHIFTS: _concatenate([g[keys.CELL_SHIFTS] for g in graphs], (0, 3), real),
        keys.ROW_PTR: row_ptr,
        keys.SOURCE_PTR: source_ptr,
        keys.SOURCE_PERM: source_perm,
        **{name: _label(graphs, name, counts, real) for name in keys.LABELS},
        **{
            keys.has(k): np.array([g.get(k) is not None for g in graphs], dtype=np.bool_) for k in keys.LABELS
        },
        keys.WEIGHTS: _stack(graphs, keys.WEIGHTS, (3,), real, missing=1),
        keys.FIXED: _per_atom(graphs, keys.FIXED, counts, (), np.bool_),
        keys.SOURCE: np.array([g.get(keys.SOURCE, 0) for g in graphs], dtype=np.int64),
        keys.LEVEL: np.array([g.get(keys.LEVEL, 0) for g in graphs], dtype=np.int64),
        keys.STRUCTURE: np.array([g.get(keys.STRUCTURE, i) for i, g in enumerate(graphs)], dtype=np.int64),
    }
    return {key: torch.from_numpy(array) for key, array in arrays.items()}


def batch_from_atoms(
    atoms: Sequence[ase.Atoms], cutoff: float, dtype: torch.dtype = torch.float64, self_edges: bool = False
) -> dict[str, Tensor]:
    """A batch without labels from ASE atoms, for use in simulation.

    Raises:
        ValueError: see `neighbour_list`.
    """
    graphs = [build_graph(a.numbers, a.positions, a.cell.array, a.pbc, cutoff, self_edges) for a in atoms]
    return collate(graphs, dtype)


def _pointer(counts: Ints) -> Ints:
    pointer = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=pointer[1:])
    return pointer


def _rows_and_sources(edge_index: Ints, num_atoms: int) -> tuple[Ints, Ints, Ints]:
    """CSR row pointer, CSC pointer, and the stable sort of the edges by source."""
    row_ptr = _pointer(np.bincount(edge_index[0], minlength=num_atoms))
    source_ptr = _pointer(np.bincount(edge_index[1], minlength=num_atoms))
    return row_ptr, source_ptr, np.argsort(edge_index[1], kind="stable")


def _concatenate(
    arrays: list[NDArray[Any]], empty_shape: tuple[int, ...], dtype: DTypeLike, axis: int = 0
) -> NDArray[Any]:
    if not arrays:
        return np.zeros(empty_shape, dtype=dtype)
    return np.concatenate(arrays, axis=axis, dtype=dtype, casting="unsafe")


def _stack(
    graphs: Sequence[Mapping[str, Any]], key: str, shape: tuple[int, ...], dtype: DTypeLike, missing: int = 0
) -> NDArray[Any]:
    """(B, *shape), `missing` where a graph has no such entry."""
    stacked = np.full((len(graphs), *shape), missing, dtype=dtype)
    for i, graph in enumerate(graphs):
        value = graph.get(key)
        if value is not None:
            stacked[i] = value
    return stacked


def _label(graphs: Sequence[Mapping[str, Any]], name: str, counts: Ints, real: DTypeLike) -> NDArray[Any]:
    """A label of all atoms or structures, zero where a graph has none."""
    label = keys.LABELS[name]
    dtype = np.float64 if label.stored == "<f8" else real
    if label.per_atom:
        return _per_atom(graphs, name, counts, label.shape, dtype)
    return _stack(graphs, name, label.shape, dtype)


def _per_atom(
    graphs: Sequence[Mapping[str, Any]], key: str, counts: Ints, shape: tuple[int, ...], dtype: DTypeLike
) -> NDArray[Any]:
    """(N, *shape), zero for the atoms of graphs without such an entry."""
    parts = []
    for graph, count in zip(graphs, counts, strict=True):
        value = graph.get(key)
        parts.append(np.zeros((count, *shape), dtype=dtype) if value is None else value)
    return _concatenate(parts, (0, *shape), dtype)
