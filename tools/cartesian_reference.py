"""Messages of e3nn's tensor product and their gradients, with weights and features as this project has them.

    python tools/cartesian_reference.py tests/models/cartesian/e3nn.npz

needs e3nn (0.6.0 made the file that is kept). tests/models/cartesian/test_e3nn.py compares with the file, and
with e3nn itself where it is installed.
"""

import math
import sys

import numpy as np
import torch
from torch import Tensor

from megagnn.models.cartesian.messages import COMPONENTS, PATHS, tensor_basis

EDGES, CHANNELS = 7, 3
DEGREES = {"h": 0, "v": 1, "t": 2}
Tensors = dict[str, Tensor]
# What the paths from one degree to another make of a component of order m about the edge's direction, which
# they leave in that order, (m, path): the component 0 of rh (x) rh is sqrt(2/3), 1 of rh (x) x is sqrt(1/2).
A, B = math.sqrt(2 / 3), math.sqrt(1 / 2)
ORDERS: dict[tuple[str, str], tuple[tuple[int, ...], list[list[float]]]] = {
    ("h", "h"): ((1,), [[1]]),
    ("v", "h"): ((2,), [[1]]),
    ("t", "h"): ((3,), [[A]]),
    ("h", "v"): ((4,), [[1]]),
    ("v", "v"): ((5, 7), [[1, 1], [0, 1]]),
    ("t", "v"): ((6, 8), [[A, A], [0, B]]),
    ("h", "t"): ((9,), [[A]]),
    ("v", "t"): ((10, 12), [[A, A], [0, B]]),
    ("t", "t"): ((11, 13, 14), [[A * A, A * A, 1], [0, B * B, 1], [0, 0, 1]]),
}


def inputs() -> Tensors:
    """Vectors `r` of edges, not of unit length, weights `w` (paths, E, F), features of the senders, and the
    cotangents of the messages, `bar h` and so on."""
    torch.manual_seed(11)
    found = {"r": torch.randn(EDGES, 3), "w": torch.randn(len(PATHS), EDGES, CHANNELS)}
    for name, components in COMPONENTS.items():
        shape = (EDGES, CHANNELS) if name == "h" else (EDGES, components, CHANNELS)
        found |= {name: torch.randn(shape), f"bar {name}": torch.randn(shape)}
    return {name: x.double() for name, x in found.items()}


def gradients(messages: Tensors, given: Tensors) -> Tensors:
    """The messages, and the gradients of their products with the cotangents."""
    total = torch.stack([(m * given[f"bar {name}"]).sum() for name, m in messages.items()]).sum()
    names = ["r", "w", *COMPONENTS]
    found = torch.autograd.grad(total, [given[name] for name in names])
    named = {f"gradient {name}": g for name, g in zip(names, found, strict=True)}
    return {**{f"message {name}": m.detach() for name, m in messages.items()}, **named}


def e3nn_result(given: Tensors) -> Tensors:
    """Messages and gradients by e3nn, from this project's inputs."""
    from e3nn import o3

    given = {name: x.clone().requires_grad_(not name.startswith("bar")) for name, x in given.items()}
    paths = [(pair, l_y) for pair in ORDERS for l_y in degrees_of(*pair)]
    irreps = {"h": o3.Irrep("0e"), "v": o3.Irrep("1o"), "t": o3.Irrep("2e")}
    harmonics = o3.Irreps("0e + 1o + 2e + 3o + 4e")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # which its couplings are kept in
    product = o3.TensorProduct(
        o3.Irreps([(CHANNELS, irreps[name]) for name in COMPONENTS]),
        harmonics,
        o3.Irreps([(CHANNELS, irreps[receiver]) for (_, receiver), _ in paths]),
        [(DEGREES[sender], l_y, k, "uvu", True) for k, ((sender, _), l_y) in enumerate(paths)],
        irrep_normalization="none",
        path_normalization="none",
        internal_weights=False,
        shared_weights=False,
    )
    torch.set_default_dtype(before)
    to_theirs = basis_change(o3)
    senders = [given["h"].unsqueeze(-1), given["v"].mT, given["t"].mT @ to_theirs.T]
    y = o3.spherical_harmonics(harmonics, given["r"], normalize=True, normalization="norm")
    weights = torch.cat([theirs for pair in ORDERS for theirs in converted(o3, given["w"], pair)], -1)
    out = product(torch.cat([x.flatten(1) for x in senders], -1), y, weights)
    sums = {name: torch.zeros(EDGES, CHANNELS, n, dtype=torch.float64) for name, n in COMPONENTS.items()}
    sizes = [CHANNELS * COMPONENTS[receiver] for (_, receiver), _ in paths]
    for ((_, receiver), _), block in zip(paths, out.split(sizes, -1), strict=True):
        sums[receiver] = sums[receiver] + block.unflatten(-1, (CHANNELS, -1))
    messages = {"h": sums["h"].squeeze(-1), "v": sums["v"].mT, "t": (sums["t"] @ to_theirs).mT}
    return gradients(messages, given)


def degrees_of(sender: str, receiver: str) -> range:
    """Degrees of the harmonics between two fields, such that a reflection changes nothing."""
    first, last = DEGREES[sender], DEGREES[receiver]
    return range(abs(first - last), first + last + 1, 2)


def basis_change(o3: object) -> Tensor:
    """Their five components from this project's, (5, 5), from the harmonics of some directions."""
    r = torch.eye(3, dtype=torch.float64).repeat(4, 1) + torch.randn(12, 3, dtype=torch.float64) * 0.5
    r = r / r.norm(dim=1, keepdim=True)
    ours = torch.einsum("mij,ei,ej->em", tensor_basis(), r, r) / A
    theirs = o3.spherical_harmonics(2, r, normalize=True, normalization="norm")  # type: ignore[attr-defined]
    found = torch.linalg.lstsq(ours, theirs).solution.T
    assert (found @ found.T - torch.eye(5)).abs().max() < 1e-12, "a change between orthonormal bases"
    return found


def converted(o3: object, w: Tensor, pair: tuple[str, str]) -> Tensor:
    """Weights of their paths between two fields, (paths, E, F), from this project's."""
    numbers, ours = ORDERS[pair]
    first, last = (DEGREES[name] for name in pair)
    polar = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    columns = []
    for l_y in degrees_of(*pair):
        y = o3.spherical_harmonics(l_y, polar, normalize=True, normalization="norm")  # type: ignore[attr-defined]
        couplings = o3.wigner_3j(first, l_y, last, dtype=torch.float64)  # type: ignore[attr-defined]
        matrix = torch.einsum("ijk,j->ik", couplings, y)
        # the component of order m about the polar axis is the one m before the middle
        columns.append(torch.stack([matrix[first - m, last - m] for m in range(len(numbers))]))
    change = torch.linalg.solve(torch.stack(columns, 1), torch.tensor(ours, dtype=torch.float64))
    mine = w[[list(PATHS).index(n) for n in numbers]]
    return torch.einsum("yp,pef->yef", change, mine)


if __name__ == "__main__":
    given = inputs()
    np.savez_compressed(sys.argv[1], **{n: x.numpy() for n, x in {**given, **e3nn_result(given)}.items()})
