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

from megagnn.optim.rule import MatrixRule, Settings, Shape, State


def _state(shape: Shape) -> dict[str, Shape]:
    m, n = shape
    # The mean is AdamW's, which may go on with it; second moments of another basis have another name.
    factors = {"left": (m, m), "right": (n, n), "left_basis": (m, m), "right_basis": (n, n)}
    return {"exp_avg": shape, "turned_exp_avg_sq": shape, **factors}


def _directions(
    gradients: Sequence[Tensor], states: Sequence[State], settings: Settings, step: int
) -> list[Tensor]:
    found = list(gradients)
    groups: dict[tuple[Shape, bool], list[int]] = {}
    for index, (gradient, state) in enumerate(zip(gradients, states, strict=True)):
        begins = not bool(state["left_basis"].any())
        groups.setdefault((tuple(gradient.shape), begins), []).append(index)
    for (_, begins), indices in groups.items():
        own = {name: torch.stack([states[i][name] for i in indices]) for name in states[0]}
        grad = torch.stack([gradients[i] for i in indices])
        direction = _begin(grad, own) if begins else _update(grad, own, settings, step)
        for place, index in enumerate(indices):
            found[index] = direction[place]
            for name, values in own.items():
                states[index][name].copy_(values[place])
    return found


def _begin(grad: Tensor, own: dict[str, Tensor]) -> Tensor:
    """Factors and bases of the first gradient; the weights stay."""
    own["left"], own["right"] = grad @ grad.mT, grad.mT @ grad
    for side in ("left", "right"):
        own[f"{side}_basis"] = torch.linalg.eigh(own[side])[1].flip(-1)  # the largest eigenvalue first
    return torch.zeros_like(grad)


def _update(grad: Tensor, own: dict[str, Tensor], settings: Settings, step: int) -> Tensor:
    beta1, beta2 = settings["betas"]
    left, right = own["left_basis"], own["right_basis"]
    own["exp_avg"].lerp_(grad, 1 - beta1)
    turned = left.mT @ grad @ right
    own["turned_exp_avg_sq"].mul_(beta2).addcmul_(turned, turned, value=1 - beta2)
    taken = max(step - 1, 1)  # but for the first step
    mean = left.mT @ own["exp_avg"] @ right / (1 - beta1**taken)
    scale = (own["turned_exp_avg_sq"] / (1 - beta2**taken)).sqrt_().add_(settings["eps"])
    direction = left @ (mean / scale) @ right.mT
    own["left"].lerp_(grad @ grad.mT, 1 - beta2)
    own["right"].lerp_(grad.mT @ grad, 1 - beta2)
    if step % settings["refresh_every"] == 0:
        for side, dim in (("left", 1), ("right", 2)):
            _refresh(own, side, dim)
    return direction


def _refresh(own: dict[str, Tensor], side: str, dim: int) -> None:
    """One power iteration; columns, and second moments with them, in the order of their eigenvalues."""
    factor, basis = own[side], own[f"{side}_basis"]
    turned = factor @ basis
    order = (basis * turned).sum(1).argsort(dim=-1, descending=True)
    columns = order[:, None, :].expand_as(turned)
    own[f"{side}_basis"] = torch.linalg.qr(turned.gather(2, columns))[0]
    rows = (order[:, :, None] if dim == 1 else order[:, None, :]).expand_as(own["turned_exp_avg_sq"])
    own["turned_exp_avg_sq"] = own["turned_exp_avg_sq"].gather(dim, rows)


def _cost(shape: Shape) -> float:
    """Floating-point operations over the 30 or so in whose time AdamW updates an element."""
    m, n = shape
    return 8 * m * n * (m + n) / 30


SOAP = MatrixRule(_state, _directions, _cost)
