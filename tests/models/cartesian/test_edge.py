"""The compiled edge operation against PyTorch's operations: values, pairs, derivatives, memory, errors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megagnn.data import keys
from megagnn.models.cartesian import edge
from megagnn.models.cartesian.edge import neighbour_sums, planes_of, transposed
from megagnn.models.cartesian.messages import COMPONENTS, SETS, Edges, direction_matrices, paths_of
from megagnn.ops import Segments, extension
from megagnn.ops.dual import Dual
from tests.models.cartesian.test_model import batch
from tests.models.physics import model_config, randomised
from tests.ops.helpers import random_segments
from tests.tolerances import PARITY, assert_close

compiled = pytest.mark.skipif(extension.module is None, reason="the extension is not built")
N, E, R = 12, 70, 5
ROWS = 11
"""Weights of each path and channel where edges read R of them."""
CASES = [(name, layer) for name in SETS for layer in ("first", "inner")]


@dataclass
class Case:
    """Leaves of one operation, each with a first dimension of planes but the weight."""

    paths: Any
    weight: Tensor
    basis: Tensor
    unit: Tensor
    features: dict[str, Tensor]
    destination: Segments
    source: Segments
    first: Tensor | None = None

    @property
    def leaves(self) -> list[Tensor]:
        return [self.weight, self.basis, self.unit, *self.features.values()]

    def sums(self, fused: bool) -> list[Tensor]:
        """Of the kernels or the reference, with planes."""
        pair = len(self.unit) == 2
        unit, basis = (Dual.of_planes(x) if pair else x.squeeze(0) for x in (self.unit, self.basis))
        ends = (self.destination, self.source)
        if fused:
            dtype = self.features["h"].dtype
            edges = Edges(*ends, basis_planes=planes_of(basis, dtype), unit_planes=planes_of(unit, dtype))
        else:
            edges = Edges(*ends, basis, unit.unsqueeze(-1), *direction_matrices(unit))
        edges = replace(edges, first_E=self.first)
        sender = {n: Dual.of_planes(x) if pair else x.squeeze(0) for n, x in self.features.items()}
        found = neighbour_sums(self.paths, self.weight, sender, edges)
        return [x.planes if isinstance(x, Dual) else x.unsqueeze(0) for x in found.values()]


def case(
    name: str,
    layer: str,
    planes: int = 1,
    width: int = 5,
    dtype: Any = torch.float64,
    edges: int = E,
    rows: int = R,
) -> Case:
    torch.manual_seed(0)
    fields = ("h",) if layer == "first" else ("h", "v") if name == "painn" else ("h", "v", "t")
    paths = paths_of(name, fields)
    unit = torch.nn.functional.normalize(torch.randn(planes, edges, 3, dtype=dtype), dim=-1)
    shapes = {n: (planes, N, *([COMPONENTS[n]] if n != "h" else []), width) for n in fields}
    return Case(
        paths,
        torch.randn(len(paths), width, rows, dtype=dtype, requires_grad=True),
        torch.randn(planes, edges, R, dtype=dtype, requires_grad=True),
        unit.requires_grad_(),
        {n: torch.randn(shape, dtype=dtype, requires_grad=True) for n, shape in shapes.items()},
        random_segments(N, edges, perm=False),
        random_segments(N, edges, perm=True, seed=1),
        torch.arange(edges) * 5 % (rows - R + 1) if rows > R else None,
    )


def gradients(c: Case, fused: bool, create_graph: bool = False) -> list[Tensor]:
    outputs = c.sums(fused)
    loss = torch.stack([(x * torch.cos(x)).sum() for x in outputs]).sum()
    return list(torch.autograd.grad(loss, c.leaves, create_graph=create_graph))


@compiled
@pytest.mark.parametrize(("width", "rows"), [(5, R), (37, R), (37, ROWS)], ids=["5", "37", "rows"])
@pytest.mark.parametrize("planes", [1, 2], ids=["value", "pair"])
@pytest.mark.parametrize(("name", "layer"), CASES)
def test_equals_the_reference(name: str, layer: str, planes: int, width: int, rows: int) -> None:
    """Sums and gradients by features, weights, functions of the distance and directions."""
    c = case(name, layer, planes, width, rows=rows)
    for got, want in zip(c.sums(True), c.sums(False), strict=True):
        assert_close(got.detach(), want.detach())
    for got, want in zip(gradients(c, True), gradients(c, False), strict=True):
        assert_close(got, want, 1e-11)


@compiled
@pytest.mark.parametrize("rows", [R, ROWS], ids=["all", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_level(dtype: torch.dtype, rows: int, simd: str) -> None:
    c, wide = case("full", "inner", 2, 19, dtype, rows=rows), case("full", "inner", 2, 19, rows=rows)
    pairs = list(zip(c.leaves, wide.leaves, strict=True))
    for x, y in pairs:
        y.data.copy_(x.data)
    for got, want in zip(c.sums(True), wide.sums(False), strict=True):
        assert_close(got.detach(), want.detach())
    bound = 1e-3 if dtype == torch.float32 else 1e-11
    for got, want in zip(gradients(c, True), gradients(wide, False), strict=True):
        assert_close(got, want, bound)


@compiled
def test_bfloat16_is_summed_in_float32() -> None:
    c, wide = case("full", "inner", 1, 16, torch.float32), case("full", "inner", 1, 16)
    c.features = {n: x.detach().bfloat16().requires_grad_() for n, x in c.features.items()}
    for x, y in zip(c.leaves, wide.leaves, strict=True):
        y.data.copy_(x.data)
    outputs = c.sums(True)
    assert all(x.dtype == torch.bfloat16 for x in outputs)
    for got, want in zip(outputs, wide.sums(False), strict=True):
        assert_close(got.detach(), want.detach())
    bars = [torch.ones_like(x) for x in outputs]
    found = torch.autograd.grad(outputs, c.leaves, bars)
    expected = torch.autograd.grad(wide.sums(False), wide.leaves, [b.double() for b in bars])
    for x, got, want in zip(c.leaves, found, expected, strict=True):
        assert got.dtype == x.dtype
        assert_close(got, want, 1e-4 if x.dtype == torch.float32 else None)


@compiled
@pytest.mark.parametrize("rows", [R, ROWS], ids=["all", "rows"])
@pytest.mark.parametrize("weights", [False, True], ids=["geometry", "weights"])
@pytest.mark.parametrize(("name", "layer"), CASES)
def test_second_derivatives(name: str, layer: str, weights: bool, rows: int) -> None:
    """Of all gradients, or of all but those of the weights, as training on forces takes them."""
    c, results = case(name, layer, rows=rows), []
    for fused in (True, False):
        first = gradients(c, fused, create_graph=True)[0 if weights else 1 :]
        results.append(torch.autograd.grad(sum((g * torch.cos(g)).sum() for g in first), c.leaves))
    for got, want in zip(*results, strict=True):
        assert_close(got, want, PARITY)


@compiled
def test_wrong_transposes_are_far_outside_the_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    c = case("full", "inner")
    wanted = gradients(c, False)
    monkeypatch.setattr(edge, "transposed", lambda number: number)
    errors = [(g - w).abs().max() / w.abs().max() for g, w in zip(gradients(c, True), wanted, strict=True)]
    assert max(errors[:3]) < 1e-11  # weights, functions of the distance, directions
    assert min(errors[3:]) > 0.1


def test_transposed_paths() -> None:
    assert [transposed(n) for n in range(1, 15)] == [1, 4, 9, 2, 5, 10, 7, 12, 3, 6, 11, 8, 13, 14]


@compiled
def test_nothing_of_the_size_of_edges_times_channels_is_kept() -> None:
    c, kept = case("full", "inner", edges=3000, width=16), []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    largest = []
    for fused in (True, False):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            c.sums(fused)
        largest.append(max(kept))
    assert largest[0] == 3000 * R
    assert largest[1] >= 3000 * 5 * 16


@compiled
def test_same_bits_at_any_number_of_threads() -> None:
    c, before, results = case("full", "inner", 2, 33, torch.float32, 4000), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            outputs = c.sums(True)
            found = torch.autograd.grad(outputs, c.leaves, [torch.cos(x).detach() for x in outputs])
            results.append((*outputs, *found[1:], found[0]))
    finally:
        torch.set_num_threads(before)
    *same, weight = zip(*results, strict=True)
    assert all(torch.equal(x, y) for x, y in same)
    assert_close(*weight)  # tasks' gradients are added up


@compiled
def test_no_edges() -> None:
    c = case("full", "inner", edges=0)
    outputs = c.sums(True)
    assert all(not x.any() for x in outputs)
    found = torch.autograd.grad(outputs, c.leaves, [torch.ones_like(x) for x in outputs])
    assert [x.shape for x in found] == [x.shape for x in c.leaves]
    assert all(not x.any() for x in found)


@pytest.mark.parametrize(("paths", "splines"), [*((paths, 0) for paths in SETS), ("full", 12)])
def test_models_fused_and_unfused(paths: str, splines: int) -> None:
    """Energies and gradients by one backward, and by create_graph, with layers recomputed."""
    results: list[list[Tensor]] = []
    for operation in ("fused", "unfused"):
        config = model_config(
            family="cartesian",
            paths=paths,
            num_splines=splines,
            edge_operation=operation,
            recompute_layers=paths == "full",
        )
        potential, b = randomised(config), batch()
        pair = potential.directional(b, torch.sin(10 * b[keys.POSITIONS]))[keys.ENERGY]
        outputs = potential(b, create_graph=True)
        (pair.value.sum() + pair.tangent.sum() + outputs[keys.FORCES].square().sum()).backward()
        found = [pair.value, pair.tangent, outputs[keys.FORCES]]
        results.append([x.detach() for x in found] + [p.grad for p in potential.parameters()])  # type: ignore[misc]
    for got, want in zip(*results, strict=True):
        assert_close(got, want, PARITY)


@compiled
def test_errors() -> None:
    c = case("full", "inner")
    pair = case("full", "inner", 2)
    first = gradients(pair, True, create_graph=True)
    with pytest.raises(RuntimeError, match="gradients of Dual numbers cannot be differentiated"):
        torch.autograd.grad(first[3].sum(), pair.weight)
    sums = torch.ops.megagnn.cartesian_edge_sum
    h, v, t = (x.detach() for x in c.features.values())
    weight, basis, unit = c.weight.detach(), c.basis.detach(), c.unit.detach()
    rows = (c.destination.index, c.destination.ptr, None, c.source.index)
    full = list(range(1, 15))
    for features, w, paths, message in (
        ([h, v, t], weight[:2], [1, 13], "paths must be a set of .*got another"),
        ([h, v, t], weight, [*full[:13], 1], "paths must be different numbers from 1 to 14, got 1"),
        ([h, v[..., :3], t], weight, full, r"v must have shape \(1, 12, 3, 5\) .*got \(1, 12, 3, 3\)"),
        ([h, v, t], weight.float(), full, r"weight must have shape .* type Double, got .* Float"),
        ([h, v], weight, full, "features must be three tensors, got 2"),
    ):
        with pytest.raises(RuntimeError, match=r"cartesian_edge_sum \(cpu\): " + message):
            sums(features, w, basis, unit, paths, False, *rows)
    first = torch.full((E,), 2)
    first[5] = 3
    seven = torch.randn(14, 5, R + 2).double()
    for w, given, message in (
        (seven, first, r"first must lie in \[0, 2\], got an element outside"),
        (seven, first[1:], "first must be as long as index, .* got 69 and 70"),
        (
            weight[..., 1:],
            first,
            "weight must have .* a row for each of the 5 numbers of basis, got 3 dimensions and 4 rows",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            sums([h, v, t], w, basis, unit, full, False, *rows, given)
    outside = c.source.index.clone()
    outside[-1] = N
    with pytest.raises(RuntimeError, match=r"other must lie in \[0, 12\)"):
        sums([h, v, t], weight, basis, unit, full, False, *rows[:3], outside)
