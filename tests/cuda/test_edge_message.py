"""The CUDA kernels of the blockwise edge operation, emulated, in the order of its driver, against the CPU."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megagnn.models.egnn.edge import EdgeGraph, EdgeSpec, EdgeWeights
from megagnn.models.egnn.edge.runner import Call, compiled_arguments
from megagnn.ops import Segments
from tests.cuda.emulator import CUDA, ORDERS, SCALARS, Emulator, build
from tests.tolerances import RELATIVE, assert_close

# Two kernels of different arithmetic, and reciprocals that are two units in the last place off.
FACTOR = 30


@pytest.fixture(scope="module")
def edges(build_folder: Path) -> Emulator:
    """The driver with emulated kernels."""
    sources = [CUDA / "edge_message.cu", CUDA / "runtime.cu", Path(__file__).with_name("edge_driver.cpp")]
    return Emulator(build("edges", sources, build_folder))


def make_graph(num_atoms: int, num_edges: int) -> EdgeGraph:
    """Rows of uneven length, one of them longer than a block, some empty; sources in random order."""
    generator = torch.Generator().manual_seed(num_edges)
    index = (torch.rand(num_edges, generator=generator) ** 3 * num_atoms).long().sort().values
    source = torch.randint(0, num_atoms, (num_edges,), generator=generator)

    def ptr_of(rows: Tensor) -> Tensor:
        counts = torch.bincount(rows, minlength=num_atoms)
        return torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    return EdgeGraph(
        Segments(index, ptr_of(index)), Segments(source, ptr_of(source), source.argsort(stable=True))
    )


class Case:
    """Arguments of the compiled operations, as lists, with the blocks' edges by source that CUDA needs."""

    def __init__(self, spec: EdgeSpec, dtype: torch.dtype, pair: bool, vector: bool, envelope: bool) -> None:
        num_atoms, num_edges, (hidden, message, width, radial) = 11, 150, (37, 33, 35, 6)
        radial = radial if spec.feature in ("bessel", "gaussian") else 1
        generator = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        graph = make_graph(num_atoms, num_edges)
        inputs = []
        for _ in range(2 if pair else 1):
            inputs += [normal(num_atoms, hidden), normal(num_atoms, hidden), normal(num_edges, 3)]
            inputs.append(normal(num_edges) if envelope else None)
        weights = EdgeWeights(
            torch.arange(1, radial + 1, dtype=dtype) if spec.feature in ("bessel", "gaussian") else None,
            *(normal(hidden, radial), normal(message, hidden) / 6, normal(message)),
            *((normal(width, message) / 6, normal(width), normal(width) / 6, normal(1)) if vector else ()),
        )
        self.dtype, self.pair, self.vector, self.spec = dtype, pair, vector, spec
        self.lists = compiled_arguments(Call(graph, spec, pair, (*inputs, *weights)))
        self.lists[2][5:] = graph._runs(self.lists[2][3])
        self.sizes = [hidden, message, width if vector else 0, radial, *self.lists[3][:5]]
        shapes = [(num_atoms, message), (num_atoms, 3)] * 2
        none = torch.empty(0)
        self.bars = [normal(*shape) if k < (4 if pair else 2) else none for k, shape in enumerate(shapes)]

    def emulated(self, library: Emulator, results: list[Tensor], saved: list[Tensor], backward: bool) -> None:
        """Runs the driver; what it sums is added to the results."""
        inputs, weights, graph, _, reals = self.lists
        tensors = [*inputs, *weights, *graph, *saved, *self.bars, *results]
        pointers = [t.data_ptr() if t.numel() else None for t in tensors]
        sizes = [*self.sizes, graph[3].numel() // 4]
        library.library.megagnn_emulated_edges(
            SCALARS[self.dtype],
            (ctypes.c_void_p * len(pointers))(*pointers),
            (ctypes.c_int64 * len(sizes))(*sizes),
            (ctypes.c_double * 3)(*reals),
            int(backward),
        )


def run_backward(case: Case, library: Emulator, saved: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """(emulated, CPU's) results of the backward, with the operation's outputs."""
    ops = torch.ops.megagnn
    wanted = ops.edge_message_backward(*case.lists, saved, case.bars, True, True, True)
    got = [torch.zeros_like(t) for t in wanted]
    case.emulated(library, got, saved, True)
    return got, wanted


SPECS = [
    (EdgeSpec(block_edges=40), True, True, True),
    (EdgeSpec(block_edges=40), True, False, False),
    (EdgeSpec(block_edges=64, feature="gaussian", direction="plus_one", bounded=True), True, True, True),
    (EdgeSpec(block_edges=64, feature="squared", direction="vector", activation="relu"), False, True, True),
    (EdgeSpec(block_edges=7, feature="distance", bounded=True), False, True, False),
    (EdgeSpec(block_edges=200), False, False, True),
]


@pytest.mark.parametrize(("spec", "pair", "vector", "envelope"), SPECS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_backward_equals_the_cpu(
    edges: Emulator, spec: EdgeSpec, pair: bool, vector: bool, envelope: bool, dtype: torch.dtype
) -> None:
    case = Case(spec, dtype, pair, vector, envelope)
    got, wanted = run_backward(case, edges, [torch.empty(0)] * 2)
    assert sum(t.numel() > 0 for t in wanted) >= 8
    for mine, other in zip(got, wanted, strict=True):
        assert_close(mine, other, FACTOR * RELATIVE[dtype])


@pytest.mark.parametrize("pair", [False, True])
def test_kept_pre_activations_are_those_of_the_cpu(edges: Emulator, pair: bool) -> None:
    case = Case(EdgeSpec(block_edges=40), torch.float64, pair, True, True)
    wanted = torch.ops.megagnn.edge_message_forward(*case.lists, True)
    got = [torch.zeros_like(t) for t in wanted]
    results = [*[torch.empty(0)] * 8, *got[:4], *[torch.empty(0)] * 7]
    case.emulated(edges, results, got[4:], False)
    for mine, other in zip(got, wanted, strict=True):
        assert_close(mine, other, FACTOR * RELATIVE[torch.float64])
    again, recomputed = run_backward(case, edges, got[4:])
    for mine, other in zip(again, recomputed, strict=True):
        assert_close(mine, other, FACTOR * RELATIVE[torch.float64])


@pytest.mark.parametrize("order", ORDERS[1:])
def test_bits_do_not_depend_on_the_order_of_threads(edges: Emulator, order: str) -> None:
    case = Case(EdgeSpec(block_edges=40), torch.float32, True, True, True)
    first, _ = run_backward(case, edges, [torch.empty(0)] * 2)
    with edges.order(order):
        second, _ = run_backward(case, edges, [torch.empty(0)] * 2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_wrong_order_of_sources_is_far_outside(edges: Emulator) -> None:
    """What the comparison above would say if a run were given to another source."""
    case = Case(EdgeSpec(block_edges=40), torch.float64, False, True, True)
    order = case.lists[2][5]
    order[[3, 30]] = order[[30, 3]]
    got, wanted = run_backward(case, edges, [torch.empty(0)] * 2)
    assert (got[1] - wanted[1]).abs().max() > 1e-3 * wanted[1].abs().max()
