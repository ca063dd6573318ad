"""What a layer of the Cartesian family does with the features of an atom between products with matrices.

Three functions of all fields at once: `mean_square` and, with its root, `scaled`, which together are the
norm, and `gates_and_products`. Each is one pass over the atoms, and one for its gradients, of tensors or of
`Dual` numbers (csrc/cartesian_atoms.cpp). `fused = False`, and differentiating a gradient again, take
PyTorch's operations, here as well. Features of bfloat16 are widened for as long as a kernel runs.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megagnn.models.cartesian.messages import COMPONENTS, added
from megagnn.ops import dual
from megagnn.ops.dispatch import ABSENT, below_autograd
from megagnn.ops.dual import T
from megagnn.ops.recompute import by_autograd, used_gradients
from megagnn.parallel.context import ParallelContext
from megagnn.tensor_parallel.layers import reduce_partial, share

_OPS = torch.ops.megagnn
FIELDS = tuple(COMPONENTS)
PARTS = {"h": ("gated", "vv", "tt"), "v": ("gated", "tv"), "t": ("gated", "vv", "tt")}
"""What the last Linears of a layer read, by field: the features times a gate, and products of two."""
Tensors = Sequence[Tensor | None]
Weights = Mapping[str, Tensor] | nn.ParameterDict


def parts_of(fields: Iterable[str], field: str) -> tuple[str, ...]:
    """`PARTS` of a field, without products of tensors where those are not among the fields of an atom."""
    has_tensors = "t" in fields
    return tuple(part for part in PARTS[field] if has_tensors or part in ("gated", "vv"))


def mean_square(
    fields: Mapping[str, Any],
    widths: Mapping[str, int],
    context: ParallelContext,
    fused: bool,
    others: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], Any]:
    """Sharded fields (N, F), (N, 3, F1), (N, 5, F2), plus others where given; mean over the fields of the
    mean square of their components, (N, 1), shared.

    Args:
        fields: by name.
        widths: channels of each over all ranks.
        others: fields that are added before the squares are taken; not each need be there.
    """
    others = others or {}
    factors = {name: 1.0 / (len(fields) * COMPONENTS[name] * widths[name]) for name in fields}
    if fused:
        pair, listed = _listed(fields)
        all_factors = [factors.get(name, 0.0) for name in FIELDS]
        partial, *sums = _Squares.apply(all_factors, pair, *listed, *_listed(others)[1])
        found = {**fields, **_named(pair, sums)}
        square_N1 = _wrapped(pair, partial)
    else:
        found = {name: x + others[name] if name in others else x for name, x in fields.items()}
        square_N1 = _weighted_squares(found, factors)
    return found, share(reduce_partial(square_N1, context), context)


def scaled(
    fields: Mapping[str, Any], square_N1: Any, epsilon: float, gains: Weights, fused: bool
) -> dict[str, Any]:
    """Fields over sqrt(square + epsilon), times a gain (F), (F1), (F2) per channel."""
    if not fused:
        inverse_N1 = dual.rsqrt(square_N1 + epsilon)
        return {name: _scale_atoms(name, x, inverse_N1) * gains[name] for name, x in fields.items()}
    pair, listed = _listed(fields)
    gain = [gains[name] if name in fields else None for name in FIELDS]
    return _named(pair, _Scaled.apply(epsilon, pair, _planes(square_N1), *listed, *gain))


def gates_and_products(
    u: Mapping[str, Any],
    square_N1: Any,
    gates: Any,
    slopes: Weights,
    basis: Tensor | None,
    fused: bool,
) -> dict[str, Any]:
    """Features times gates of scalars, and products of two features of an atom over the root of 1 + the mean
    square: of each field its `parts_of` side by side, (N, parts Fe), (N, 3, parts Fe), (N, 5, parts Fe).

    Args:
        u: `h` (N, Fe), `v` (N, 3, Fe) and, where there are tensors, `t` (N, 5, Fe).
        square_N1: their mean square.
        gates: of each of the slopes' fields, side by side in the order of `FIELDS`, (N, fields Fe).
        slopes: share of `h` in each field's gate, (Fe); the fields that are made.
        basis: `messages.tensor_basis` where there are tensors.
    """
    if not fused:
        return _products_reference(u, square_N1, gates, slopes, basis)
    pair, listed = _listed(u)
    given = [slopes.get(name) for name in FIELDS]
    found = _Products.apply((basis,), pair, _planes(square_N1), _planes(gates), *listed, *given)
    return _named(pair, found)


def _weighted_squares(fields: Mapping[str, Any], factors: Mapping[str, float]) -> Any:
    terms = []
    for name, x in fields.items():
        square = dual.square_sum(x)
        terms.append((square if name == "h" else square.sum(-2)) * factors[name])
    return added(terms)


def _scale_atoms(field: str, x: Any, factor_N1: Any) -> Any:
    """Features of a field times a number for each atom, in the type of the features."""
    return (x * _beside(field, factor_N1)).to(x.dtype)


def _beside(field: str, factor_N1: Any) -> Any:
    return factor_N1 if field == "h" else factor_N1.unsqueeze(-1)


def _products_reference(
    u: Mapping[str, Any], square_N1: Any, gates: Any, slopes: Weights, basis: Tensor | None
) -> dict[str, Any]:
    v, t = u["v"], u.get("t")
    c_N1 = dual.rsqrt(square_N1 + 1.0)
    found: dict[str, list[Any]] = {}
    width = u["h"].planes.shape[-1] if isinstance(u["h"], dual.Dual) else u["h"].shape[-1]
    written = [name for name in FIELDS if name in slopes]  # a ParameterDict has an order of its own
    for name, gate in zip(written, dual.split(gates, [width] * len(written)), strict=True):
        found[name] = [gated(name, gate + u["h"] * slopes[name], u[name])]
    products: dict[str, list[Any]] = {"h": [(v * v).sum(-2)], "v": [], "t": []}
    if t is not None:
        assert basis is not None
        products["h"].append((t * t).sum(-2))
        if "v" in found:
            matrix = to_matrix(t, basis)
            products["v"].append((matrix * v.unsqueeze(-3)).sum(-2))
        if "t" in found:
            products["t"].append(from_matrix(v.unsqueeze(-2) * v.unsqueeze(-3), basis))
            square = (matrix.unsqueeze(-2) * matrix.unsqueeze(-4)).sum(-3)
            products["t"].append(from_matrix(square, basis))
    return {
        name: dual.concatenated([*parts, *(_scale_atoms(name, x, c_N1) for x in products[name])])
        for name, parts in found.items()
    }


def gated(field: str, gate: Any, u: Any) -> Any:
    """Features times a gate of scalars: of scalars SiLU, of others the logistic function."""
    if field == "h":
        return dual.silu(gate) * u
    return dual.sigmoid(gate).unsqueeze(-2) * u


def to_matrix(t: T, basis: Tensor) -> T:
    """Components (N, 5, F) to matrices (N, 3, 3, F)."""
    flat = basis.flatten(1).mT
    return dual.linear_map(t, lambda x: (flat @ x).unflatten(-2, (3, 3)))


def from_matrix(m: T, basis: Tensor) -> T:
    """Components (N, 5, F) of the symmetric traceless part of matrices (N, 3, 3, F)."""
    flat = basis.flatten(1)
    return dual.linear_map(m, lambda x: flat @ x.flatten(-3, -2))


# ---- the compiled functions, on tensors or on planes, (2, ...)


def _planes(x: Any) -> Tensor:
    return x.planes if isinstance(x, dual.Dual) else x


def _wrapped(pair: bool, x: Tensor) -> Any:
    return dual.Dual.of_planes(x) if pair else x


def _listed(fields: Mapping[str, Any]) -> tuple[bool, list[Tensor | None]]:
    """Whether they are Dual numbers, and a tensor or None for each field that an atom may have."""
    pair = any(isinstance(x, dual.Dual) for x in fields.values())
    return pair, [_planes(fields[name]) if name in fields else None for name in FIELDS]


def _named(pair: bool, tensors: Tensors) -> dict[str, Any]:
    return {n: _wrapped(pair, x) for n, x in zip(FIELDS, tensors, strict=True) if x is not None}


def _wide(tensors: Tensors) -> list[Tensor]:
    return [ABSENT if x is None else x.float() if x.dtype is torch.bfloat16 else x for x in tensors]


def _like(found: Sequence[Tensor], tensors: Tensors) -> list[Tensor | None]:
    """Results or gradients in the types of tensors, None where they are."""
    return [
        None if x is None else f if f.dtype is x.dtype else f.to(x.dtype)
        for f, x in zip(found, tensors, strict=True)
    ]


def _differentiated(pair: bool) -> bool:
    """Whether a backward is to be differentiated again; RuntimeError of pairs, which cannot be."""
    if torch.is_grad_enabled() and pair:
        raise RuntimeError(
            "cartesian atoms: gradients of Dual numbers cannot be differentiated; use "
            "model.edge_operation = 'unfused'"
        )
    return torch.is_grad_enabled()


class _Squares(torch.autograd.Function):
    """factors, pair, fields (3), others (3) -> weighted squares, sums of fields and others (3)."""

    @staticmethod
    def forward(ctx: Any, factors: list[float], pair: bool, *tensors: Tensor | None) -> Any:
        fields, others = tensors[:3], tensors[3:]
        with below_autograd():
            square, *found = _OPS.cartesian_squares.default(_wide(fields), _wide(others), factors, pair)
        sums = _like(found, others)
        ctx.factors, ctx.pair, ctx.with_others = factors, pair, [x is not None for x in others]
        ctx.save_for_backward(*(x if y is None else y for x, y in zip(fields, sums, strict=True)))
        return square, *sums

    @staticmethod
    def backward(ctx: Any, *bars: Any) -> Any:
        found: list[Tensor | None]
        fields = ctx.saved_tensors
        if _differentiated(ctx.pair):

            def function(*given: Tensor | None) -> list[Tensor]:
                factors = dict(zip(FIELDS, ctx.factors, strict=True))
                return [_weighted_squares(_named(False, given), factors)]

            used = [x is not None and x.requires_grad for x in fields]
            found = by_autograd(function, fields, used, bars[:1])
            found = [
                x if bar is None else bar if x is None else x + bar
                for x, bar in zip(found, bars[1:], strict=True)
            ]
        else:
            with below_autograd():
                given = (_wide(fields), bars[0], _wide(bars[1:]), ctx.factors, ctx.pair)
                found = _like(_OPS.cartesian_squares_backward.default(*given), fields)
        others = (x if there else None for x, there in zip(found, ctx.with_others, strict=True))
        return None, None, *found, *others


class _Scaled(torch.autograd.Function):
    """epsilon, pair, square, fields (3), gains (3) -> fields (3)."""

    @staticmethod
    def forward(ctx: Any, epsilon: float, pair: bool, *tensors: Tensor | None) -> Any:
        ctx.epsilon, ctx.pair = epsilon, pair
        ctx.save_for_backward(*tensors)
        fields, gains = tensors[1:4], tensors[4:]
        with below_autograd():
            found = _OPS.cartesian_scale.default(_wide(fields), tensors[0], _wide(gains), epsilon, pair)
        return tuple(_like(found, fields))

    @staticmethod
    def backward(ctx: Any, *bars: Tensor | None) -> Any:
        tensors = ctx.saved_tensors  # once: a recomputed layer is computed here
        used = used_gradients(ctx, tensors)
        if _differentiated(ctx.pair):

            def function(square: Tensor, *given: Tensor | None) -> list[Tensor]:
                fields, gains = _named(False, given[:3]), _named(False, given[3:])
                return list(scaled(fields, square, ctx.epsilon, gains, False).values())

            return None, None, *by_autograd(function, tensors, used, _present(bars))
        square, fields, gains = tensors[0], tensors[1:4], tensors[4:]
        weights = any(used[4:])
        with below_autograd():
            found = _OPS.cartesian_scale_backward.default(
                _wide(fields), square, _wide(gains), _wide(bars), ctx.epsilon, weights, ctx.pair
            )
        ordered = (found[3], *found[:3], *found[4:])
        return None, None, *_only(ordered, tensors, used)


class _Products(torch.autograd.Function):
    """basis (in a tuple: not one of the tensors), pair, square, gates, u (3), slopes (3) -> products (3)."""

    @staticmethod
    def forward(ctx: Any, basis: tuple[Tensor | None], pair: bool, *tensors: Tensor | None) -> Any:
        ctx.basis, ctx.pair = basis, pair
        ctx.save_for_backward(*tensors)
        with below_autograd():
            found = _OPS.cartesian_products.default(*_product_arguments(tensors), pair)
        return tuple(_like(found, [u if k is not None else None for u, k in _u_and_slopes(tensors)]))

    @staticmethod
    def backward(ctx: Any, *bars: Tensor | None) -> Any:
        tensors = ctx.saved_tensors  # once: a recomputed layer is computed here
        used = used_gradients(ctx, tensors)
        if _differentiated(ctx.pair):

            def function(square: Tensor, gates: Tensor, *given: Tensor | None) -> list[Tensor]:
                u, slopes = _named(False, given[:3]), _named(False, given[3:])
                return list(_products_reference(u, square, gates, slopes, *ctx.basis).values())

            return None, None, *by_autograd(function, tensors, used, _present(bars))
        u, square, gates, slopes, epsilon, written = _product_arguments(tensors)
        given = (u, square, gates, slopes, _wide(bars), epsilon, written, any(used[5:]), ctx.pair)
        with below_autograd():
            found = _OPS.cartesian_products_backward.default(*given)
        return None, None, *_only((*found[3:5], *found[:3], *found[5:]), tensors, used)


def _u_and_slopes(tensors: Tensors) -> Iterable[tuple[Tensor | None, Tensor | None]]:
    return zip(tensors[2:5], tensors[5:], strict=True)


def _product_arguments(tensors: Tensors) -> tuple[Any, ...]:
    """What both compiled directions begin with: u, square, gates, slopes, epsilon, how many are written."""
    square, gates, *rest = tensors
    slopes = rest[3:]
    return _wide(rest[:3]), square, *_wide([gates]), _wide(slopes), 1.0, len(_present(slopes))


def _present(tensors: Tensors) -> list[Tensor]:
    return [x for x in tensors if x is not None]


def _only(found: Sequence[Tensor], tensors: Tensors, used: Sequence[bool]) -> list[Tensor | None]:
    """Gradients in the types of tensors; None for those that nobody uses."""
    return [x if u else None for x, u in zip(_like(found, tensors), used, strict=True)]
