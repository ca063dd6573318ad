"""The compiled passes over atoms against PyTorch's operations: values, pairs, derivatives, types, errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from megagnn.models.cartesian import atoms
from megagnn.models.cartesian.atoms import gates_and_products, mean_square, scaled
from megagnn.models.cartesian.messages import COMPONENTS, tensor_basis
from megagnn.ops import extension
from megagnn.ops.dual import Dual
from megagnn.parallel.context import ParallelContext
from tests.tolerances import PARITY, assert_close

compiled = pytest.mark.skipif(extension.module is None, reason="the extension is not built")
N, EPSILON = 7, 0.1
# Fields of the state, of the sums over neighbours, and those that are made: the first layer, an inner one,
# the last one of energies, and those without tensors.
CASES = {
    "first": ("h", "hvt", "hvt"),
    "inner": ("hvt", "hvt", "hvt"),
    "last": ("hvt", "hvt", "h"),
    "no tensors": ("hv", "hv", "hv"),
    "no tensors, last": ("hv", "hv", "h"),
}


@dataclass
class Case:
    """Leaves of a layer's passes over atoms; features with a first dimension of planes."""

    state: dict[str, Tensor]
    sums: dict[str, Tensor]
    gates: Tensor
    gains: dict[str, Tensor]
    slopes: dict[str, Tensor]

    @property
    def leaves(self) -> list[Tensor]:
        features = [*self.state.values(), *self.sums.values(), self.gates]
        return [*features, *self.gains.values(), *self.slopes.values()]

    def outputs(self, fused: bool) -> list[Tensor]:
        """The norm of the state; its sum with the sums over neighbours, of that the mean square; products."""
        pair = len(self.gates) == 2

        def given(x: Tensor) -> Any:
            return Dual.of_planes(x) if pair else x.squeeze(0)

        state, sums = ({n: given(x) for n, x in fields.items()} for fields in (self.state, self.sums))
        widths, context = {n: x.shape[-1] for n, x in self.sums.items()}, ParallelContext()
        same, square = mean_square(state, widths, context, fused)
        n = scaled(same, square, EPSILON, self.gains, fused)
        u, square = mean_square(sums, widths, context, fused, n)
        basis = tensor_basis().to(self.gates.dtype) if "t" in sums else None
        y = gates_and_products(u, square, given(self.gates), self.slopes, basis, fused)
        found = [*n.values(), *u.values(), square, *y.values()]
        return [x.planes if isinstance(x, Dual) else x.unsqueeze(0) for x in found]


def case(name: str, planes: int = 1, width: int = 5, dtype: Any = torch.float64, num_atoms: int = N) -> Case:
    torch.manual_seed(0)

    def made(*sizes: int) -> Tensor:
        return torch.randn(*sizes, dtype=dtype, requires_grad=True)

    def fields(names: str) -> dict[str, Tensor]:
        between = {n: [COMPONENTS[n]] if n != "h" else [] for n in names}
        return {n: made(planes, num_atoms, *between[n], width) for n in names}

    state, sums, written = CASES[name]
    gains, slopes = ({n: made(width) for n in sorted(names)} for names in (state, written))
    return Case(fields(state), fields(sums), made(planes, num_atoms, len(written) * width), gains, slopes)


def gradients(c: Case, fused: bool, create_graph: bool = False) -> list[Tensor]:
    loss = torch.stack([(x * torch.cos(x)).sum() for x in c.outputs(fused)]).sum()
    return list(torch.autograd.grad(loss, c.leaves, create_graph=create_graph))


