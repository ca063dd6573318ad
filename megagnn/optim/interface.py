"""What a run asks of an optimizer, whoever wrote it and whoever keeps which share of its state."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megagnn.ops import square_sum
from megagnn.optim.parts import clear_frozen_gradients
from megagnn.optim.pieces import Piece
from megagnn.parallel import messages
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.parameter import layout_of


class RunOptimizer(torch.optim.Optimizer):
    """An optimizer as a run uses it. A subclass writes `scaled_step`, or `clipped_step` where it cannot."""

    num_steps: int
    """Steps that it has taken."""

    def gradient_buffers(self) -> list[Tensor]:
        """Flat buffers of which the parameters' `.grad` are views, if there are any."""
        return []

    def clear_frozen_gradients(self) -> None:
        """Gradients, sums over the ranks by now, count as zero where a part is frozen (optim/parts.py)."""
        clear_frozen_gradients(self)

    def gradient_norm(self, context: ParallelContext) -> Tensor:
        """Euclidean norm of the gradients of the whole model, a scalar, the same on every rank.

        Gradients are sums over the data-parallel ranks by now. Tensor-parallel ranks hold slices of some
        parameters and replicas of the others, which count once; pipeline stages hold different layers. On one
        rank along both axes nothing is sent. Otherwise the norm is float64.
        """
        raise NotImplementedError

    def clipped_step(self, norm: Tensor, clip_norm: float | None) -> None:
        """One step with gradients times min(1, clip_norm / norm), of which `norm` is the norm."""
        # As in torch, the small number keeps a norm of zero harmless. A norm of NaN gives NaN.
        scale = 1.0 if clip_norm is None else clip_norm / (float(norm) + 1e-6)
        self.scaled_step(1.0 if scale > 1 else scale)

    def scaled_step(self, grad_scale: float) -> None:
        """One step with `grad_scale` times the gradients, which stay as they are."""
        raise NotImplementedError

    def pieces(self, model: nn.Module) -> list[Piece]:
        """Weights and state that this rank keeps: views, for saving and for loading, in one order on all
        ranks."""
        raise NotImplementedError

    def pieces_loaded(self, num_steps: int) -> None:
        """What is to be done after pieces of an optimizer that has taken so many steps were loaded."""
        raise NotImplementedError


class PiecesOptimizer(RunOptimizer):
    """An optimizer with its state in flat buffers, of which a rank may hold a share: no state dict."""

    def state_dict(self) -> dict[str, Any]:
        name = type(self).__name__
        raise NotImplementedError(f"{name} has no state dict; save and load its pieces() instead")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state_dict()


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All parameters, group by group."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def whole_norm(total: Tensor, parameters: Iterable[Tensor], context: ParallelContext) -> Tensor:
    """The norm of the whole model, where this rank's gradients have `total` as their sum of squares."""
    if context.tp_size == 1 and context.pp_size == 1:
        return total.sqrt()
    replicas = [p for p in parameters if context.tp_size > 1 and not layout_of(p).is_sharded]
    # Each rank takes an equal share in the replicas' squares: the sum counts them once, and is one number
    # even where machines round replicas differently.
    total = total - (1 - 1 / context.tp_size) * gradient_square_sum(replicas).to(total.device)
    return sum_over(total, context, ("tp", "pp")).sqrt()


def sum_over(total: Tensor, context: ParallelContext, axes: Sequence[str]) -> Tensor:
    """A scalar summed over the ranks of these axes, on its own device."""
    home, total = total.device, total.to(context.device)
    for axis in axes:
        messages.all_reduce(total, context, axis)
    return total.to(home)


def gradient_square_sum(parameters: Iterable[Tensor]) -> Tensor:
    """Sum of the squares of these parameters' gradients, a float64 scalar on their device."""
    squares = [square_sum(p.grad.contiguous()) for p in parameters if p.grad is not None]
    return torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)


def one_number_of_steps(steps: Iterable[Any]) -> int:
    """The number of steps that all parameters have taken, zero where none has.

    Raises ValueError where they differ.
    """
    found = {int(step) for step in steps}
    if len(found) > 1:
        raise ValueError(
            f"a checkpoint holds one number of optimizer steps, the parameters have taken {sorted(found)}; "
            "give every parameter a gradient, of zero where it has none"
        )
    return next(iter(found), 0)
