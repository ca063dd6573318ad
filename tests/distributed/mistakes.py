"""Mistakes one could make in tensor parallelism, planted one at a time in a running process."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megagnn.models.egnn.edge import plan_channel as channel
from megagnn.models.egnn.edge.plan_rows import WEIGHT_DIMS, RowsRunner
from megagnn.ops import dual
from megagnn.parallel import collectives, messages, row_collectives
from megagnn.tensor_parallel.layers import RMSNorm, share

Plant = Callable[[pytest.MonkeyPatch], None]

_PAIRS = [("_Reduce", "_Copy"), ("_Gather", "_ReduceScatter"), ("_Split", "_Join"), ("_Unshare", "_Single")]
_ROW_PAIRS = [("_ToRows", "_ToChannels"), ("_JoinRows", "_OwnRows")]


def first_order(patch: pytest.MonkeyPatch) -> None:
    """Every backward does its collective itself, as in Megatron-LM, where autograd does not see it."""
    for module, pairs in ((collectives, _PAIRS), (row_collectives, _ROW_PAIRS)):
        for one, other in pairs:
            for name, conjugate in ((one, other), (other, one)):
                _set_backward(patch, module, name, _unseen(getattr(module, conjugate)))
    _set_backward(patch, collectives, "_Copy", _in_place)


def _unseen(conjugate: Any) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Tensor) -> Any:
        with torch.no_grad():
            return conjugate.apply(grads[0].detach(), *ctx.where), *(None for _ in ctx.where)

    return backward


def _in_place(ctx: Any, *grads: Tensor) -> Any:
    """The sum replaces the numbers of the gradient, and leaves its graph as it is."""
    grad = grads[0].clone(memory_format=torch.contiguous_format)
    messages.all_reduce(grad.detach(), *ctx.where)
    return grad, None, None


def copy_without_sum(patch: pytest.MonkeyPatch) -> None:
    """The all-reduce in the backward of `copy` is left out."""

    def backward(ctx: Any, *grads: Tensor) -> Any:
        return collectives._Copy.apply(grads[0], *ctx.where), None, None

    _set_backward(patch, collectives, "_Copy", backward)


def vector_on_every_rank(patch: pytest.MonkeyPatch) -> None:
    """What every rank does alike counts on each: `unshare` without `single`, in the runner no `first`."""

    def backward(ctx: Any, *grads: Tensor) -> Any:
        return collectives._Unshare.apply(grads[0], *ctx.where), None, None

    _set_backward(patch, collectives, "_Unshare", backward)
    block = channel.backward_block
    patch.setattr(channel, "backward_block", lambda *arguments: block(*arguments[:-1], True))


def norm_of_own_channels(patch: pytest.MonkeyPatch) -> None:
    """The sum of squares is not reduced."""

    def forward(self: RMSNorm, h_NF: Any) -> Any:
        sum_N1 = (h_NF * h_NF).sum(-1, keepdim=True)
        inverse_N1 = share(dual.rsqrt(sum_N1 * (1.0 / self.width) + self.eps), self.context)
        return h_NF * inverse_N1 * self.gain_F

    patch.setattr(RMSNorm, "forward", forward)


def weights_without_sum(patch: pytest.MonkeyPatch) -> None:
    """Under the plan `edge` each rank takes its slice of its own edges' weight gradients."""

    def own(self: RowsRunner, gradients: Any) -> list[Tensor | None]:
        tp, rank = self.context.tp_size, self.context.tp_rank
        return [
            collectives.stack(t, d, tp)[rank] if t is not None and d else t
            for t, d in zip(gradients, WEIGHT_DIMS, strict=True)
        ]

    patch.setattr(RowsRunner, "_weight_gradients", own)


def nothing(patch: pytest.MonkeyPatch) -> None:
    """The control."""


def _set_backward(patch: pytest.MonkeyPatch, module: Any, name: str, backward: Callable[..., Any]) -> None:
    patch.setattr(getattr(module, name), "backward", staticmethod(backward))
