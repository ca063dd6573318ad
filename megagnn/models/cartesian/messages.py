"""Messages of the Cartesian family: products of a sender's features with the direction of the edge.

A sender has scalars s (Fe), vectors v (3, Fe) and symmetric traceless tensors t in five components (5, Fe),
T = sum_m t_m B_m in an orthonormal basis B (`tensor_basis`). With rh the unit vector of the edge and D its
5 x 3 matrix D_mk = (B_m rh)_k, channel by channel:

    alpha = v . rh        tau = D^T t (which is T rh)        beta = tau . rh
    m_h = w1 s + w2 alpha + w3 beta
    m_v = rh (w4 s + w5 alpha + w6 beta) + w7 v + w8 tau
    m_t = D ( rh (w9 s + w10 alpha + w11 beta) + w12 v + w13 tau ) + w14 t

D z are the components of the symmetric traceless part of rh (x) z. These are all products of l <= 2 with
spherical harmonics of rh to l <= 2 that a reflection does not change: the 14 paths of a tensor product "uvu"
with harmonics up to l = 4 (Geiger and Smidt, "e3nn", arXiv:2207.09453, section 4), in another basis.
"""

import functools
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megagnn.ops import Segments, dual
from megagnn.ops.dual import T

COMPONENTS = {"h": 1, "v": 3, "t": 5}
"""Of each field of the state, per channel."""


class Path(NamedTuple):
    """One product of a sender's features with the direction of the edge."""

    sender: str
    """Field of the sender that it reads."""
    reads: str
    """What of that field: `s`, `alpha`, `v`, `beta`, `tau` or `t` of the formulas."""
    receiver: str
    """Field of the receiver that it adds to."""
    factor: float
    """Gives components of unit variance from such of unit variance, over directions."""


PATHS: dict[int, Path] = {
    1: Path("h", "s", "h", 1.0),
    2: Path("v", "alpha", "h", 1.0),
    3: Path("t", "beta", "h", math.sqrt(3 / 2)),
    4: Path("h", "s", "v", math.sqrt(3)),
    5: Path("v", "alpha", "v", math.sqrt(3)),
    6: Path("t", "beta", "v", math.sqrt(9 / 2)),
    7: Path("v", "v", "v", 1.0),
    8: Path("t", "tau", "v", math.sqrt(9 / 5)),
    9: Path("h", "s", "t", math.sqrt(15 / 2)),
    10: Path("v", "alpha", "t", math.sqrt(15 / 2)),
    11: Path("t", "beta", "t", math.sqrt(45 / 4)),
    12: Path("v", "v", "t", math.sqrt(3)),
    13: Path("t", "tau", "t", math.sqrt(90 / 17)),
    14: Path("t", "t", "t", 1.0),
}
SETS: dict[str, tuple[int, ...]] = {"full": tuple(PATHS), "lean": (1, 4, 7, 9, 14), "painn": (1, 4, 7)}
"""The values of `model.paths`."""
SCALARS, VECTORS = ("s", "alpha", "beta"), ("v", "tau")
"""What paths read that has one, or three components."""


def paths_of(name: str, fields: Iterable[str]) -> dict[int, Path]:
    """The paths of a set that read these fields of the sender."""
    return {number: PATHS[number] for number in SETS[name] if PATHS[number].sender in set(fields)}


def factors(paths: Mapping[int, Path]) -> list[float]:
    """Constant of each path's weight: `Path.factor` over the root of the number of paths into its field."""
    into = [path.receiver for path in paths.values()]
    return [path.factor * into.count(path.receiver) ** -0.5 for path in paths.values()]


def tensor_basis() -> Tensor:
    """Symmetric traceless matrices xy, yz, zx, x^2 - y^2 and 2 z^2 - x^2 - y^2, orthonormal, (5, 3, 3)
    float64."""
    basis = torch.zeros(5, 3, 3, dtype=torch.float64)
    for m, (i, j) in enumerate(((0, 1), (1, 2), (2, 0))):
        basis[m, i, j] = basis[m, j, i] = 2**-0.5
    basis[3] = torch.tensor((1, -1, 0), dtype=torch.float64).diag() * 2**-0.5
    basis[4] = torch.tensor((-1, -1, 2), dtype=torch.float64).diag() * 6**-0.5
    return basis


