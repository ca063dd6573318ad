"""What a rank keeps of a run, as pieces, for any optimizer: all that a checkpoint saves and loads.

A sharded optimizer and its average say themselves which runs of which parameters they keep; the others keep
whole slices, the same on every data-parallel rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megagnn.optim.adamw import FlatAdamW
from megagnn.optim.average import ShardedAverage
from megagnn.optim.optimizer import WeightAverage
from megagnn.optim.pieces import Piece, whole_slice
from megagnn.optim.zero.optimizer import ShardedAdamW

MOMENTS = ("exp_avg", "exp_avg_sq")


def pieces_of(
    optimizer: torch.optim.Optimizer, model: nn.Module, average: WeightAverage | ShardedAverage
) -> list[Piece]:
    """The pieces of this rank: views, for saving and for loading; the same order on all ranks.

    An optimizer of torch or apex that has taken no step yet gets moments of zero, to be loaded into.
    """
    if isinstance(optimizer, ShardedAdamW):
        pieces = optimizer.pieces()
    else:
        names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        parts = _flat_parts(optimizer) if isinstance(optimizer, FlatAdamW) else _state_parts(optimizer)
        pieces = [whole_slice(names[p], kind, p, values) for p, kind, values in parts]
    if isinstance(average, ShardedAverage):
        return pieces + average.pieces()
    parameters = dict(model.named_parameters())
    return pieces + [whole_slice(n, "average", parameters[n], a) for n, a in average.average.items()]


def num_steps_of(optimizer: torch.optim.Optimizer) -> int:
    """Steps that the optimizer has taken.

    Raises:
        ValueError: parameters have taken different numbers of steps.
    """
    if isinstance(optimizer, ShardedAdamW):
        return optimizer.num_steps
    if isinstance(optimizer, FlatAdamW):
        steps = {b.num_steps for kinds in optimizer.buffers for b in kinds}
    else:
        steps = {int(entry["step"]) for entry in optimizer.state_dict()["state"].values()}
    if len(steps) > 1:
        raise ValueError(
            f"a checkpoint holds one number of optimizer steps, the parameters have taken {sorted(steps)}; "
            "give every parameter a gradient, of zero where it has none"
        )
    return next(iter(steps), 0)


@torch.no_grad()
def pieces_loaded(optimizer: torch.optim.Optimizer, num_steps: int) -> None:
    """What is to be done after pieces of `pieces_of` were loaded."""
    if isinstance(optimizer, ShardedAdamW):
        optimizer.num_steps = num_steps
        optimizer.take_weights()
    elif isinstance(optimizer, FlatAdamW):
        for kinds in optimizer.buffers:
            for b in kinds:
                b.num_steps = num_steps
                if b.master is not None:
                    b.param.copy_(b.master)
    else:
        packed = optimizer.state_dict()
        for entry in packed["state"].values():
            entry["step"] = torch.tensor(float(num_steps))
        optimizer.load_state_dict(packed)


def _flat_parts(optimizer: FlatAdamW) -> Iterator[tuple[Tensor, str, Tensor]]:
    for b in (b for kinds in optimizer.buffers for b in kinds):
        state = b.state()
        weights: list[Any] = state["master"] if b.master is not None else b.params
        for index, parameter in enumerate(b.params):
            yield parameter, "model", weights[index]
            for kind in MOMENTS:
                yield parameter, kind, state[kind][index]


def _state_parts(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, str, Tensor]]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if any("exp_avg" not in optimizer.state.get(p, {}) for p in parameters):
        packed = optimizer.state_dict()
        for index, p in enumerate(parameters):
            fresh = {"step": torch.tensor(0.0), **{kind: torch.zeros_like(p) for kind in MOMENTS}}
            packed["state"][index] = {**fresh, **packed["state"].get(index, {})}
        optimizer.load_state_dict(packed)
    for p in parameters:
        yield p, "model", p
        for kind in MOMENTS:
            yield p, kind, optimizer.state[p][kind]
