"""Parts of a model by name: shares of the learning rate, and what stays as it is.

A part is a beginning of a parameter's name, cut at a dot: `layers.1` is all of that layer, and nothing of
`layers.10`. A frozen part keeps its bits: its gradients are zeroed once they are sums over the ranks, so that
they are in no norm and no moment, and its rate is zero, so that it does not decay.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from megagnn.optim.config import OptimConfig

FROZEN = "frozen"
"""Key of a parameter group, beside `rate`."""


def share_of(name: str, config: OptimConfig) -> float:
    """A parameter's share of the learning rate by `optim.rates` and `optim.freeze`; zero where frozen."""
    if any(_holds(part, name) for part in config.freeze):
        return 0.0
    parts = [part for part in config.rates if _holds(part, name)]
    return config.rates[max(parts, key=len)] if parts else 1.0


def check_parts(config: OptimConfig, names: Iterable[str]) -> None:
    """Raises ValueError if `optim.rates` or `optim.freeze` name a part that the model does not have, or leave
    nothing to train.

    names: of all parameters of the whole model.
    """
    names = list(names)
    settings: Mapping[str, Iterable[str]] = {"optim.rates": config.rates, "optim.freeze": config.freeze}
    for setting, parts in settings.items():
        for part in parts:
            if not any(_holds(part, name) for name in names):
                raise ValueError(
                    f"{setting} names '{part}', which the model does not have; {_hint(part, names)}"
                )
    if all(share_of(name, config) == 0 for name in names):
        raise ValueError(
            "optim.freeze and optim.rates leave no part of the model to train; the parts are "
            f"{', '.join(_parts(names))}"
        )


def clear_frozen_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Zero the gradients of frozen parameters, after the sum over ranks and before the norm."""
    for group in optimizer.param_groups:
        if group.get(FROZEN):
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.detach().zero_()


def _holds(part: str, name: str) -> bool:
    return name == part or name.startswith(part + ".")


def _parts(names: Iterable[str]) -> list[str]:
    """element_embedding, layers.0, ..., energy_head: the modules that run one after another."""
    cut = (name.split(".")[: 2 if name.startswith("layers.") else 1] for name in names)
    return list(dict.fromkeys(".".join(words) for words in cut))


def _hint(part: str, names: list[str]) -> str:
    every = {".".join(name.split(".")[:k]) for name in names for k in range(1, name.count(".") + 2)}
    near = difflib.get_close_matches(part, sorted(every), n=1, cutoff=0.6)
    nearest = f"the nearest is '{near[0]}', " if near else ""
    return f"{nearest}the parts are {', '.join(_parts(names))}"
