"""Sums over edges: our kernels against torch, torch_scatter, torch_sparse and torch_geometric.

python -m tools.bench.scatter                                  forward, all shapes, float32 and bfloat16
python -m tools.bench.scatter --pass both --edges 100000 --widths 64
python -m tools.bench.scatter --ops weighted_sum --json runs/scatter.json --plot runs/scatter.png

Ceiling: a read of the buffer of values (sum, mean, max, scatter), a copy of as many bytes (gather). Edges are
sorted by destination, 30 for each atom on average, of uneven degree; their sources are drawn at random.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megagnn import ops
from megagnn.ops import Segments
from tools.bench import harness
from tools.bench.harness import Case, Ceiling, Work, optional

torch_scatter, torch_sparse = optional("torch_scatter"), optional("torch_sparse")
pyg_utils = optional("torch_geometric.utils")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-8, "float64": 1e-13}
Function = Callable[..., Tensor]


@dataclass
class Graph:
    """Edges sorted by destination, and what peers want to know of them."""

    num_nodes: int
    num_edges: int

    @cached_property
    def destination(self) -> Segments:
        """Uneven degrees: uniform between a tenth of the mean and about twice the mean."""
        generator = torch.Generator().manual_seed(0)
        share = (0.05 + torch.rand(self.num_nodes, generator=generator, dtype=torch.float64)).cumsum(0)
        ptr = torch.cat([torch.zeros(1), share / share[-1] * self.num_edges]).round().long()
        return Segments(torch.repeat_interleave(torch.arange(self.num_nodes), ptr.diff()), ptr)

    @cached_property
    def source(self) -> Segments:
        """Random."""
        index = torch.randint(self.num_nodes, (self.num_edges,), generator=torch.Generator().manual_seed(1))
        counts = torch.bincount(index, minlength=self.num_nodes)
        return Segments(index, torch.cat([counts.new_zeros(1), counts.cumsum(0)]), index.argsort(stable=True))


def zeros(graph: Graph, values: Tensor) -> Tensor:
    """A result to add to."""
    return values.new_zeros(graph.num_nodes, values.shape[1])


def torch_sums(graph: Graph, index: Tensor) -> dict[str, Function | None]:
    """torch's own sums by index; `index` need not be sorted."""
    wide: dict[int, Tensor] = {}

    def expanded(values: Tensor) -> Tensor:
        width = values.shape[1]
        return wide.setdefault(width, index.view(-1, 1).expand(-1, width))

    return {
        "torch.index_add": lambda v: zeros(graph, v).index_add_(0, index, v),
        "torch.scatter_add": lambda v: zeros(graph, v).scatter_add_(0, expanded(v), v),
        "torch.scatter_reduce": lambda v: zeros(graph, v).scatter_reduce_(0, expanded(v), v, "sum"),
    }


def scatter_peers(graph: Graph, index: Tensor, reduce: str) -> dict[str, Function | None]:
    """torch_scatter's and torch_geometric's reductions by index."""
    n = graph.num_nodes
    peers: dict[str, Function | None] = dict.fromkeys(("torch_scatter.scatter", "torch_geometric.scatter"))
    if torch_scatter:
        peers["torch_scatter.scatter"] = lambda v: torch_scatter.scatter(
            v, index, 0, dim_size=n, reduce=reduce
        )
    if pyg_utils:
        peers["torch_geometric.scatter"] = lambda v: pyg_utils.scatter(v, index, 0, n, reduce)
    return peers


def csr_peers(graph: Graph, reduce: str) -> dict[str, Function | None]:
    """Reductions over CSR rows."""
    ptr, counts = graph.destination.ptr, graph.destination.ptr.diff()
    peers: dict[str, Function | None] = {
        "torch.segment_reduce": lambda v: torch.segment_reduce(v, reduce, lengths=counts, unsafe=True)
    }
    peers |= dict.fromkeys(("torch_scatter.segment_csr", "torch_geometric.segment"))
    if torch_scatter:
        peers["torch_scatter.segment_csr"] = lambda v: torch_scatter.segment_csr(v, ptr, reduce=reduce)
    if pyg_utils:
        peers["torch_geometric.segment"] = lambda v: pyg_utils.segment(v, ptr, reduce)
    return peers


