"""The edge operation of the Cartesian family, compiled, against the same by PyTorch's operations.

    python -m tools.bench.cartesian_edge --threads 1 --clock cpu --edges 10000 100000 --widths 32 64 128 256
    python -m tools.bench.cartesian_edge --ops forward backward --splines 0 --against e3nn nequip mace
    python -m tools.bench.cartesian_edge --ops forward backward --splines 0 --paths painn --against schnetpack

`forward` is sums alone, `backward` sums and the gradients of features and weights, as training takes them;
`pair` values and tangents, for losses on forces. The least that must be moved is the senders' features, once
for each edge; the ceiling is a read of the features of all atoms, as many times. Widths are channels of the
messages; every atom has 40 neighbours, in its own structure of 64 atoms. `--splines` has numbers of splines,
of which each edge reads four; 0 for 8 Bessel functions.

`--against` has PyTorch's operations and other packages' (peers/cartesian.py says how), each of which wants an
environment of its own, such as those of examples/compare_peers.sh. What does not fit in `--memory` GB takes
fewer of the edges, and its times are divided by their share. `backward` says what is kept for it from the
forward, beyond features, weights, and what all layers know of the edges.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megagnn.models.cartesian.edge import neighbour_sums, planes_of
from megagnn.models.cartesian.messages import COMPONENTS, SETS, Edges, direction_matrices, paths_of
from megagnn.models.radial import spread
from megagnn.ops import Segments
from megagnn.ops.dual import Dual
from tools.bench import harness
from tools.bench.memory.step import peak_of_events
from tools.bench.peers import cartesian as peers

NEIGHBOURS, ATOMS, RADIAL = 40, 64, 8


def main() -> None:
    """Runs the cases that the arguments ask for."""
    args = harness.parse_args(
        __doc__,
        ("--edges", {"nargs": "+", "type": int, "default": (10000, 100000)}),
        ("--widths", {"nargs": "+", "type": int, "default": (32, 64, 128, 256)}),
        ("--paths", {"nargs": "+", "choices": tuple(SETS), "default": ("full",)}),
        ("--splines", {"nargs": "+", "type": int, "default": (0, 16)}),
        ("--ops", {"nargs": "+", "choices": OPS, "default": OPS}),
        ("--against", {"nargs": "+", "choices": AGAINST, "default": ("pytorch",)}),
        ("--memory", {"type": float, "default": 16.0}),
    )
    records: list[harness.Record] = []
    for what in itertools.product(args.ops, args.paths, args.edges, args.widths, args.splines):
        found = harness.compare(case(*what, args.against, args.memory * 1e9), args)
        print(harness.table(found), flush=True)
        records += found
    harness.report(records, args)


OPS = ("forward", "backward", "pair forward", "pair backward")
AGAINST = ("pytorch", *(name for kinds in peers.PEERS.values() for name in kinds))
CHECKED = 640  # edges of the graph on which the results of larger ones are compared


class Problem:
    """What there is to compute: `width` channels, one plane or two, with splines or Bessel functions."""

    def __init__(self, planes: int, name: str, num_edges: int, width: int, splines: int, degree: int) -> None:
        fields = ("h", "v", "t")[: 2 if name == "painn" else 3]
        num_atoms = max(num_edges // NEIGHBOURS, 1)
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.num_edges, self.width, self.num_atoms = num_edges, width, num_atoms
        self.ends = graph(num_atoms, num_edges, generator)
        self.paths = paths_of(name, fields)
        weight = normal(len(self.paths), width, splines or RADIAL)
        self.weight = (weight if degree > 2 else peers.without_beyond(degree, weight)).requires_grad_()
        self.first = None
        if splines:  # distances of a uniform density
            intervals = splines - 3
            place = torch.rand(num_edges, generator=generator) ** (1 / 3) * intervals
            self.first = place.long().clamp(max=intervals - 1)
        shapes = {n: (num_atoms, *([COMPONENTS[n]] if n != "h" else []), width) for n in fields}
        self.features = {n: normal(planes, *shape).requires_grad_() for n, shape in shapes.items()}
        self.cotangents = {n: normal(planes, *shape) for n, shape in shapes.items()}
        self.basis = normal(planes, num_edges, 4 if splines else RADIAL)
        self.unit = torch.nn.functional.normalize(normal(planes, num_edges, 3), dim=-1)
        self.leaves = [self.weight, *self.features.values()]

    def plain(self) -> peers.Problem:
        """The same, of values, as others have it."""
        basis, (to, of) = self.basis[0], self.ends
        if self.first is not None:
            basis = spread(basis, self.first, self.weight.shape[-1])
        features, cotangents = ({n: x[0] for n, x in y.items()} for y in (self.features, self.cotangents))
        return peers.Problem(to.index, of.index, basis, self.unit[0], self.weight, features, cotangents)


class Ours:
    """`neighbour_sums`, compiled or by PyTorch's operations: outputs on planes.

    leaves, cotangents: what `forward` is differentiated by, and with.
    given: what there is before, of atoms and, for all layers, of edges.
    """

    def __init__(self, compiled: bool, problem: Problem) -> None:
        self.problem, self.leaves = problem, problem.leaves
        self.cotangents = list(problem.cotangents.values())
        p, (basis, unit) = problem, (_number(x) for x in (problem.basis, problem.unit))
        shared: dict[str, Any] = {}
        if compiled:
            shared = {
                "basis_planes": planes_of(basis, torch.float32),
                "unit_planes": planes_of(unit, torch.float32),
            }
        else:
            names = ("basis_ER", "unit_EC1", "matrix_E5C", "tensor_E51")
            shared = dict(zip(names, (basis, unit.unsqueeze(-1), *direction_matrices(unit)), strict=True))
        self.edges = Edges(*p.ends, **shared, first_E=p.first)
        planes = [y for x in shared.values() for y in ([x.value, x.tangent] if isinstance(x, Dual) else [x])]
        self.given = [*p.leaves, *planes, *(end.index for end in p.ends)]

    def forward(self) -> list[Tensor]:
        """The sums."""
        p = self.problem
        found = neighbour_sums(p.paths, p.weight, {n: _number(x) for n, x in p.features.items()}, self.edges)
        return [x.planes if isinstance(x, Dual) else x.unsqueeze(0) for x in found.values()]


def case(
    op: str,
    name: str,
    num_edges: int,
    width: int,
    splines: int = 0,
    against: Sequence[str] = ("pytorch",),
    memory: float = 16e9,
) -> harness.Case:
    """One operation on so many edges and channels of messages, with splines or Bessel functions.

    Results are compared on a graph of CHECKED edges, if there are more. Others than ours take as many edges
    as fit in `memory` bytes, by what they take of it there.
    """
    planes, peer_kinds = 2 if "pair" in op else 1, peers.installed(name, against)
    degree = min((getattr(kind, "degree", 4) for kind in peer_kinds.values()), default=4)

    @functools.cache
    def problem(edges: int) -> Problem:
        return Problem(planes, name, edges, width, splines, degree)

    make: dict[str, Any] = {"megagnn": lambda p: Ours(True, p)}
    if "pytorch" in against:
        make["pytorch"] = lambda p: Ours(False, p)
    if planes == 1:
        make |= {n: kind and (lambda p, kind=kind: kind(p.plain())) for n, kind in peer_kinds.items()}
    few = min(num_edges, CHECKED)
    small = {n: m(problem(few)) if m else None for n, m in make.items()}
    checked = _case(op, name, problem(few), splines, small)
    if num_edges == few:
        return checked
    times = num_edges / few
    portions = {
        n: min(1.0, memory / times / peak_of_events(work))
        for n, work in checked.implementations.items()
        if work and n != "megagnn"
    }
    made = {n: m(problem(int(num_edges * portions.get(n, 1.0)))) if m else None for n, m in make.items()}
    found = _case(op, name, problem(num_edges), splines, made)
    found.checked, found.portions = checked, portions
    if "backward" in op:
        found.kept_bytes = {n: times * harness.kept_bytes(x.forward, x.given) for n, x in small.items() if x}
    return found


def _case(
    op: str, name: str, problem: Problem, splines: int, made: dict[str, Ours | peers.Peer | None]
) -> harness.Case:
    """The case of what is made; with results to compare if the problem is small."""
    backward = "backward" in op

    def work(what: Ours | peers.Peer) -> harness.Work:
        def gradients() -> list[Tensor]:
            return list(torch.autograd.grad(what.forward(), what.leaves, what.cotangents))

        return gradients if backward else what.forward

    expected = work(Ours(False, problem))() if problem.num_edges <= CHECKED else None

    def comparable(peer: peers.Peer, result: list[Tensor]) -> list[Tensor]:
        assert expected is not None
        found = peer.comparable(result, expected)
        return [x.reshape(wanted.shape) for x, wanted in zip(found, expected, strict=True)]

    features = torch.cat([x.detach().flatten() for x in problem.features.values()])
    gathered = 4.0 * features.numel() / problem.num_atoms * problem.num_edges
    return harness.Case(
        f"{name} {op}{' splines' if splines else ''}",
        {"E": problem.num_edges, "F": problem.width},
        "float32",
        {n: work(x) if x else None for n, x in made.items()},
        expected,
        1e-3,
        1.0,
        num_bytes=gathered * (3 if backward else 1),
        ceilings=[harness.read_ceiling(features)],
        comparable={
            n: functools.partial(comparable, x) for n, x in made.items() if isinstance(x, peers.Peer)
        },
    )


def graph(num_atoms: int, num_edges: int, generator: torch.Generator) -> tuple[Segments, Segments]:
    """Receivers and senders of random edges within structures."""
    receiver = torch.arange(num_edges) * num_atoms // num_edges
    first = receiver // ATOMS * ATOMS
    sender = first + torch.randint(0, ATOMS, (num_edges,), generator=generator)
    sender = sender.clamp(max=num_atoms - 1)

    def segments(index: Tensor, perm: Tensor | None) -> Segments:
        counts = torch.bincount(index, minlength=num_atoms)
        return Segments(index, torch.cat([counts.new_zeros(1), counts.cumsum(0)]), perm)

    return segments(receiver, None), segments(sender, sender.argsort(stable=True))


def _number(planes: Tensor) -> Tensor | Dual:
    return Dual.of_planes(planes) if len(planes) == 2 else planes.squeeze(0)


if __name__ == "__main__":
    main()
