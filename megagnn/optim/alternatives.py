"""AdamW of PyTorch and of NVIDIA apex, with what a run asks of an optimizer."""

from typing import Any

import torch
from torch import Tensor, nn

from megagnn.optim.interface import (
    RunOptimizer,
    gradient_square_sum,
    one_number_of_steps,
    parameters_of,
    whole_norm,
)
from megagnn.optim.pieces import Piece, whole_slice
from megagnn.optim.rules.adamw import ADAMW
from megagnn.parallel.context import ParallelContext


class _PerParameter(RunOptimizer):
    """What is the same for optimizers that keep their state beside each parameter; their gradients are scaled
    in place."""

    @property
    def num_steps(self) -> int:  # type: ignore[override]
        """Steps taken; raises ValueError where parameters have taken different numbers."""
        return one_number_of_steps(entry["step"] for entry in self.state_dict()["state"].values())

    def gradient_norm(self, context: ParallelContext) -> Tensor:
        parameters = parameters_of(self)
        if context.tp_size == 1 and context.pp_size == 1:
            return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        return whole_norm(gradient_square_sum(parameters), parameters, context)

    def clipped_step(self, norm: Tensor, clip_norm: float | None) -> None:
        parameters = parameters_of(self)
        if clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
        self.step()

    def pieces(self, model: nn.Module) -> list[Piece]:
        """See the interface; before the first step there are moments of zero, to be loaded into."""
        parameters = parameters_of(self)
        if any(kind not in self.state.get(p, {}) for p in parameters for kind in ADAMW.state):
            packed = self.state_dict()
            for index, p in enumerate(parameters):
                fresh = {"step": torch.tensor(0.0), **{kind: torch.zeros_like(p) for kind in ADAMW.state}}
                packed["state"][index] = {**fresh, **packed["state"].get(index, {})}
            self.load_state_dict(packed)
        names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        return [
            whole_slice(names[p], kind, p, p if kind == "model" else self.state[p][kind])
            for p in parameters
            for kind in ("model", *ADAMW.state)
        ]

    def pieces_loaded(self, num_steps: int) -> None:
        packed = self.state_dict()
        for entry in packed["state"].values():
            entry["step"] = torch.tensor(float(num_steps))
        self.load_state_dict(packed)


def _count_versions(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Fused steps do not, and by them weights gathered ahead (`WeightRing`) are known as old."""
    torch.autograd.graph.increment_version(parameters_of(optimizer))


class TorchAdamW(_PerParameter, torch.optim.AdamW):
    """torch.optim.AdamW, fused."""

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        torch.optim.AdamW.__init__(self, groups, **settings, fused=True)
        self.register_step_post_hook(_count_versions)


def make_apex_adamw(groups: list[dict[str, Any]], **settings: Any) -> RunOptimizer:
    """apex.optimizers.FusedAdam with decoupled decay; its state dict is that of torch.optim.AdamW.

    Raises ValueError where it cannot be imported.
    """
    try:
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise ValueError(
            "optim.implementation is 'apex', but apex.optimizers.FusedAdam cannot be imported "
            f"({error}); build NVIDIA apex from its source (the package of that name on PyPI is another), or "
            "use 'own'"
        ) from error

    class ApexAdamW(_PerParameter, FusedAdam):
        """FusedAdam counts steps per group, torch.optim.AdamW and checkpoints per parameter."""

        def __init__(self) -> None:
            FusedAdam.__init__(self, groups, adam_w_mode=True, **settings)
            self.register_step_post_hook(_count_versions)

        def state_dict(self) -> dict[str, Any]:
            packed = super().state_dict()
            for group in packed["param_groups"]:
                step = torch.tensor(float(group.pop("step", 0)))
                for index in set(group["params"]) & packed["state"].keys():
                    packed["state"][index] = {"step": step.clone(), **packed["state"][index]}
            return packed

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            state = {index: dict(entry) for index, entry in state_dict["state"].items()}
            steps = {index: int(entry.pop("step", 0)) for index, entry in state.items()}
            groups = [
                {**group, "step": max((steps.get(index, 0) for index in group["params"]), default=0)}
                for group in state_dict["param_groups"]
            ]
            super().load_state_dict({"state": state, "param_groups": groups})

    return ApexAdamW()