def sparse_peers(graph: Graph, dtype: torch.dtype) -> dict[str, Function | None]:
    """The sum as a product of a sparse matrix of ones, (N, E), with the values."""
    ptr, e, n = graph.destination.ptr, graph.num_edges, graph.num_nodes
    peers: dict[str, Function | None] = dict.fromkeys(("torch.sparse_csr @", "torch_sparse.matmul"))
    if dtype != torch.bfloat16:  # torch: "addmm_sparse" is not implemented for it
        matrix = torch.sparse_csr_tensor(ptr, torch.arange(e), torch.ones(e, dtype=dtype), (n, e))
        peers["torch.sparse_csr @"] = lambda v: matrix @ v
    if torch_sparse:
        ones = torch_sparse.SparseTensor(rowptr=ptr, col=torch.arange(e), sparse_sizes=(n, e))
        peers["torch_sparse.matmul"] = lambda v: torch_sparse.matmul(ones, v)
    return peers


def sum_functions(graph: Graph, dtype: torch.dtype) -> dict[str, Function | None]:
    """Segment sum, sorted edges."""
    index = graph.destination.index
    ours: dict[str, Function | None] = {"megagnn": lambda v: ops.segment_sum(v, graph.destination)}
    peers = torch_sums(graph, index) | csr_peers(graph, "sum") | scatter_peers(graph, index, "sum")
    return ours | peers | sparse_peers(graph, dtype)


def mean_functions(graph: Graph, dtype: torch.dtype) -> dict[str, Function | None]:
    """Segment mean, sorted edges."""
    index, counts = graph.destination.index, graph.destination.ptr.diff().clamp(min=1).view(-1, 1)
    ours: dict[str, Function | None] = {"megagnn": lambda v: ops.segment_mean(v, graph.destination)}
    ours["torch.index_add, divided"] = lambda v: zeros(graph, v).index_add_(0, index, v) / counts
    return ours | csr_peers(graph, "mean") | scatter_peers(graph, index, "mean")


def max_functions(graph: Graph, dtype: torch.dtype) -> dict[str, Function | None]:
    """Segment maximum, sorted edges."""
    index = graph.destination.index
    ours: dict[str, Function | None] = {"megagnn": lambda v: ops.segment_max(v, graph.destination)}
    ours["torch.scatter_reduce"] = lambda v: zeros(graph, v).scatter_reduce_(
        0, index.view(-1, 1).expand_as(v), v, "amax", include_self=False
    )
    return ours | csr_peers(graph, "max") | scatter_peers(graph, index, "max")


def scatter_functions(graph: Graph, dtype: torch.dtype) -> dict[str, Function | None]:
    """Sum by unsorted indices."""
    index, n = graph.source.index, graph.num_nodes
    ours: dict[str, Function | None] = {"megagnn": lambda v: ops.scatter_add(v, index, n)}
    return ours | torch_sums(graph, index) | scatter_peers(graph, index, "sum")


def gather_functions(graph: Graph, dtype: torch.dtype) -> dict[str, Function | None]:
    """Rows of the sources of the edges."""
    index = graph.source.index
    return {
        "megagnn": lambda v: ops.gather(v, graph.source),
        "torch.index_select": lambda v: v.index_select(0, index),
        "torch indexing": lambda v: v[index],
    }


def weighted_functions(graph: Graph, dtype: torch.dtype) -> dict[str, Function | None]:
    """Gather, multiply by a weight per edge, sum: in one pass against step by step."""
    d, s = graph.destination, graph.source
    n = graph.num_nodes
    works: dict[str, Function | None] = {
        "megagnn": lambda v, w: ops.gather_weighted_sum(v, w, d, s),
        "megagnn, three steps": lambda v, w: ops.segment_sum(ops.gather(v, s) * w.view(-1, 1), d),
        "torch.index_select, index_add": lambda v, w: zeros(graph, v).index_add_(
            0, d.index, v.index_select(0, s.index) * w.view(-1, 1)
        ),
    }
    peers: dict[str, Function | None] = dict.fromkeys(
        ("torch.sparse_csr @", "torch_scatter.scatter", "torch_sparse.matmul", "torch_geometric.spmm")
    )
    if dtype != torch.bfloat16:
        peers["torch.sparse_csr @"] = lambda v, w: torch.sparse_csr_tensor(d.ptr, s.index, w, (n, n)) @ v
    if torch_scatter:
        peers["torch_scatter.scatter"] = lambda v, w: torch_scatter.scatter(
            v[s.index] * w.view(-1, 1), d.index, 0, dim_size=n
        )
    if torch_sparse:
        # sources are in no order within a row, which the product does not mind
        matrix = torch_sparse.SparseTensor(
            rowptr=d.ptr, col=s.index, sparse_sizes=(n, n), is_sorted=True, trust_data=True
        )
        peers["torch_sparse.matmul"] = lambda v, w: torch_sparse.matmul(matrix.set_value(w, layout="coo"), v)
        if pyg_utils:
            peers["torch_geometric.spmm"] = lambda v, w: pyg_utils.spmm(matrix.set_value(w, layout="coo"), v)
    return works | peers