@dataclass(frozen=True)
class Edges:
    """What all layers share about the edges of a batch, in the type of the features."""

    destination: Segments
    source: Segments
    basis_ER: Any = None
    """Functions of the distance, times the envelope."""
    unit_EC1: Any = None
    """rh, (E, 3, 1)."""
    matrix_E5C: Any = None
    """D, (E, 5, 3); None without tensors."""
    tensor_E51: Any = None
    """D rh, the components of rh (x) rh, (E, 5, 1); None without tensors."""
    tensor_basis: Tensor | None = None
    """B, (5, 3, 3); None without tensors."""
    basis_planes: Tensor | None = None
    """What the compiled operation reads, where it runs, in place of those above: the functions of the
    distance with a first dimension of one plane, or of values and tangents, (planes, E, R)."""
    unit_planes: Tensor | None = None
    """rh in the same way, (planes, E, 3)."""
    first_E: Tensor | None = None
    """Where weights are for more functions than an edge has, which of them its first is; else None."""


def direction_matrices(unit_EC: T) -> tuple[T, T]:
    """D (E, 5, 3) and D rh (E, 5, 1) of unit vectors rh (E, 3)."""
    like = unit_EC.value if isinstance(unit_EC, dual.Dual) else unit_EC
    flat = tensor_basis().to(like).flatten(0, 1)
    matrix_E5C = dual.linear_map(dual.linear(unit_EC, flat), lambda x: x.unflatten(-1, (5, 3)))
    return matrix_E5C, dual.matmul(matrix_E5C, unit_EC.unsqueeze(-1))


def messages(
    paths: Mapping[int, Path], weights: Mapping[int, Any], sender: Mapping[str, Any], edges: Edges
) -> dict[str, Any]:
    """Messages of all edges to each field of the receiver: (E, Fe), (E, 3, Fe), (E, 5, Fe).

    All are tensors or all `Dual` numbers; linear in the weights and in the sender's features.

    Args:
        paths: those that are added up.
        weights: of each path, (E, Fe).
        sender: features of each edge's sender, of these shapes, by field; no more than the paths read.
        edges: with their directions.
    """
    read: dict[str, Any] = {"s": sender["h"]}
    wanted = {path.reads for path in paths.values()}
    read |= {name: sender[name] for name in ("v", "t") if name in sender}
    if "alpha" in wanted:
        read["alpha"] = _dot(sender["v"], edges.unit_EC1)
    if wanted & {"tau", "beta"}:
        read["tau"] = dual.matmul(edges.matrix_E5C.mT, sender["t"])
        read["beta"] = _dot(read["tau"], edges.unit_EC1)

    def weighted(receiver: str, kinds: tuple[str, ...]) -> list[Any]:
        """The terms of a receiver's field that read features of some kinds."""
        return [
            (weights[n] if path.reads in SCALARS else weights[n].unsqueeze(-2)) * read[path.reads]
            for n, path in paths.items()
            if path.receiver == receiver and path.reads in kinds
        ]

    def along(receiver: str) -> Any:
        """The sum of the scalar terms, (E, 1, Fe)."""
        return added(weighted(receiver, SCALARS)).unsqueeze(-2)

    m_v_ECF = [along("v") * edges.unit_EC1, *weighted("v", VECTORS)]
    found = {"h": added(weighted("h", SCALARS)), "v": added(m_v_ECF)}
    if any(path.receiver == "t" for path in paths.values()):
        vectors = weighted("t", VECTORS)
        if vectors:
            made = dual.matmul(edges.matrix_E5C, added([along("t") * edges.unit_EC1, *vectors]))
        else:
            made = along("t") * edges.tensor_E51
        found["t"] = added([made, *weighted("t", ("t",))])
    return found


def added(terms: Sequence[Any]) -> Any:
    """The sum of one or more tensors or `Dual` numbers."""
    return functools.reduce(operator.add, terms)


def _dot(x_ECF: Any, unit_EC1: Any) -> Any:
    return (x_ECF * unit_EC1).sum(-2)


def work(paths: Mapping[int, Path]) -> tuple[int, int]:
    """Multiply-adds of `messages` per edge and channel: in products with the matrix D, and outside."""
    read = [path.reads for path in paths.values()]
    to_tensors = {path.reads for path in paths.values() if path.receiver == "t"}
    by_matrix = bool(to_tensors & set(VECTORS))
    products = 15 * bool({"tau", "beta"} & set(read)) + 15 * by_matrix
    weights = sum(1 if name in SCALARS else 3 if name in VECTORS else 5 for name in read)
    invariants = 3 * ("alpha" in read) + 3 * ("beta" in read)
    return products, weights + invariants + 3 + (3 if by_matrix else 5 if to_tensors else 0)
