"""The CUDA kernels of the Cartesian edge operation, emulated, in place of the CPU's, against PyTorch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megagnn.models.cartesian import edge
from megagnn.models.cartesian.messages import COMPONENTS, PATHS
from megagnn.ops import extension
from tests.cuda.emulator import ORDERS, SCALARS, Emulator, Guarded
from tests.models.cartesian.test_edge import CASES, Case, case, gradients
from tests.tolerances import assert_close

POINTERS = ("features", "bars", "sums")
SIZES = ("num_rows", "num_others", "num_edges", "width", "num_weights", "num_radial", "num_parts")


class Problem(ctypes.Structure):
    """CartesianProblem of csrc/cuda/cartesian_edge.h."""

    _fields_ = (
        *((name, ctypes.c_void_p * 3) for name in POINTERS),
        *((name, ctypes.c_void_p) for name in ("weight", "basis", "unit", "ptr", "perm", "index", "other")),
        *((name, ctypes.c_void_p) for name in ("first", "table", "parts")),
        *((name, ctypes.c_void_p) for name in ("weight_bar", "basis_bar", "unit_bar")),
        *((name, ctypes.c_int64) for name in (*SIZES, "exchanged")),
        ("order", ctypes.c_int64 * len(PATHS)),
    )


class Operations:
    """What torch.ops.megagnn has of the operation, by emulated kernels; nothing may be written elsewhere."""

    def __init__(self, library: Emulator) -> None:
        self.library, self.calls, self.num_parts = library, 0, 3
        self.cartesian_edge_sum = SimpleNamespace(default=self.sum)
        self.cartesian_edge_gradient = SimpleNamespace(default=self.gradient)

    def sum(
        self, features: Any, weight: Any, basis: Any, unit: Any, paths: Any, exchanged: bool, *where: Any
    ) -> list[Tensor]:
        into = {PATHS[p].receiver for p in paths} | {"h"}
        lead = (len(unit), len(where[1]) - 1)
        out = [
            Guarded((*lead, *([n] if n > 1 else []), weight.shape[1]) if name in into else (0,), weight.dtype)
            for name, n in COMPONENTS.items()
        ]
        self.run("sum", features, (weight, basis, unit), paths, where, sums=out, exchanged=exchanged)
        return [x.check() for x in out]

    def gradient(self, features: Any, bars: Any, *rest: Any) -> list[Tensor]:
        weight, basis, unit, paths, weights, geometry, *where = rest
        wanted = {
            "weight_bar": (weight, weights),
            "basis_bar": (basis, geometry),
            "unit_bar": (unit, geometry),
        }
        out = {name: Guarded(x.shape if w else (0,), x.dtype) for name, (x, w) in wanted.items()}
        self.run("gradient", features, (weight, basis, unit), paths, where, bars=bars, **out)
        return [x.check() for x in out.values()]

    def run(
        self, name: str, features: Any, edges: Any, paths: Sequence[int], where: Any, **others: Any
    ) -> None:
        """Calls a launcher; tensors go as their addresses, empty ones as null."""
        weight, basis, unit = edges
        index, ptr, perm, other, first = where
        parts = self.num_parts if len(index) else 0
        table, sums = Guarded((weight.numel(),), weight.dtype), Guarded((parts, weight.numel()), weight.dtype)
        tensors = {"weight": weight, "basis": basis, "unit": unit, "index": index, "ptr": ptr, "perm": perm}
        tensors |= {"other": other, "first": first, "table": table, "parts": sums}
        problem = Problem(exchanged=others.pop("exchanged", False))
        for key, value in {**tensors, **others, "features": features}.items():
            if key in POINTERS:
                getattr(problem, key)[:] = [address(x) for x in value]
            else:
                setattr(problem, key, address(value))
        sizes = (len(ptr) - 1, features[0].shape[1], len(index), *weight.shape[1:], basis.shape[2], parts)
        for key, size in zip(SIZES, sizes, strict=True):
            setattr(problem, key, size)
        problem.order[: len(paths)] = sorted(range(len(paths)), key=lambda k: paths[k])
        pair, mask = int(len(unit) == 2), sum(1 << (p - 1) for p in paths)
        launcher = f"megagnn_cuda_cartesian_edge_{name}"
        self.library(launcher, SCALARS[weight.dtype], pair, mask, ctypes.byref(problem))
        self.calls += 1
        table.check()
        sums.check()


def address(x: Tensor | Guarded | None) -> int | None:
    tensor = x.tensor if isinstance(x, Guarded) else x
    if tensor is None or not tensor.numel():
        return None
    assert tensor.is_contiguous()
    return tensor.data_ptr()


@pytest.fixture
def emulated(cuda: Emulator, monkeypatch: pytest.MonkeyPatch) -> Operations:
    """The operation runs by emulated kernels."""
    operations = Operations(cuda)
    monkeypatch.setattr(edge, "_OPS", operations)
    return operations


def results(c: Case, fused: bool) -> list[Tensor]:
    return [*(x.detach() for x in c.sums(fused)), *gradients(c, fused)]


def check(c: Case, emulated: Operations) -> None:
    """Sums and gradients by all leaves, which takes the kernels of the paths back to the senders."""
    wide = case_in_float64(c)
    bound = 1e-12 if c.weight.dtype == torch.float64 else 1e-4
    for got, want in zip(results(c, True), results(wide, False), strict=True):
        assert_close(got, want, bound)
    assert emulated.calls == 4  # sums twice, gradients, and those of the features


def case_in_float64(c: Case) -> Case:
    def wide(x: Tensor) -> Tensor:
        return x.detach().double().requires_grad_()

    features = {name: wide(x) for name, x in c.features.items()}
    return replace(c, weight=wide(c.weight), basis=wide(c.basis), unit=wide(c.unit), features=features)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("planes", [1, 2], ids=["value", "pair"])
@pytest.mark.parametrize(("name", "layer"), [x for x in CASES if x != ("lean", "first")])  # as full's
def test_every_set_of_paths(emulated: Operations, name: str, layer: str, planes: int, dtype: Any) -> None:
    check(case(name, layer, planes, 33, dtype), emulated)


@pytest.mark.parametrize(("width", "edges"), [(1, 70), (31, 70), (64, 1), (33, 0)])
def test_widths_and_edges(emulated: Operations, width: int, edges: int) -> None:
    c = case("full", "inner", 2, width, edges=edges)
    assert (c.destination.ptr.diff() == 0).any(), "the example must have an empty row"
    emulated.num_parts = 5
    check(c, emulated)


@pytest.mark.parametrize("order", ORDERS[1:])
def test_bits_do_not_depend_on_the_order_of_threads(emulated: Operations, order: str) -> None:
    c = case("full", "inner", 2, 40, torch.float32)
    wanted = results(c, True)
    with emulated.library.order(order):
        got = results(c, True)
    assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))


def test_few_blocks(emulated: Operations) -> None:
    """Small enough to be run where races are looked for: see test_sanitized.py."""
    check(case("lean", "inner", 1, 33, edges=20), emulated)


def test_mistakes_are_far_outside_the_tolerance(
    emulated: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums without an exchange of value and tangent, or with the weights of other paths."""
    c = case("full", "inner", 2)
    wanted = results(c, False)
    run = emulated.run

    def errors(paths: list[int] | None = None, **changed: Any) -> list[float]:
        def wrong(name: str, features: Any, edges: Any, right: Any, where: Any, **others: Any) -> None:
            run(name, features, edges, paths or right, where, **{**others, **changed})

        monkeypatch.setattr(emulated, "run", wrong)
        got = results(c, True)
        return [float((g - w).abs().max() / w.abs().max()) for g, w in zip(got, wanted, strict=True)]

    assert max(errors()) < 1e-12
    assert min(errors(exchanged=False)[-3:]) > 0.1  # gradients of the features
    assert min(errors(paths=[*range(2, 15), 1])[:3]) > 0.1  # sums


def test_paths_without_kernels_are_an_error(emulated: Operations) -> None:
    c = case("full", "inner")
    where = (*edge._rows(c.destination), c.source.index, None)
    with pytest.raises(RuntimeError, match="error 1"):
        emulated.run("sum", list(c.features.values()), c.leaves[:3], [2, 5], where)


@pytest.mark.parametrize("planes", [1, 2], ids=["value", "pair"])
def test_rows_of_weights_that_differ_by_edge(emulated: Operations, planes: int) -> None:
    c = case("full", "inner", planes, 33, rows=11)
    assert c.first is not None
    assert len(c.first.unique()) == 7
    check(c, emulated)


@pytest.mark.parametrize("there", [False, True])
def test_fused_where_the_extension_has_cuda(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    monkeypatch.setattr(extension, "has_cuda", there)
    assert edge.has_kernels(torch.device("cuda"), torch.bfloat16) == there
    assert not edge.has_kernels(torch.device("cuda"), torch.float16)
    assert not edge.has_kernels(torch.device("meta"), torch.float32)
