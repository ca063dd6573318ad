"""The edge operation of the Cartesian family: sums over neighbours of the messages of messages.py.

    w_p,c = sum_n W_pcn basis_n(d)        u_i = sum over the edges from j to i of m(w, a_j, rh)

The kernels (csrc/cartesian_edge.cpp) make it in one pass over the rows of receivers; nothing of the size of
edges times channels is kept or written. Everything has a first dimension of one plane, the values, or of two,
values and tangents (`ops.dual`). `neighbour_sums_reference` is the same by PyTorch's operations.

[Note: derivatives] The sums are linear in a, and their transpose is the same kernel over the edges by sender,
with the paths from receivers to senders (`transposed`). Of a pair with cotangents (b, b') it runs on (b', b):
csrc/cartesian_message.h says why. For the backward's own derivative along xi,
<xi, J^T b> = <b, J xi> is the tangent of the pair with tangents xi: its gradients with cotangents (0, b).
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megagnn.models.cartesian import messages
from megagnn.models.cartesian.messages import COMPONENTS, PATHS, SCALARS, VECTORS, Edges, Path
from megagnn.models.radial import spread
from megagnn.ops import dual, extension
from megagnn.ops.dispatch import ABSENT, DTYPES, accumulator_type, below_autograd
from megagnn.ops.recompute import used_gradients
from megagnn.ops.segment import Segments

_OPS = torch.ops.megagnn
FIELDS = tuple(COMPONENTS)
Tensors = Sequence[Tensor | None]


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the compiled operation serves such features; torch.compile sees the reference."""
    there = {"cpu": extension.has_cpu, "cuda": extension.has_cuda}.get(device.type, False)
    return there and dtype in DTYPES and not torch.compiler.is_compiling()


def neighbour_sums(
    paths: Mapping[int, Path], weight_PFR: Tensor, sender: Mapping[str, Any], edges: Edges
) -> dict[str, Any]:
    """Sums of the messages to each atom, (N, Fe), (N, 3, Fe) and (N, 5, Fe), in the type of the features.

    All are tensors or all `Dual` numbers. Twice differentiable, as Dual numbers once.

    Args:
        paths: those that are added up; a set of `messages.SETS`.
        weight_PFR: (P, Fe, R), of each path and channel for each function of the distance; of K splines
            (P, Fe, K), of which `edges` have four.
        sender: features of atoms, of these shapes, by field; no more than the paths read.
        edges: with planes for the kernels, else for the reference.
    """
    basis, unit = edges.basis_planes, edges.unit_planes
    if basis is None or unit is None:
        return neighbour_sums_reference(paths, weight_PFR, sender, edges)
    where = _Where(tuple(paths), edges.destination, edges.source, edges.first_E)
    features = [_planes(sender[name]) if name in sender else None for name in FIELDS]
    found = _Sums.apply(where, weight_PFR.to(basis.dtype), basis, unit, *features)
    pair = isinstance(sender["h"], dual.Dual)
    return {
        name: dual.Dual.of_planes(x) if pair else x.squeeze(0)
        for name, x in zip(FIELDS, found, strict=True)
        if x is not None
    }


def neighbour_sums_reference(
    paths: Mapping[int, Path], weight_PFR: Tensor, sender: Mapping[str, Any], edges: Edges
) -> dict[str, Any]:
    """`neighbour_sums` by a product, gathers, `messages.messages` and sums."""
    basis_ER = edges.basis_ER
    if edges.first_E is not None:
        basis_ER = spread(basis_ER, edges.first_E, weight_PFR.shape[-1])
    weights = dual.linear(basis_ER, weight_PFR.flatten(0, 1)).chunk(len(paths), -1)
    sent = {name: dual.gather(x, edges.source) for name, x in sender.items()}
    found = messages.messages(paths, dict(zip(paths, weights, strict=True)), sent, edges)
    return {name: dual.segment_sum(m, edges.destination) for name, m in found.items()}


def planes_of(x: Any, dtype: torch.dtype) -> Tensor:
    """A tensor or `Dual` of edges with a dimension of planes, in the type in which features of a type are
    summed."""
    return _planes(x).to(accumulator_type(dtype)).contiguous()


def _planes(x: Any) -> Tensor:
    return x.planes if isinstance(x, dual.Dual) else x.unsqueeze(0)


@functools.cache
def transposed(number: int) -> int:
    """The path from the receiver's field to the sender's whose product is the transpose of a path's."""
    path = PATHS[number]
    wanted = (path.receiver, path.sender, _kind(path))
    return next(n for n, p in PATHS.items() if (p.sender, p.receiver, _kind(p)) == wanted)


def _kind(path: Path) -> int:
    return 0 if path.reads in SCALARS else 1 if path.reads in VECTORS else 2


@dataclass(frozen=True)
class _Where:
    """Paths, both ends of the edges, and the first weight that each reads."""

    paths: tuple[int, ...]
    destination: Segments
    source: Segments
    first: Tensor | None

    def sums(self, features: Tensors, *weight_and_edges: Tensor) -> list[Tensor | None]:
        """The operation, on planes."""
        return self._run(self.paths, False, self.destination, self.source, features, weight_and_edges)

    def transposed_sums(self, bars: Tensors, *weight_and_edges: Tensor) -> list[Tensor | None]:
        """Gradients with respect to features, from cotangents of the sums."""
        paths = tuple(map(transposed, self.paths))
        return self._run(paths, True, self.source, self.destination, bars, weight_and_edges)

    def _run(
        self, paths: Any, exchanged: bool, rows: Segments, other: Segments, features: Any, edges: Any
    ) -> list[Tensor | None]:
        with below_autograd():
            found = _OPS.cartesian_edge_sum.default(
                _wide(features, edges[0]), *edges, paths, exchanged, *_rows(rows), other.index, self.first
            )
        like = next(x for x in features if x is not None)
        return [None if x.dim() == 1 else x.to(like.dtype) for x in found]

    def gradients(
        self, features: Tensors, bars: Tensors, wanted: tuple[bool, bool], *edges: Tensor
    ) -> list[Tensor | None]:
        """With respect to weight and, planes each, basis and unit; None where `wanted` does not have them."""
        if not any(wanted):
            return [None] * 3
        given = (_wide(features, edges[0]), _wide(bars, edges[0]), *edges, self.paths, *wanted)
        with below_autograd():
            rows = _rows(self.destination)
            found = _OPS.cartesian_edge_gradient.default(*given, *rows, self.source.index, self.first)
        return [x if w else None for x, w in zip(found, (wanted[0], wanted[1], wanted[1]), strict=True)]


