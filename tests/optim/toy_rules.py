"""Two update rules that only tests know: of elements, and of whole matrices with state of another shape."""

import math

import torch

from megagnn.optim.rule import ElementRule, MatrixRule, Rule
from megagnn.optim.rules import RULES
from megagnn.optim.rules.adamw import ADAMW


def _sign_momentum(param, grad, state, master, settings, step, grad_scale):  # type: ignore[no-untyped-def]
    weights = param if master is None else master
    state["sign"].lerp_(grad.to(weights.dtype) * grad_scale, 0.1)
    weights.sub_(state["sign"].sign(), alpha=float(settings["lr"]))
    if master is not None:
        param.copy_(master)


def _normalised(gradients, states, settings, step):  # type: ignore[no-untyped-def]
    """Momentum over its norm, plus the mean of past gradients over each row."""
    found = []
    for gradient, state in zip(gradients, states, strict=True):
        state["velocity"].mul_(0.5).add_(gradient)
        state["rows"].lerp_(gradient.mean(1), 0.5)
        found.append(state["velocity"] / torch.linalg.vector_norm(state["velocity"]) + state["rows"][:, None])
    return found


RULES["sign_momentum"] = Rule(ElementRule(("sign",), _sign_momentum))
RULES["normalised"] = Rule(
    ADAMW,
    MatrixRule(lambda shape: {"velocity": shape, "rows": shape[:1]}, _normalised, lambda s: 3 * math.prod(s)),
)