@dataclass
class Operation:
    """functions: of the values (and weights); edge_values: values are per edge, else per node."""

    functions: Callable[[Graph, torch.dtype], dict[str, Function | None]]
    edge_values: bool = True
    weighted: bool = False


OPERATIONS = {
    "sum": Operation(sum_functions),
    "mean": Operation(mean_functions),
    "max": Operation(max_functions),
    "scatter_add": Operation(scatter_functions),
    "gather": Operation(gather_functions, edge_values=False),
    "weighted_sum": Operation(weighted_functions, edge_values=False, weighted=True),
}


def forward_and_backward(function: Function, leaves: list[Tensor], grad: Tensor) -> Work:
    """Result and gradients."""

    def work() -> tuple[Tensor, ...]:
        out = function(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    return work


def make_case(name: str, graph: Graph, width: int, dtype_name: str, passes: str) -> Case:
    """One operation at one shape, forward alone or with its backward."""
    operation, dtype = OPERATIONS[name], DTYPES[dtype_name]
    rows = graph.num_edges if operation.edge_values else graph.num_nodes
    leaves = [torch.randn(rows, width).to(dtype)]
    if operation.weighted:
        leaves.append(torch.rand(graph.num_edges).to(dtype))
    functions = operation.functions(graph, dtype)
    result = functions["megagnn"](*leaves)  # type: ignore[misc]
    backward = passes == "both"
    if backward:
        leaves = [leaf.requires_grad_() for leaf in leaves]
        grad = torch.randn_like(result)
        works = {n: f and forward_and_backward(f, leaves, grad) for n, f in functions.items()}
    else:
        works = {n: f and (lambda f=f: f(*leaves)) for n, f in functions.items()}
    exact = functions["megagnn" if name == "max" else next(n for n in functions if n.startswith("torch."))]
    assert exact
    wide = [leaf.detach().double().requires_grad_(backward) for leaf in leaves]
    expected = forward_and_backward(exact, wide, grad.double())() if backward else exact(*wide)
    if name == "max":
        expected = expected[0] if backward else expected  # subgradients differ where entries are equal
    moved = leaves[0].numel() + result.numel() + (graph.num_edges if operation.weighted else 0)
    num_bytes = moved * dtype.itemsize * (2 if backward else 1)
    values = leaves[0] if operation.edge_values else result
    ceilings: list[Ceiling] = [harness.read_ceiling(values)] if operation.edge_values else []
    return Case(
        op=f"{name} {'forward+backward' if backward else 'forward'}",
        shape={"E": graph.num_edges, "F": width},
        dtype=dtype_name,
        implementations=works,
        expected=None if name == "max" and backward else expected,
        tolerance=TOLERANCE[dtype_name] * (2 if backward else 1),
        num_bytes=num_bytes,
        num_flops=2.0 * graph.num_edges * width if operation.weighted else 0,
        ceilings=[*ceilings, harness.copy_ceiling(num_bytes)],
    )


def cases(args: object) -> Iterator[Case]:
    """All that the arguments ask for, smallest first."""
    for num_edges in args.edges:  # type: ignore[attr-defined]
        graph = Graph(max(num_edges // 30, 1), num_edges)
        for width in args.widths:  # type: ignore[attr-defined]
            for dtype in args.dtypes:  # type: ignore[attr-defined]
                for name in args.ops:  # type: ignore[attr-defined]
                    yield make_case(name, graph, width, dtype, getattr(args, "pass"))


def main() -> None:
    """Runs the benchmark."""
    warnings.filterwarnings("ignore", message="Sparse ")  # CSR tensors are called beta
    args = harness.parse_args(
        __doc__,
        ("--ops", {"nargs": "+", "choices": OPERATIONS, "default": list(OPERATIONS)}),
        ("--edges", {"nargs": "+", "type": int, "default": [10_000, 100_000, 600_000]}),
        ("--widths", {"nargs": "+", "type": int, "default": [64, 256, 1024]}),
        ("--dtypes", {"nargs": "+", "choices": DTYPES, "default": ["float32", "bfloat16"]}),
        ("--pass", {"choices": ("forward", "both"), "default": "forward"}),
    )
    records = []
    for case in cases(args):
        found = harness.compare(case, args)
        print(harness.table(found), flush=True)
        records += found
    harness.report(records, args)


if __name__ == "__main__":
    main()