def _wide(tensors: Tensors, like: Tensor) -> list[Tensor]:
    return [ABSENT if t is None else t.to(like.dtype) for t in tensors]


def _rows(segments: Segments) -> tuple[Tensor, Tensor, Tensor | None]:
    return segments.index, segments.ptr, segments.perm


class _Sums(torch.autograd.Function):
    """where, weight, basis, unit, features (3) -> sums (3)."""

    @staticmethod
    def forward(ctx: Any, where: _Where, *tensors: Tensor | None) -> Any:
        ctx.where = where
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        edges: Any = tensors[:3]
        found = where.sums(tensors[3:], *edges)
        ctx.like = [None if x is None else x.shape for x in found]
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *bars: Tensor | None) -> Any:
        tensors = ctx.saved_tensors  # once: a recomputed layer is computed here
        if all(bar is None for bar in bars):
            return (None,) * 7
        used = used_gradients(ctx, tensors)
        filled = [
            tensors[3].new_zeros(shape) if bar is None and shape is not None else bar
            for bar, shape in zip(bars, ctx.like, strict=True)
        ]
        wanted = (used[0], any(used[1:3]), any(used[3:]))
        found = _Gradients.apply(ctx.where, wanted, *tensors, *filled)
        return None, *(x if u else None for x, u in zip(found, used, strict=True))


class _Gradients(torch.autograd.Function):
    """where, wanted, weight, basis, unit, features (3), bars (3) -> gradients of all but the bars."""

    @staticmethod
    def forward(ctx: Any, where: _Where, wanted: tuple[bool, bool, bool], *tensors: Tensor | None) -> Any:
        ctx.where = where
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        edges: Any = tensors[:3]
        features, bars = tensors[3:6], tensors[6:]
        found = where.gradients(features, bars, wanted[:2], *edges)
        of_features: Tensors = where.transposed_sums(bars, *edges) if wanted[2] else [None] * 3
        return *found, *(None if a is None else x for a, x in zip(features, of_features, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *xi: Tensor | None) -> Any:
        tensors = ctx.saved_tensors
        if all(x is None for x in xi):
            return (None,) * 11
        if tensors[1].shape[0] == 2:
            raise RuntimeError(
                "neighbour_sums: gradients of Dual numbers cannot be differentiated; use "
                "model.edge_operation = 'unfused'"
            )
        if xi[0] is not None:
            return None, None, *_double_backward_reference(ctx.where, tensors, xi)
        weight, *moving = tensors[:6]
        edges = [weight, *(_pair(x, t) for x, t in zip(moving[:2], xi[1:3], strict=True))]
        features = [_pair(x, t) for x, t in zip(moving[2:], xi[3:], strict=True)]
        bars = [None if b is None else torch.cat((torch.zeros_like(b), b)) for b in tensors[6:]]
        by_bars = [None if x is None else x[1:] for x in ctx.where.sums(features, *edges)]
        by_edges = ctx.where.gradients(features, bars, (True, True), *edges)
        by_features = ctx.where.transposed_sums(bars, *edges)
        values = [None if x is None else x[:1] for x in (*by_edges[1:], *by_features)]
        return None, None, by_edges[0], *values, *by_bars


def _pair(x: Tensor | None, tangent: Tensor | None) -> Any:
    if x is None:
        return None
    return torch.cat((x, torch.zeros_like(x) if tangent is None else tangent))


def _double_backward_reference(where: _Where, tensors: Tensors, xi: Tensors) -> list[Tensor | None]:
    """The same where gradients of the weights are differentiated as well (no training does)."""
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
        weight, *others = leaves[:6]
        basis, unit, *features = [None if x is None else x.squeeze(0) for x in others]
        assert weight is not None
        wide = [None if x is None else x.to(weight.dtype) for x in features]
        sender = {name: x for name, x in zip(FIELDS, wide, strict=True) if x is not None}
        assert unit is not None
        directions = (unit.unsqueeze(-1), *messages.direction_matrices(unit))
        edges = Edges(where.destination, where.source, basis, *directions, first_E=where.first)
        paths = {number: PATHS[number] for number in where.paths}
        found = neighbour_sums_reference(paths, weight, sender, edges)
        outputs = [found[name].unsqueeze(0) for name in FIELDS if name in found]
        given = [b.to(weight.dtype) for b in leaves[6:] if b is not None]
        wanted = [(x, t) for x, t in zip(leaves[:6], xi, strict=True) if x is not None and t is not None]
        first = torch.autograd.grad(outputs, [x for x, _ in wanted], given, create_graph=True)
        along = torch.stack([(g * t).sum() for g, (_, t) in zip(first, wanted, strict=True)]).sum()
        present = [x for x in leaves if x is not None]
        second = iter(torch.autograd.grad(along, present, allow_unused=True))
    return [None if x is None else next(second) for x in leaves]
