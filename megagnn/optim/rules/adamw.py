"""AdamW (Loshchilov and Hutter, ICLR 2019, Algorithm 2) by the kernel of `megagnn.ops.adamw_`."""

from torch import Tensor

from megagnn.ops import adamw_
from megagnn.optim.rule import ElementRule, Settings, State


def _update(
    param: Tensor,
    grad: Tensor,
    state: State,
    master: Tensor | None,
    settings: Settings,
    step: int,
    grad_scale: float,
) -> None:
    adamw_(
        param,
        grad,
        state["exp_avg"],
        state["exp_avg_sq"],
        master,
        lr=float(settings["lr"]),
        betas=settings["betas"],
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
        step=step,
        grad_scale=grad_scale,
    )


ADAMW = ElementRule(("exp_avg", "exp_avg_sq"), _update)
