"""AdamW whose parameters, gradients and moments live in flat buffers, updated by `megagnn.ops.adamw_`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from megagnn.ops import square_sum
from megagnn.optim.flat import FlatLayout
from megagnn.optim.interface import RunOptimizer, one_number_of_steps, parameters_of, whole_norm
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


class FlatAdamW(RunOptimizer):
    """AdamW (Loshchilov and Hutter, ICLR 2019, Algorithm 2), one pass over one buffer per parameter group.

    It differs from torch.optim.AdamW in this: it takes the parameters' memory over, one buffer for each type
    and device of a group (move the model first); `zero_grad` keeps the gradients, zeroed; a missing gradient
    counts as zero; all parameters of a buffer have taken the same number of steps; lr is a float; float32,
    float64 and bfloat16 alone, the last with float32 master copies. Weights of bfloat16 that are set from
    outside count after `take_weights`. The state dict is that of torch.optim.AdamW, in the parameters' own
    shapes, with `master` besides where there is one, and either loads the other's.

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
        for buffers in self.buffers[-1]:
            for name, views in buffers.state().items():
                for p, view in zip(buffers.params, views, strict=True):
                    self.state[p][name] = view

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As torch.optim.Optimizer."""
        loss = None if closure is None else closure()
        self.scaled_step(1.0)
        return loss

    @torch.no_grad()
    def scaled_step(self, grad_scale: float) -> None:
        """See the interface."""
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
        """The flat gradients, of which the parameters' `.grad` are views."""
        return [b.grad for b in self._all_buffers()]

    def gradient_norm(self, context: ParallelContext) -> Tensor:
        """See the interface."""
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
        """See the interface."""
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
        """See the interface."""
        for b in self._all_buffers():
            b.num_steps = num_steps
            if b.master is not None:
                b.param.copy_(b.master)

    def kept(self) -> list[tuple[str, Tensor]]:
        """See the interface."""
        buffers = self._all_buffers()
        state = [("state", s) for b in buffers for s in (*b.moments.values(), b.master) if s is not None]
        return state + [pair for b in buffers for pair in (("param", b.param), ("grad", b.grad))]

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.AdamW's; tensors are views of the buffers."""
        packed = super().state_dict()
        steps = {p: b.num_steps for b in self._all_buffers() for p in b.params}
        params = [p for group in self.param_groups for p in group["params"]]
        packed["state"] = {
            index: {"step": torch.tensor(float(steps[p])), **self.state[p]} for index, p in enumerate(params)
        }
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copies a state of this optimizer, or of torch.optim.AdamW, into the buffers.

        Raises ValueError where groups or shapes differ, or where parameters of a buffer have taken different
        numbers of steps.
        """
        saved, own = state_dict["param_groups"], self.param_groups
        sizes = [[len(group["params"]) for group in groups] for groups in (saved, own)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"FlatAdamW: the state has groups of {sizes[0]} parameters, the optimizer has {sizes[1]}"
            )
        for group, values in zip(own, saved, strict=True):
            group.update({name: value for name, value in values.items() if name != "params"})
        numbers = [i for group in saved for i in group["params"]]
        params = [p for group in own for p in group["params"]]
        entries = {p: state_dict["state"].get(i, {}) for p, i in zip(params, numbers, strict=True)}
        for b in self._all_buffers():
            self._load_buffers(b, [entries[p] for p in b.params])

    def _load_buffers(self, b: FlatBuffers, entries: list[dict[str, Any]]) -> None:
        steps = sorted({int(entry.get("step", 0)) for entry in entries})
        if len(steps) != 1:
            raise ValueError(
                f"FlatAdamW: the parameters of a group must have taken the same number of steps, got {steps}"
            )
        b.num_steps = steps[0]
        b.take_weights()  # where the state has no master copy
        for name, views in b.state().items():
            for view, entry in zip(views, entries, strict=True):
                if name in entry and entry[name].shape != view.shape:
                    raise ValueError(
                        f"FlatAdamW: {name} of the state has shape {tuple(entry[name].shape)}, the parameter "
                        f"has {tuple(view.shape)}"
                    )
                if name in entry:
                    view.copy_(entry[name])
                elif name != "master":
                    view.zero_()

    def _all_buffers(self) -> list[FlatBuffers]:
        return [b for kinds in self.buffers for b in kinds]
