"""The Cartesian edge operation as other packages have it: e3nn's, nequip's and mace's products, and PaiNN.

Each is made by its package as its users get it on a processor, and does the same sums over the same edges
with as many channels. What differs is in the peer's favour:

* Weights are a linear map of the functions of the distance, one product, which is timed; nequip's and mace's
  networks of the distance, and the Linears around the sums, are left out. Harmonics are given.
* e3nn: all 14 paths, harmonics to l = 4; what paths make for one field of the receiver is added up on the
  edge, gathered by index_select and summed by index_add.
* nequip, mace: the product of their own interaction blocks and their own sums, for features and harmonics to
  l = 2, without pseudovectors: 11 of the 14 paths, each summed apart, as the Linear behind them wants them.
* schnetpack: PaiNN's interaction without its network of atoms. It adds the sums to its input.

A peer keeps features and weights in its own layout and basis; `comparable` returns to this project's.
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from megagnn.models.cartesian.messages import PATHS
from tools.cartesian_reference import DEGREES, ORDERS, basis_change, converted, degrees_of


@dataclass
class Problem:
    """Sums over the neighbours of messages: what there is to compute.

    receiver, sender: atoms of each edge, (E,).
    basis: functions of the distance, (E, R); of splines all R, most of them zero.
    unit: directions, (E, 3).
    weight: of each path and channel, (P, F, R).
    features: of atoms by field, (N, F), (N, 3, F), (N, 5, F); cotangents of the sums, in the same shapes.
    """

    receiver: Tensor
    sender: Tensor
    basis: Tensor
    unit: Tensor
    weight: Tensor
    features: dict[str, Tensor]
    cotangents: dict[str, Tensor]


class Product:
    """e3nn's tensor product on the edges, and the sum over them.

    leaves: weights (K, F, R) of its K paths, and features (N, 9 F).
    cotangents: of what `forward` returns.
    given: what there is before it is computed.
    """

    degree = 4  # the largest of the harmonics

    def __init__(self, problem: Problem) -> None:
        from e3nn import o3

        self.problem, self.width = problem, problem.weight.shape[1]
        self.module = self.make(self.width)
        self.product = getattr(self.module, "tp", self.module)
        self.to_theirs = basis_change(o3).float()
        self.y = o3.spherical_harmonics(self.irreps(self.width)[1], problem.unit, True, "norm").float()
        self.matrix = torch.stack(
            [_couplings()[self._degrees(i)] / i.path_weight for i in self.product.instructions]
        ).float()
        weight = torch.einsum("kp,pfr->kfr", self.matrix, problem.weight.detach())
        features = self._theirs(problem.features, [0, 1, 2])
        self.leaves = [weight.requires_grad_(), features.detach().requires_grad_()]
        self.receivers = [ir.l for _, ir in self.product.irreps_out]
        self.cotangents = [self._theirs(problem.cotangents, self.receivers)]
        self.given = [*self.leaves, problem.basis, self.y, problem.receiver, problem.sender]

    @classmethod
    def irreps(cls, width: int) -> tuple[Any, Any]:
        """Of the features, and of the harmonics."""
        from e3nn import o3

        features = o3.Irreps([(width, ir) for ir in ("0e", "1o", "2e")])
        return features, o3.Irreps.spherical_harmonics(cls.degree)

    @classmethod
    @functools.cache  # compiled at its first calls, which the comparison of results makes
    def make(cls, width: int) -> Any:
        """The product, a module."""
        from e3nn import o3

        irreps, harmonics = cls.irreps(width)
        paths = [(DEGREES[a], l_y, DEGREES[b], "uvu", True) for a, b in ORDERS for l_y in degrees_of(a, b)]
        return o3.TensorProduct(
            irreps, harmonics, irreps, paths, internal_weights=False, shared_weights=False
        )

    def sums(self, features: Tensor, weight: Tensor) -> Tensor:
        """Sums of the messages, by path or by field of the receiver, side by side, in its layout."""
        p = self.problem
        messages: Tensor = self.product(features.index_select(0, p.sender), self.y, weight)
        return messages.new_zeros(len(features), messages.shape[1]).index_add_(0, p.receiver, messages)

    def forward(self) -> list[Tensor]:
        """The sums of this problem."""
        weight, features = self.leaves
        return [self.sums(features, linear(self.problem.basis, weight.flatten(0, 1)))]

    def comparable(self, result: list[Tensor], expected: list[Tensor]) -> list[Tensor]:
        """What it has returned, sums or gradients of its leaves, as `expected` has them; gradients of weights
        along paths that it does not have are taken from there."""
        if len(result) == 1:
            return self._ours(result[0], self.receivers)
        weight = torch.einsum("kp,kfr->pfr", self.matrix, result[0])
        weight += torch.einsum("pq,qfr->pfr", beyond(self.degree).float(), expected[0] - weight)
        return [weight, *self._ours(result[1], [0, 1, 2])]

    def _degrees(self, instruction: Any) -> tuple[int, ...]:
        """Of the sender, the harmonics and the receiver, of one of its paths."""
        p, i = self.product, instruction
        sides = ((p.irreps_in1, i.i_in1), (p.irreps_in2, i.i_in2), (p.irreps_out, i.i_out))
        return tuple(irreps[at].ir.l for irreps, at in sides)

    def _theirs(self, fields: dict[str, Tensor], degrees: list[int]) -> Tensor:
        given = [fields["h"].detach().unsqueeze(-1), fields["v"].mT, fields["t"].mT @ self.to_theirs.T]
        return torch.cat([given[degree].detach().flatten(1) for degree in degrees], -1)

    def _ours(self, x: Tensor, degrees: list[int]) -> list[Tensor]:
        """Fields of blocks side by side; those of one degree are added up."""
        blocks = x.detach().split([self.width * (2 * degree + 1) for degree in degrees], -1)
        h, v, t = (
            torch.stack([b for b, other in zip(blocks, degrees, strict=True) if other == degree]).sum(0)
            for degree in range(3)
        )
        t = t.unflatten(-1, (self.width, 5)) @ self.to_theirs
        return [h, v.unflatten(-1, (self.width, 3)).mT, t.mT]


class NequipProduct(Product):
    """The product and the sum of nequip's interaction block."""

    degree = 2

    @classmethod
    @functools.cache
    def make(cls, width: int) -> Any:
        from e3nn import o3
        from nequip.nn import InteractionBlock

        irreps, harmonics = cls.irreps(width)
        scalars = {"edge_embedding": o3.Irreps("8x0e"), "node_attrs": o3.Irreps("1x0e")}
        given = {**scalars, "edge_attrs": harmonics, "node_features": irreps}
        block = InteractionBlock(given, irreps, use_sc=False, avg_num_neighbors=1.0)
        return block.tp_scatter

    def sums(self, features: Tensor, weight: Tensor) -> Tensor:
        p = self.problem
        found: Tensor = self.module(features, self.y, weight, p.receiver, p.sender)
        return found


