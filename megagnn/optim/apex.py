"""NVIDIA apex's FusedAdam in the place of AdamW."""

from __future__ import annotations

from typing import Any

import torch


def make_apex_adamw(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
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

    class ApexAdamW(FusedAdam):
        """FusedAdam counts steps per group, torch.optim.AdamW and checkpoints per parameter."""

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

    return ApexAdamW(groups, adam_w_mode=True, **settings)
