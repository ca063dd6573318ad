"""Inputs of the edge operation that its tests use, and what they compare: values and gradients."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megagnn.models.egnn.edge import EdgeGraph, EdgeSpec, EdgeWeights
from megagnn.ops import Segments

# The module: megagnn.models.egnn.edge.message is the function.
MODULE = sys.modules["megagnn.models.egnn.edge.runner"]
Operation = Callable[..., tuple[Tensor, Tensor | None]]


class Widths(NamedTuple):
    """Numbers of distance features, hidden features, message features and features of the vector branch."""

    R: int = 6
    H: int = 8
    M: int = 8
    K: int = 8


@dataclass(frozen=True)
class Case:
    """Arguments of `edge_message` but the spec."""

    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None]
    weights: EdgeWeights
    graph: EdgeGraph

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers in another type."""
        inputs: Any = tuple(None if t is None else t.to(dtype) for t in self.inputs)
        return Case(
            inputs, EdgeWeights(*[None if t is None else t.to(dtype) for t in self.weights]), self.graph
        )

    def leaves(self) -> Case:
        """Copies that require gradients, the centres excepted."""
        inputs: Any = tuple(_leaf(t) for t in self.inputs)
        return Case(inputs, EdgeWeights(self.weights[0], *map(_leaf, self.weights[1:])), self.graph)

    def differentiable(self) -> list[Tensor]:
        """Inputs and weights that are there, without the centres."""
        return [t for t in (*self.inputs, *self.weights[1:]) if t is not None]

    def present_inputs(self) -> list[Tensor]:
        """p, q, r and, if there is one, the envelope."""
        return [t for t in self.inputs if t is not None]


def _leaf(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone().requires_grad_()


def graph_of(destination: Tensor, source: Tensor, num_atoms: int) -> EdgeGraph:
    """Both ends as segments; the edges must be sorted by destination."""

    def pointers(index: Tensor) -> Tensor:
        counts = torch.bincount(index, minlength=num_atoms)
        return torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    return EdgeGraph(
        Segments(destination, pointers(destination)),
        Segments(source, pointers(source), source.argsort(stable=True)),
    )


def random_graph(num_atoms: int = 20, num_edges: int = 150, seed: int = 0) -> EdgeGraph:
    """Rows of uneven length; every third atom has no neighbours and is nobody's."""
    generator = torch.Generator().manual_seed(seed)

    def ends() -> Tensor:
        index = (torch.rand(num_edges, generator=generator) ** 2 * num_atoms).long()
        return index - (index % 3 == 1).long()

    return graph_of(ends().sort().values, ends(), num_atoms)


def random_case(
    graph: EdgeGraph | None = None,
    widths: Widths | None = None,
    *,
    vector: bool = True,
    envelope: bool = True,
    bias: bool = True,
    feature: str = "bessel",
    seed: int = 0,
) -> Case:
    """Normal inputs and weights, float64, scaled so that every pre-activation is of the order of one."""
    graph, widths = graph or random_graph(seed=seed), widths or Widths()
    plain = feature in ("distance", "squared")  # these are one number, and need no centres
    widths = widths._replace(R=1) if plain else widths
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        scale = shape[-1] ** -0.5 if len(shape) == 2 else 1.0
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    num_atoms, num_edges = graph.destination.num_rows, graph.destination.num_entries
    r_E3 = normal(num_edges, 3) * 3.0
    f_E = normal(num_edges).abs() if envelope else None
    inputs = (normal(num_atoms, widths.H), normal(num_atoms, widths.H), r_E3, f_E)
    centres_R = torch.arange(1, widths.R + 1, dtype=torch.float64) * (torch.pi / 5)
    weights = [normal(widths.H, widths.R), normal(widths.M, widths.H), normal(widths.M)]
    if vector:
        weights += [normal(widths.K, widths.M), normal(widths.K), normal(1, widths.K).squeeze(0)]
        weights += [normal(1)] if bias else []
    return Case(inputs, EdgeWeights(None if plain else centres_R, *weights), graph)


def tangents_of(case: Case, seed: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Normal tangents of the inputs."""
    generator = torch.Generator().manual_seed(seed)
    tangents: Any = tuple(
        None if t is None else torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)
        for t in case.inputs
    )
    return tangents


def present(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """Those that are there."""
    return [t for t in tensors if t is not None]


def waves(tensors: Sequence[Tensor | None]) -> Tensor:
    """A scalar in which every element of every tensor has a weight of its own."""
    total = torch.zeros((), dtype=present(tensors)[0].dtype)
    for k, tensor in enumerate(present(tensors)):
        phases = torch.linspace(0.3 + k, 2.3 + k, tensor.numel(), dtype=tensor.dtype).view_as(tensor)
        total = total + (tensor * phases.sin()).sum() + 0.5 * (tensor * tensor * phases.cos()).sum()
    return total


def first_order(operation: Operation, case: Case, spec: EdgeSpec) -> list[Tensor]:
    """Outputs, and the gradients of a loss on them with respect to all inputs and weights."""
    case = case.leaves()
    outputs = present(operation(*case.inputs, case.weights, case.graph, spec))
    gradients = torch.autograd.grad(waves(outputs), case.differentiable())
    return [*[t.detach() for t in outputs], *gradients]


def second_order(operation: Operation, case: Case, spec: EdgeSpec) -> list[Tensor]:
    """Gradients of a loss on the gradients of the inputs, as a loss on forces has."""
    case = case.leaves()
    outputs = present(operation(*case.inputs, case.weights, case.graph, spec))
    forces = torch.autograd.grad(waves(outputs), case.present_inputs(), create_graph=True)
    return list(torch.autograd.grad(waves([*forces, *outputs]), case.differentiable()))


def largest_error(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """max|got - want| / max|want| of the worst pair of tensors."""
    assert [t.shape for t in got] == [t.shape for t in want]
    errors = [0.0]
    for x, y in zip(got, want, strict=True):
        if y.numel():
            difference, size = (x.to(y.dtype) - y).abs().max().item(), y.abs().max().item()
            errors.append(difference if difference == 0.0 else difference / size if size else float("inf"))
    assert all(error == error for error in errors), "NaN"
    return max(errors)


def pairwise_cover(factors: dict[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Few combinations in which every two values of every two factors meet.

    Greedy: each begins with the first pair not met yet, and its other factors take the values that meet most
    new ones.
    """

    def pairs(row: dict[str, Any]) -> set[tuple[Any, ...]]:
        there = [name for name in factors if name in row]
        return {(a, row[a], b, row[b]) for a, b in combinations(there, 2)}

    missing = [(a, x, b, y) for a, b in combinations(factors, 2) for x, y in product(factors[a], factors[b])]
    chosen = []
    while missing:
        a, x, b, y = missing[0]
        row = {a: x, b: y}
        for name in factors:
            if name not in row:
                new = [len(pairs({**row, name: value}).intersection(missing)) for value in factors[name]]
                row[name] = factors[name][new.index(max(new))]
        missing = [pair for pair in missing if pair not in pairs(row)]
        chosen.append({name: row[name] for name in factors})
    return chosen