class MaceProduct(Product):
    """The product of mace's interaction block, and its sum."""

    degree = 2

    @classmethod
    @functools.cache
    def make(cls, width: int) -> Any:
        from e3nn import o3
        from mace.modules.blocks import RealAgnosticResidualInteractionBlock

        (irreps, harmonics), one, radial = cls.irreps(width), o3.Irreps("1x0e"), o3.Irreps("8x0e")
        block = RealAgnosticResidualInteractionBlock(
            one, irreps, harmonics, radial, irreps, irreps, 1.0, radial_MLP=[]
        )
        return block.conv_tp

    def sums(self, features: Tensor, weight: Tensor) -> Tensor:
        from mace.tools.scatter import scatter_sum

        p = self.problem
        messages = self.product(features[p.sender], self.y, weight)
        found: Tensor = scatter_sum(src=messages, index=p.receiver, dim=0, dim_size=len(features))
        return found


class Painn:
    """schnetpack's interaction of PaiNN, whose three products of a sender are its scalars, twice, and one."""

    def __init__(self, problem: Problem) -> None:
        loader: Any = torch.utils.data.dataloader
        if not hasattr(loader, "T_co"):  # schnetpack 2.1 imports a name that newer PyTorch has no more
            loader.T_co = typing.Any
        from schnetpack.representation.painn import PaiNNInteraction

        self.problem, width = problem, problem.weight.shape[1]
        self.interaction = PaiNNInteraction(width, torch.nn.functional.silu)
        self.interaction.interatomic_context_net = _Repeated()
        given = [problem.weight, problem.features["h"].unsqueeze(1), problem.features["v"]]
        self.leaves = [x.detach().clone().requires_grad_() for x in given]
        self.cotangents = [problem.cotangents["h"].unsqueeze(1), problem.cotangents["v"]]
        self.given = [*self.leaves, problem.basis, problem.unit, problem.receiver, problem.sender]

    def forward(self) -> list[Tensor]:
        """The features of this problem with the sums added."""
        p, (weight, q, mu) = self.problem, self.leaves
        filters = linear(p.basis, weight.flatten(0, 1)).unsqueeze(1)
        return list(self.interaction(q, mu, filters, p.unit, p.receiver, p.sender, len(q)))

    def comparable(self, result: list[Tensor], _: list[Tensor]) -> list[Tensor]:
        """Sums, or gradients of the sums, without those of what they were added to."""
        added = self.leaves[1:] if len(result) == 2 else self.cotangents
        h, v = (x.detach() - y.detach() for x, y in zip(result[-2:], added, strict=True))
        return [*(x.detach() for x in result[:-2]), h.squeeze(1), v]