@compiled
@pytest.mark.parametrize("width", [5, 37])
@pytest.mark.parametrize("planes", [1, 2], ids=["value", "pair"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name: str, planes: int, width: int) -> None:
    c = case(name, planes, width)
    for got, want in zip(c.outputs(True), c.outputs(False), strict=True):
        assert_close(got.detach(), want.detach(), 1e-12)
    for got, want in zip(gradients(c, True), gradients(c, False), strict=True):
        assert_close(got, want, 1e-12)


@compiled
@pytest.mark.parametrize("name", CASES)
def test_second_derivatives(name: str) -> None:
    c, results = case(name), []
    for fused in (True, False):
        first = gradients(c, fused, create_graph=True)
        results.append(torch.autograd.grad(sum((g * torch.cos(g)).sum() for g in first), c.leaves))
    for got, want in zip(*results, strict=True):
        assert_close(got, want, PARITY)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_level(dtype: torch.dtype, simd: str) -> None:
    c, wide = case("inner", 2, 19, dtype), case("inner", 2, 19)
    for x, y in zip(c.leaves, wide.leaves, strict=True):
        y.data.copy_(x.data)
    for got, want in zip(c.outputs(True), wide.outputs(False), strict=True):
        assert_close(got.detach(), want.detach())
    for got, want in zip(gradients(c, True), gradients(wide, False), strict=True):
        assert_close(got, want, 1e-4 if dtype == torch.float32 else 1e-12)


@compiled
@pytest.mark.parametrize("planes", [1, 2], ids=["value", "pair"])
def test_bfloat16_is_computed_in_float32(planes: int) -> None:
    """Products and their gradients within roundings of the inputs', the mean square in float32."""
    c, wide = case("inner", planes, 16, torch.bfloat16), case("inner", planes, 16)
    for x, y in zip(c.leaves, wide.leaves, strict=True):
        y.data.copy_(x.data)
    outputs, expected = c.outputs(True), wide.outputs(False)
    assert [x.dtype for x in outputs] == [torch.bfloat16] * 6 + [torch.float32] + [torch.bfloat16] * 3
    for got, want in zip(outputs, expected, strict=True):
        assert (got - want).norm() < 0.01 * want.norm()
    bars = [torch.sin(x).detach() for x in expected]
    given = [b.to(x.dtype) for b, x in zip(bars, outputs, strict=True)]
    found = torch.autograd.grad(outputs, c.leaves, given)
    for x, got, want in zip(c.leaves, found, torch.autograd.grad(expected, wide.leaves, bars), strict=True):
        assert got.dtype == x.dtype
        assert (got - want).norm() < 0.02 * want.norm()


@compiled
def test_a_wrong_gradient_is_far_outside_the_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and tangent of all cotangents not exchanged, by an operation that exchanges them itself."""
    c = case("inner", 2)
    wanted, right = gradients(c, False), torch.ops.megagnn.cartesian_products_backward.default

    class Wrong:
        def __getattr__(self, name: str) -> Any:
            return self if name == "cartesian_products_backward" else getattr(torch.ops.megagnn, name)

        def default(self, u: Any, square: Any, gates: Any, slopes: Any, bars: Any, *rest: Any) -> Any:
            return right(u, square, gates, slopes, [b.flip(0) for b in bars], *rest)

    monkeypatch.setattr(atoms, "_OPS", Wrong())
    errors = [(g - w).abs().max() / w.abs().max() for g, w in zip(gradients(c, True), wanted, strict=True)]
    assert min(errors) > 0.01


@compiled
def test_same_bits_at_any_number_of_threads() -> None:
    c, before, results = case("inner", 2, 33, torch.float32, 400), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append((c.outputs(True), gradients(c, True)))
    finally:
        torch.set_num_threads(before)
    (outputs, found), (others, others_found) = results
    assert all(torch.equal(x, y) for x, y in zip(outputs, others, strict=True))
    weights = len(c.gains) + len(c.slopes)
    features = zip(found[:-weights], others_found[:-weights], strict=True)
    assert all(torch.equal(x, y) for x, y in features)
    for x, y in zip(found[-weights:], others_found[-weights:], strict=True):
        assert_close(x, y)  # tasks' gradients are added up


@compiled
def test_no_atoms() -> None:
    c = case("inner", num_atoms=0)
    outputs = c.outputs(True)
    found = torch.autograd.grad(outputs, c.leaves, [torch.ones_like(x) for x in outputs])
    assert [x.shape for x in found] == [x.shape for x in c.leaves]
    assert all(not x.any() for x in found)


@compiled
def test_errors() -> None:
    with pytest.raises(RuntimeError, match="gradients of Dual numbers cannot be differentiated"):
        gradients(case("inner", 2), True, create_graph=True)
    h, v, t = (x.detach().squeeze(0) for x in case("inner").sums.values())
    square, gates, slopes = (
        torch.ones(N, 1).double(),
        torch.ones(N, 15).double(),
        [torch.ones(5).double()] * 3,
    )
    run, none = torch.ops.megagnn.cartesian_products, torch.empty(0)
    for arguments, message in (
        (([h, v, t], square, gates, slopes, 1.0, 4, False), "u must have h and v, .*got 3 for 4"),
        (([h, none, t], square, gates, slopes, 1.0, 1, False), "u must have h and v"),
        (([h, v], square, gates, slopes, 1.0, 2, False), "lists must have three elements"),
        (([none] * 3, square, gates, slopes, 1.0, 2, False), "features must have a field, got none"),
        (
            ([h, v[:, :2], t], square, gates, slopes, 1.0, 3, False),
            r"v must have shape \(7, 3, 5\) .*got \(7, 2, 5\)",
        ),
        (([h, v, t], square[:3], gates, slopes, 1.0, 3, False), r"squares must have shape \(7, 1\)"),
        (
            ([h, v, t], square, gates.float(), slopes, 1.0, 3, False),
            "gates must have shape .* type Double, got .* Float",
        ),
        (([h, v, t], square, gates, slopes, 1.0, 3, True), "features must be matrices .*of a pair two"),
        (
            ([x.bfloat16() for x in (h, v, t)], square, gates, slopes, 1.0, 3, False),
            "features must be .*got .*BFloat16",
        ),
    ):
        with pytest.raises(RuntimeError, match=r"cartesian_products \(cpu\): " + message):
            run(*arguments)
