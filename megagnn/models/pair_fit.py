"""Pair potentials fitted to the training split before a network sees it (docs/model.md, "Pair potentials").

The potential of elements a and b at a level of theory is phi(d) = f_c(d) sum_k w_k b_k(d), with the envelope
f_c and splines b of models/radial.py. Forces are linear in the weights, as energies are in the weights and
in constants of the elements, so both are found by one sparse least-squares problem, which is solved three
times for its errors to count as absolute ones do (iteratively reweighted least squares: Huber, "Robust
Statistics", 1981, section 7.8).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import lsmr

from megagnn.data import keys
from megagnn.data.arrays import Floats, Ints
from megagnn.data.dataset import StructureDataset
from megagnn.models.parts import DISTANCE_EPSILON
from megagnn.models.radial import CubicSplines, envelope

MOST_EDGES = 500_000
"""Of each level of theory in the fit; structures beyond are left out, drawn at random, always the same."""
FEWEST_STRUCTURES = 10
"""Of each element in each source and level, however many edges they have: a source without a structure in the
fit would have no constants."""
ROUNDS, MOST_ITERATIONS = 3, 100
# In units of the root mean square of the forces: errors below count as squares; then the weight of an energy
# per atom beside a force component, and what keeps apart what data do not tell: second differences of the
# weights along the distance, and the weights themselves.
SQUARE_BELOW, ENERGY_WEIGHT, BEND, SIZE = 0.15, 10.0, 1.0, 0.1


def pair_splines(num_splines: int, cutoff: float) -> CubicSplines:
    """The splines of pair potentials; their size, that of eight Bessel functions, is part of the fit."""
    return CubicSplines(num_splines, 8, cutoff)


def pair_index(first: Any, second: Any) -> Any:
    """Number of a pair of elements, whichever comes first, from their numbers, arrays or tensors."""
    low, high = (first + second - abs(first - second)) // 2, (first + second + abs(first - second)) // 2
    return high * (high + 1) // 2 + low


@dataclass(frozen=True)
class PairFit:
    """What a fit found.

    Attributes:
        weights: (levels, pairs, K), eV; zero for pairs that are never neighbours.
        constants: (num_sources, elements), eV: of the pairs' energies in a source what goes with the
            composition, which its references hold and which is subtracted from them.
        forces_left, energies_left: root mean squares of what they leave, eV/Å and eV per atom.
    """

    weights: Floats
    constants: Floats
    forces_left: float
    energies_left: float


def fit_pairs(
    dataset: StructureDataset, elements: Ints, references: Floats, num_splines: int, by_level: bool
) -> PairFit:
    """Pair potentials of the structures of a data set.

    Args:
        elements: atomic numbers of the data set, ascending.
        references: energy of an atom of each element in each source, eV, (num_sources, 119).
        num_splines: K.
        by_level: one for each level of theory, else one for all.
    """
    levels = len(dataset.levels) if by_level else 1
    weights = np.zeros((levels, len(elements) * (len(elements) + 1) // 2, num_splines))
    left: list[tuple[Floats, Floats]] = []
    energies: list[tuple[Ints, Floats, Floats]] = []
    for level, graphs in enumerate(_samples(dataset, levels)):
        if not graphs:
            continue
        system = System.of(graphs, elements, references, pair_splines(num_splines, dataset.cutoff))
        found, *errors = system.solve(len(weights[level]))
        weights[level] = found.reshape(-1, num_splines)
        left.append((errors[0], errors[1]))
        energies.append((system.sources, system.compositions.toarray(), system.of_energies @ found))
    of_source, shares, per_atom = (np.concatenate(parts) for parts in zip(*energies, strict=True))
    constants = np.zeros((len(dataset.sources), len(elements)))
    for source in np.unique(of_source):
        mine = of_source == source
        constants[source] = np.linalg.lstsq(shares[mine], per_atom[mine], rcond=1e-9)[0]
    return PairFit(
        weights, constants, *(_root_mean_square(np.concatenate(x)) for x in zip(*left, strict=True))
    )


def _samples(dataset: StructureDataset, levels: int) -> Iterator[list[dict[str, Any]]]:
    """Graphs of each level of theory, up to `MOST_EDGES` but for `FEWEST_STRUCTURES`."""
    order = np.random.default_rng(0).permutation(len(dataset))
    always = np.zeros(len(dataset), dtype=np.bool_)
    always[dataset.first_with_elements(np.argsort(order), FEWEST_STRUCTURES)] = True
    level_S = dataset.level_numbers() if levels > 1 else np.zeros(len(dataset), dtype=np.int64)
    for level in range(levels):
        mine = order[level_S[order] == level]
        first = np.argsort(~always[mine], kind="stable")
        edges = dataset.num_edges[mine[first]]
        taken = always[mine]
        taken[first] |= np.cumsum(edges) - edges < MOST_EDGES
        yield [dict(dataset[index]) for index in mine[taken]]


@dataclass(frozen=True)
class System:
    """The least-squares problem of one level of theory: what forces and energies are of the weights, and the
    labels, eV/Å and, above the references, eV per atom."""

    of_forces: sparse.csr_matrix
    forces: Floats
    of_energies: sparse.csr_matrix
    """Of all structures, whether or not they have an energy."""
    compositions: sparse.csr_matrix
    """Shares of the elements, (S, elements)."""
    has_energy: Ints
    """Which structures have one."""
    sources: Ints
    energies: Floats
    num_splines: int

    @classmethod
    def of(
        cls, graphs: Sequence[dict[str, Any]], elements: Ints, references: Floats, splines: CubicSplines
    ) -> "System":
        counts = np.array([len(g[keys.ATOMIC_NUMBERS]) for g in graphs])
        first = np.cumsum(counts) - counts
        numbers = np.concatenate([g[keys.ATOMIC_NUMBERS] for g in graphs]).astype(np.int64)
        kind, of_atom = np.searchsorted(elements, numbers), np.repeat(np.arange(len(graphs)), counts)
        index = np.concatenate([g[keys.EDGE_INDEX] + at for g, at in zip(graphs, first, strict=True)], 1)
        r_EC = np.concatenate([_differences(g) for g in graphs])
        d_E = torch.from_numpy(np.sqrt((r_EC**2).sum(1) + DISTANCE_EPSILON**2)).requires_grad_()
        values, start = splines(d_E)
        values = values * envelope(d_E, splines.cutoff).unsqueeze(-1)
        slopes = np.stack(
            [torch.autograd.grad(v.sum(), d_E, retain_graph=True)[0].numpy() for v in values.unbind(-1)], -1
        )
        size = len(elements) * (len(elements) + 1) // 2 * splines.num_splines
        pair_E1 = pair_index(kind[index[0]], kind[index[1]])[:, None]
        column_E4 = pair_E1 * splines.num_splines + start.numpy()[:, None] + np.arange(4)
        unit_EC = r_EC / d_E.detach().numpy()[:, None]
        component_EC = 3 * index[0][:, None] + np.arange(3)
        of_forces = _matrix(
            slopes[:, None] * unit_EC[..., None],
            component_EC[..., None],
            column_E4[:, None],
            (3 * len(numbers), size),
        )
        per_atom_E1 = 0.5 / counts[of_atom[index[0]]][:, None]
        of_energies = _matrix(
            values.detach().numpy() * per_atom_E1, of_atom[index[0]][:, None], column_E4, (len(graphs), size)
        )
        compositions = _matrix(1.0 / counts[of_atom], of_atom, kind, (len(graphs), len(elements)))
        sources = np.array([g[keys.SOURCE] for g in graphs])
        known = np.bincount(of_atom, references[sources[of_atom], numbers], minlength=len(graphs))
        has_energy = np.flatnonzero([_counts(g, keys.ENERGY) for g in graphs])
        energies = np.array([graphs[k][keys.ENERGY] for k in has_energy.tolist()])
        energies = (energies - known[has_energy]) / counts[has_energy]
        free = np.concatenate([~g[keys.FIXED] & _counts(g, keys.FORCES) for g in graphs]).repeat(3)
        forces = np.concatenate([_forces(g) for g in graphs]).ravel()
        return cls(
            of_forces[free],
            forces[free],
            of_energies,
            compositions,
            has_energy,
            sources,
            energies,
            splines.num_splines,
        )

    def solve(self, num_pairs: int) -> tuple[Floats, Floats, Floats]:
        """The weights, and errors of forces and of energies per atom."""
        columns, scale = self.of_forces.shape[1], self._scale()
        mine = self.sources[self.has_energy]
        # energies also may be moved by what goes with the composition in each source
        of_sources = [
            sparse.diags((mine == s).astype(float)) @ self.compositions[self.has_energy]
            for s in np.unique(mine)
        ]
        of_energies = sparse.hstack([self.of_energies[self.has_energy], *of_sources]).tocsr()
        extra = of_energies.shape[1] - columns
        bend = sparse.kron(sparse.eye(num_pairs), np.diff(np.eye(self.num_splines), 2, axis=0))
        priors = sparse.vstack([BEND * bend, SIZE * sparse.eye(columns)])
        squares = np.asarray(self.of_forces.multiply(self.of_forces).sum(0)).ravel()
        norms = np.concatenate([np.sqrt(squares + 1.0), np.ones(extra)])
        per_force, solution = np.ones(len(self.forces)), np.zeros(columns + extra)
        errors = (self.forces, self.energies)
        for _ in range(ROUNDS):
            upper = sparse.vstack([sparse.diags(per_force) @ self.of_forces, priors])
            blocks = [
                [upper, None],
                [ENERGY_WEIGHT * of_energies[:, :columns], ENERGY_WEIGHT * of_energies[:, columns:]],
            ]
            matrix = (sparse.bmat(blocks) if extra else upper).tocsr() @ sparse.diags(1 / norms)
            labels = [per_force * self.forces, np.zeros(priors.shape[0]), ENERGY_WEIGHT * self.energies]
            wanted = np.concatenate(labels) / scale
            start, limits = solution * norms / scale, {"atol": 1e-5, "btol": 1e-5, "conlim": 0}
            solution = lsmr(matrix, wanted, x0=start, maxiter=MOST_ITERATIONS, **limits)[0] / norms * scale
            errors = (
                self.forces - self.of_forces @ solution[:columns],
                self.energies - of_energies @ solution,
            )
            per_force = np.maximum(np.abs(errors[0]) / scale, SQUARE_BELOW) ** -0.5
        return solution[:columns], *errors

    def _scale(self) -> float:
        return _root_mean_square(self.forces) or _root_mean_square(self.energies) or 1.0


def _root_mean_square(x: Floats) -> float:
    return float(np.sqrt(np.mean(x**2))) if len(x) else 0.0


def _matrix(values: Any, rows: Any, columns: Any, shape: tuple[int, int]) -> sparse.csr_matrix:
    values, rows, columns = np.broadcast_arrays(values, rows, columns)
    return sparse.csr_matrix((values.ravel(), (rows.ravel(), columns.ravel())), shape=shape)


def _differences(graph: dict[str, Any]) -> Floats:
    """r_ij of its edges, Å, (E, 3)."""
    positions = np.asarray(graph[keys.POSITIONS], dtype=np.float64)
    i, j = graph[keys.EDGE_INDEX]
    shift = np.asarray(graph[keys.CELL_SHIFTS], dtype=np.float64) @ np.asarray(
        graph[keys.CELL], dtype=np.float64
    )
    found: Floats = positions[j] + shift - positions[i]
    return found


def _counts(graph: dict[str, Any], label: str) -> bool:
    """Whether a graph has a label that is not of weight zero."""
    weights = graph.get(keys.WEIGHTS)
    return label in graph and (weights is None or weights[list(keys.LABELS).index(label)] > 0)


def _forces(graph: dict[str, Any]) -> Floats:
    shape = (len(graph[keys.ATOMIC_NUMBERS]), 3)
    return np.asarray(graph.get(keys.FORCES, np.zeros(shape)), dtype=np.float64)