class _Repeated(torch.nn.Module):
    def forward(self, q: Tensor) -> Tensor:
        return torch.cat((q, q, torch.ones_like(q)), -1)


torch.serialization.add_safe_globals([slice])  # which e3nn 0.4, mace's, has in the constants that it loads

Peer = Product | Painn
PEERS: dict[str, dict[str, type[Peer]]] = {
    "full": {"e3nn": Product, "nequip": NequipProduct, "mace": MaceProduct},
    "painn": {"schnetpack": Painn},
}
"""By the set of paths, under the name of the package."""


def installed(paths: str, names: Sequence[str]) -> dict[str, type[Peer] | None]:
    """Those of some names that have a set of paths; None where the package is not installed."""
    return {n: peer if find_spec(n) else None for n, peer in PEERS.get(paths, {}).items() if n in names}


def without_beyond(degree: int, weight: Tensor) -> Tensor:
    """Weights (14, F, R) of this project such that harmonics above a degree have none."""
    return weight - torch.einsum("pq,qfr->pfr", beyond(degree).to(weight), weight)


def beyond(degree: int) -> Tensor:
    """Of weights, the part that harmonics above a degree read: a projection, (14, 14) float64."""
    rows = [row for (_, l_y, _), row in _couplings().items() if l_y > degree]
    high = torch.stack(rows) if rows else torch.zeros(0, len(PATHS), dtype=torch.float64)
    return torch.linalg.pinv(high) @ high


def _couplings() -> dict[tuple[int, ...], Tensor]:
    """What a path (degrees of sender, harmonics, receiver) takes of this project's 14 weights, (14,)."""
    from e3nn import o3

    unit = torch.eye(len(PATHS), dtype=torch.float64).unsqueeze(-1)
    return {
        (DEGREES[pair[0]], l_y, DEGREES[pair[1]]): row.squeeze(-1)
        for pair in ORDERS
        for l_y, row in zip(degrees_of(*pair), converted(o3, unit, pair), strict=True)
    }
