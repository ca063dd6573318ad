"""AdamW whose parameters, gradients and moments live in flat buffers, updated by `megagnn.ops.adamw_`."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from megagnn.ops import square_sum
from megagnn.optim.flat import FlatLayout
from megagnn.optim.interface import PiecesOptimizer, one_number_of_steps, parameters_of, whole_norm
from megagnn.optim.pieces import Piece, whole_slice
from megagnn.optim.rules.adamw import ADAMW
from megagnn.parallel.context import ParallelContext


class FlatBuffers:
    """The parameters of one group, type and device, and what the optimizer keeps beside them.

    Every buffer has the shape (layout.size,). `param` and `grad` have the type of the parameters, whose
    `.data` and `.grad` are views of them; the moments are float32 beside bfloat16, and there `master` holds
    the parameters in float32.
    """

    def __init__(self, params: list[nn.Parameter]) -> None:
        first = params[0]
        self.params, self.num_steps = params, 0
        self.layout = FlatLayout.of((p.shape for p in params), first.element_size())
        self.param = torch.zeros(self.layout.size, dtype=first.dtype, device=first.device)
        self.grad = torch.zeros_like(self.param)
        state = torch.float32 if first.dtype == torch.bfloat16 else first.dtype
        self.moments = {name: torch.zeros_like(self.param, dtype=state) for name in ADAMW.state}
        self.master = torch.zeros_like(self.param, dtype=state) if state != first.dtype else None
        self.grads = self.layout.views(self.grad)
        with torch.no_grad():
            for p, view in zip(params, self.layout.views(self.param), strict=True):
                view.copy_(p)
                p.data = view
        self.pointers = [p.data_ptr() for p in params]
        self.take_weights()
        self.collect_gradients()

    def take_weights(self) -> None:
        """Sets the master copy to the parameters as they are."""
        if self.master is not None:
            self.master.copy_(self.param)

    def state(self) -> dict[str, list[Tensor]]:
        """{name: one view per parameter} of what the optimizer keeps."""
        buffers = dict(self.moments)
        if self.master is not None:
            buffers["master"] = self.master
        return {name: self.layout.views(buffer) for name, buffer in buffers.items()}

    def zero_gradients(self) -> None:
        """Zeros the gradients and puts the views in place, so that the backward pass adds into them."""
        self.grad.zero_()
        for p, grad in zip(self.params, self.grads, strict=True):
            p.grad = grad

    def collect_gradients(self) -> None:
        """Copies gradients that were put elsewhere; one that is missing counts as zero.

        Raises RuntimeError where a parameter has left its buffer.
        """
        for p, grad, pointer in zip(self.params, self.grads, self.pointers, strict=True):
            if p.data_ptr() != pointer:
                raise RuntimeError(
                    f"FlatAdamW: a parameter of shape {tuple(p.shape)} no longer lies in its flat buffer; "
                    "move or convert the model before the optimizer is made, and set weights by copy_()"
                )
            if p.grad is grad:
                continue
            if p.grad is None:
                grad.zero_()
            else:
                grad.copy_(p.grad.detach())
            p.grad = grad


class FlatAdamW(PiecesOptimizer):
    """AdamW (Loshchilov and Hutter, ICLR 2019, Algorithm 2), one pass over one buffer per parameter group.

    It differs from torch.optim.AdamW in this: it takes the parameters' memory over, one buffer for each type
    and device of a group (move the model first); `zero_grad` keeps the gradients, zeroed; a missing gradient
    counts as zero; all parameters of a buffer have taken the same number of steps; lr is a float; float32,
    float64 and bfloat16 alone, the last with float32 master copies. Weights of bfloat16 that are set from
    outside count after `take_weights`. Its `pieces` are its state, and those of the
    other implementations of AdamW are alike.

    Raises ValueError for parameters of another type.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        self.buffers: list[list[FlatBuffers]] = []
        """For each parameter group, those of its types and devices."""
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim.Optimizer; the parameters move into buffers of their own."""
        super().add_param_group(param_group)
        kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
        for p in self.param_groups[-1]["params"]:
            if p.dtype not in (torch.float32, torch.float64, torch.bfloat16):
                raise ValueError(f"FlatAdamW: parameters must be float32, float64 or bfloat16, got {p.dtype}")
            kinds.setdefault((p.dtype, p.device), []).append(p)
        self.buffers.append([FlatBuffers(params) for params in kinds.values()])

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else closure()
        self.scaled_step(1.0)
        return loss

    @torch.no_grad()
    def scaled_step(self, grad_scale: float) -> None:
        for group, kinds in zip(self.param_groups, self.buffers, strict=True):
            for b in kinds:
                b.collect_gradients()
                b.num_steps += 1
                ADAMW.update(b.param, b.grad, b.moments, b.master, group, b.num_steps, grad_scale)
                torch.autograd.graph.increment_version(b.params)  # a graph that still needs them says so

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zeros all gradients. They are views of the flat buffer and stay, whatever `set_to_none` says."""
        for b in self._all_buffers():
            b.zero_gradients()

    def gradient_buffers(self) -> list[Tensor]:
        return [b.grad for b in self._all_buffers()]

    def gradient_norm(self, context: ParallelContext) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for b in self._all_buffers():
            b.collect_gradients()
            total = total + square_sum(b.grad).to(total.device)
        return whole_norm(total, parameters_of(self), context)

    def take_weights(self) -> None:
        """Begins anew from the parameters as they are, where bfloat16 ones were set from outside."""
        for b in self._all_buffers():
            b.take_weights()

    @property
    def num_steps(self) -> int:  # type: ignore[override]
        """Steps taken; raises ValueError where groups have taken different numbers."""
        return one_number_of_steps(b.num_steps for b in self._all_buffers())

    def pieces(self, model: nn.Module) -> list[Piece]:
        names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        found = []
        for b in self._all_buffers():
            views = b.state()
            kinds = {"model": views.pop("master", b.params), **views}
            for index, p in enumerate(b.params):
                found += [whole_slice(names[p], kind, p, of[index]) for kind, of in kinds.items()]
        return found

    @torch.no_grad()
    def pieces_loaded(self, num_steps: int) -> None:
        for b in self._all_buffers():
            b.num_steps = num_steps
            if b.master is not None:
                b.param.copy_(b.master)

    def kept(self) -> list[tuple[str, Tensor]]:
        buffers = self._all_buffers()
        state = [("state", s) for b in buffers for s in (*b.moments.values(), b.master) if s is not None]
        return state + [pair for b in buffers for pair in (("param", b.param), ("grad", b.grad))]

    def _all_buffers(self) -> list[FlatBuffers]:
        return [b for kinds in self.buffers for b in kinds]
