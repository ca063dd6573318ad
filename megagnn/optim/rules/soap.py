"""SOAP (Vyas et al., arXiv:2409.11321, Algorithm 3): Adam in the eigenbasis of Shampoo's factors.

With G the gradient of an (m, n) matrix, L and R moving averages of G G^T and G^T G, and Q_L, Q_R their
eigenvectors, refreshed every k steps by one power iteration and a QR decomposition:

    M <- beta1 M + (1 - beta1) G,   V <- beta2 V + (1 - beta2) (Q_L^T G Q_R)^2
    D = Q_L [ (Q_L^T M Q_R) / (sqrt(V) + eps) ] Q_R^T, both moments corrected for their beginning at zero

The first step only finds the basis: in that of its own gradient, Adam would divide roundings by themselves.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megagnn.optim.rule import ELEMENT_OPERATIONS, MatrixRule, Settings, Shape, State, batches
from megagnn.optim.rules.muon import times_own_transpose

Own = dict[str, list[Tensor]]
"""State of matrices of one shape, by name."""


def _state(shape: Shape) -> dict[str, Shape]:
    m, n = shape
    # The mean is AdamW's, which may go on with it; second moments of another basis have another name.
    factors = {"left": (m, m), "right": (n, n), "left_basis": (m, m), "right_basis": (n, n)}
    return {"exp_avg": shape, "turned_exp_avg_sq": shape, **factors}


def _directions(
    gradients: Sequence[Tensor], states: Sequence[State], settings: Settings, step: int
) -> list[Tensor]:
    found = list(gradients)
    # A row of an orthogonal matrix, or zero.
    rows = torch._foreach_norm([state["left_basis"][0] for state in states])
    begins = [norm == 0 for norm in torch.stack(list(rows)).tolist()]
    for (_, begin), indices in batches([(tuple(g.shape), b) for g, b in zip(gradients, begins, strict=True)]):
        own = {name: [states[i][name] for i in indices] for name in states[0]}
        grad = torch.stack([gradients[i] for i in indices])
        direction = _begin(grad, own) if begin else _update(grad, own, settings, step)
        for index, of_matrix in zip(indices, direction, strict=True):
            found[index] = of_matrix
    return found


def _begin(grad: Tensor, own: Own) -> Tensor:
    """Factors and bases of the first gradient; the weights stay."""
    for side, factor in (("left", grad @ grad.mT), ("right", grad.mT @ grad)):
        torch._foreach_copy_(own[side], factor.unbind())
        basis = torch.linalg.eigh(factor)[1].flip(-1)  # the largest eigenvalue first
        torch._foreach_copy_(own[f"{side}_basis"], basis.unbind())
    return torch.zeros_like(grad)


def _update(grad: Tensor, own: Own, settings: Settings, step: int) -> Tensor:
    beta1, beta2 = settings["betas"]
    left, right = torch.stack(own["left_basis"]), torch.stack(own["right_basis"])
    torch._foreach_lerp_(own["exp_avg"], grad.unbind(), 1 - beta1)
    turned = left.mT @ grad @ right
    torch._foreach_lerp_(own["turned_exp_avg_sq"], turned.square_().unbind(), 1 - beta2)
    taken = max(step - 1, 1)  # but for the first step
    mean = left.mT @ torch.stack(own["exp_avg"]) @ right
    scale = torch.stack(own["turned_exp_avg_sq"]).div_(1 - beta2**taken).sqrt_().add_(settings["eps"])
    direction = left @ mean.div_(scale.mul_(1 - beta1**taken)) @ right.mT
    torch._foreach_lerp_(own["left"], times_own_transpose(grad).unbind(), 1 - beta2)
    torch._foreach_lerp_(own["right"], times_own_transpose(grad.mT).unbind(), 1 - beta2)
    if step % settings["refresh_every"] == 0:
        _refresh(own, "left", left, 1)
        _refresh(own, "right", right, 2)
    return direction


def _refresh(own: Own, side: str, basis: Tensor, dim: int) -> None:
    """One power iteration; columns, and second moments with them, in the order of their eigenvalues."""
    turned, second = torch.stack(own[side]) @ basis, torch.stack(own["turned_exp_avg_sq"])
    order = (basis * turned).sum(1).argsort(dim=-1, descending=True)
    columns = order[:, None, :].expand_as(turned)
    refreshed = torch.linalg.qr(turned.gather(2, columns))[0]
    torch._foreach_copy_(own[f"{side}_basis"], refreshed.unbind())
    rows = (order[:, :, None] if dim == 1 else order[:, None, :]).expand_as(second)
    torch._foreach_copy_(own["turned_exp_avg_sq"], second.gather(dim, rows).unbind())


def _cost(shape: Shape) -> float:
    """See `MatrixRule.cost`."""
    m, n = shape
    return 8 * m * n * (m + n) / ELEMENT_OPERATIONS


SOAP = MatrixRule(_state, _directions, _cost)
