"""The edge operation of the Cartesian family, compiled, against the same by PyTorch's operations.

    python -m tools.bench.cartesian_edge --threads 1 --clock cpu --edges 10000 100000 --widths 32 64 128 256

`forward` is sums alone, `backward` sums and the gradients of features and weights, as training takes them;
`pair` values and tangents, for losses on forces. The least that must be moved is the senders' features, once
for each edge; the ceiling is a read of the features of all atoms, as many times. Widths are channels of the
messages; every atom has 40 neighbours, in its own structure of 64 atoms. `--splines` has numbers of splines,
of which each edge reads four; 0 for 8 Bessel functions.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from megagnn.models.cartesian.edge import neighbour_sums, planes_of
from megagnn.models.cartesian.messages import COMPONENTS, SETS, Edges, direction_matrices, paths_of
from megagnn.ops import Segments
from megagnn.ops.dual import Dual
from tools.bench import harness

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
    )
    records: list[harness.Record] = []
    for what in itertools.product(args.ops, args.paths, args.edges, args.widths, args.splines):
        found = harness.compare(case(*what), args)
        print(harness.table(found), flush=True)
        records += found
    harness.report(records, args)


OPS = ("forward", "backward", "pair forward", "pair backward")


def case(op: str, name: str, num_edges: int, width: int, splines: int = 0) -> harness.Case:
    """One operation on so many edges and channels of messages, with splines or Bessel functions."""
    planes, fields = 2 if "pair" in op else 1, ("h", "v", "t")[: 2 if name == "painn" else 3]
    num_atoms = max(num_edges // NEIGHBOURS, 1)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    ends = graph(num_atoms, num_edges, generator)
    paths = paths_of(name, fields)
    weight = normal(len(paths), width, splines or RADIAL).requires_grad_()
    first = None
    if splines:  # distances of a uniform density
        intervals = splines - 3
        first = (
            (torch.rand(num_edges, generator=generator) ** (1 / 3) * intervals)
            .long()
            .clamp(max=intervals - 1)
        )
    shapes = {n: (num_atoms, *([COMPONENTS[n]] if n != "h" else []), width) for n in fields}
    features = {n: normal(planes, *shape).requires_grad_() for n, shape in shapes.items()}
    unit = torch.nn.functional.normalize(normal(planes, num_edges, 3), dim=-1)
    basis, directions = (_number(x) for x in (normal(planes, num_edges, 4 if splines else RADIAL), unit))
    fused = Edges(
        *ends,
        basis_planes=planes_of(basis, torch.float32),
        unit_planes=planes_of(directions, torch.float32),
        first_E=first,
    )
    plain = Edges(*ends, basis, directions.unsqueeze(-1), *direction_matrices(directions), first_E=first)

    def work(edges: Edges) -> harness.Work:
        def forward() -> list[Tensor]:
            sender = {n: _number(x) for n, x in features.items()}
            found = neighbour_sums(paths, weight, sender, edges)
            return [x.planes if isinstance(x, Dual) else x for x in found.values()]

        def backward() -> list[Tensor]:
            outputs = forward()
            return list(torch.autograd.grad(outputs, [weight, *features.values()], outputs))

        return backward if "backward" in op else forward

    numbers = sum(COMPONENTS[n] for n in fields) * width * planes * 4
    every = torch.cat([x.detach().flatten() for x in features.values()])
    return harness.Case(
        f"{name} {op}{' splines' if splines else ''}",
        {"E": num_edges, "F": width},
        "float32",
        {"megagnn": work(fused), "pytorch": work(plain)},
        work(plain)(),
        1e-3,
        1.0,
        num_bytes=numbers * num_edges * (3 if "backward" in op else 1),
        ceilings=[harness.read_ceiling(every)],
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
