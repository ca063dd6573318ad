"""Muon (Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024), for hidden matrices.

With momentum beta, gradient G of an (m, n) matrix and its orthogonalised form O(.):

    B <- beta B + (1 - beta) G,   D = 0.2 sqrt(max(m, n)) O((1 - beta) G + beta B)

O makes the singular values about one, so that D has the root mean square of an AdamW step (Liu et al.,
arXiv:2502.16982, eq. 4), and both rules take one learning rate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megagnn.optim.rule import ELEMENT_OPERATIONS, MatrixRule, Settings, Shape, State, batches

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Jordan et al.: the quintic whose slope at zero is steepest; singular values end in about (0.7, 1.2)."""
NUM_ITERATIONS = 5
EPS = 1e-7
PANELS, LEAST_ROWS = 4, 128
"""How many blocks of rows a symmetric product is made in on a CPU, and from which size on that pays."""


def orthogonalised(matrices: Tensor, scale: float = 1.0) -> Tensor:
    """Each of (k, m, n) with its singular values brought near one by Newton-Schulz iterations, times scale.

    Products are bfloat16 on a GPU, where that is what it is fast in, unless the matrices are float64.
    """
    x = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    if x.is_cuda and x.dtype == torch.float32:
        x = x.to(torch.bfloat16)
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=EPS)
    a, b, c = COEFFICIENTS
    for left in reversed(range(NUM_ITERATIONS)):
        last = 1.0 if left else scale
        square = times_own_transpose(x)
        polynomial = times_own_transpose(square, square, b, c)
        x = torch.baddbmm(x, polynomial, x, beta=a * last, alpha=last)
    x = x.to(matrices.dtype)
    return x.mT if matrices.shape[1] > matrices.shape[2] else x


def times_own_transpose(
    x: Tensor, plus: Tensor | None = None, plus_factor: float = 0.0, factor: float = 1.0
) -> Tensor:
    """plus_factor plus + factor x x^T of each of (k, m, n), with symmetric plus (k, m, m).

    Large ones on a CPU block by block, 10 of 16 and the rest mirrored.
    """
    rows = x.shape[1]
    if not x.is_cpu or rows < LEAST_ROWS:
        if plus is None:
            return torch.bmm(x, x.mT)
        return torch.baddbmm(plus, x, x.mT, beta=plus_factor, alpha=factor)
    product, height = x.new_empty(len(x), rows, rows), -(-rows // PANELS)
    plus = product if plus is None else plus  # with a factor of zero it is not read
    for begin in range(0, rows, height):
        end = min(begin + height, rows)
        panel = product[:, begin:end, :end]
        terms = (plus[:, begin:end, :end], x[:, begin:end], x[:, :end].mT)
        torch.baddbmm(*terms, beta=plus_factor, alpha=factor, out=panel)
        product[:, :begin, begin:end] = panel[:, :, :begin].mT
    return product


def _directions(
    gradients: Sequence[Tensor], states: Sequence[State], settings: Settings, step: int
) -> list[Tensor]:
    beta, momenta, found = settings["momentum"], [state["momentum"] for state in states], list(gradients)
    torch._foreach_lerp_(momenta, found, 1 - beta)
    torch._foreach_lerp_(found, momenta, beta)
    for ((short, long), _), indices in batches([(tuple(sorted(g.shape)), None) for g in found]):
        lying = [found[i] if found[i].shape[0] == short else found[i].mT for i in indices]
        steps = orthogonalised(torch.stack(lying), 0.2 * long**0.5)
        torch._foreach_copy_(lying, list(steps.unbind()))  # in the gradients' place
    return found


def _cost(shape: Shape) -> float:
    """See `MatrixRule.cost`."""
    short, long = sorted(shape)
    return NUM_ITERATIONS * (4 * short**2 * long + 2 * short**3) / ELEMENT_OPERATIONS


MUON = MatrixRule(lambda shape: {"momentum": shape}, _directions, _cost)
