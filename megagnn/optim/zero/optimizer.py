"""AdamW whose state, gradients and parameters the data-parallel ranks divide: ZeRO stages 1 to 3."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megagnn.optim.bucket_reducer import BUCKET_BYTES
from megagnn.optim.parts import FROZEN
from megagnn.optim.pieces import Piece
from megagnn.optim.zero.offload import MemoryStorage, Storage
from megagnn.optim.zero.reducer import ShardedReducer
from megagnn.optim.zero.residency import Residency
from megagnn.optim.zero.unit import Member, Unit
from megagnn.parallel import messages
from megagnn.parallel.context import ParallelContext


class ShardedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, ICLR 2019, Algorithm 2) by ZeRO (Rajbhandari et al., SC 2020).

    It takes the parameters' memory over, one flat buffer for each of `modules`: move the model first. What a
    rank keeps in each stage: [Note: stages] in zero/unit.py. Stage 0 keeps all, and is there for bfloat16
    parameters with float32 gradients. Gradients are summed by `reducer`, which comes with it. In stage 3 the
    parameters are whole only while their module runs, which must be by calling it; then losses on forces need
    `one_backward`, for a graph through a gradient would need them at other times.

    A step is `zero_grad()`, `reducer.start()`, a backward, `reducer.finish()`, `step()`. State dicts are not
    offered; `pieces` says what a rank keeps, for checkpoints.

    Args:
        modules: with their names in the model, in the order in which they run; each parameter in one of them.
        groups: of parameters, with their own settings, as for torch.optim.AdamW.
        storage: where what is kept lies.
        seed: of the initial values of parameters that were deferred (parallel/parameter.py).

    Raises:
        ValueError: a stage that does not exist, parameters of several types in a module, or a parameter that
            is in no module or in several.
    """

    def __init__(
        self,
        modules: Sequence[tuple[str, nn.Module]],
        groups: Sequence[dict[str, Any]],
        context: ParallelContext,
        stage: int,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        bucket_bytes: int = BUCKET_BYTES,
        storage: Storage | None = None,
        seed: int = 0,
    ) -> None:
        if stage not in (0, 1, 2, 3):
            raise ValueError(f"ShardedAdamW: stage must be 0, 1, 2 or 3, got {stage}")
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.context, self.stage, self.num_steps = context, stage, 0
        self.storage = storage or MemoryStorage()
        members = _members(modules, self.param_groups, seed)
        self.units = [
            Unit(name, members[name], context, stage, self.storage) for name, _ in modules if members[name]
        ]
        """One of each module that has parameters."""
        self.reducer = ShardedReducer(self.units, context, bucket_bytes, by_arrival=stage < 3)
        self.residency = None
        if stage == 3:
            running = [module for name, module in modules if members[name]]
            self.residency = Residency(running, self.units, self.reducer.complete)
        self.zero_grad()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Begins a step; whatever `set_to_none` says, gradients count from zero."""
        for unit in self.units:
            unit.zero_grad()

    @torch.no_grad()
    def step(self, closure: Any = None, grad_scale: float = 1.0) -> None:  # type: ignore[override]
        """One step with `grad_scale` times the gradients that the reducer has summed.

        Raises ValueError for a closure.
        """
        if closure is not None:
            raise ValueError("ShardedAdamW: closures are not supported; call the backward before step()")
        self.num_steps += 1
        coming: list[messages.Pending] = []
        for unit in self._streamed():
            unit.update(self.param_groups, self.num_steps, grad_scale)
            coming.append(unit.weights_changed())
        for pending in coming:  # they arrive where they belong: waiting earlier would save no memory
            pending.wait()

    def _streamed(self) -> Iterator[Unit]:
        """The units one after another, what lies on a disk read ahead and let go."""
        for unit, after in zip(self.units, [*self.units[1:], None], strict=True):
            if after is not None:
                self.storage.fetch(after.kept.values())
            yield unit
            self.storage.release(unit.kept.values())

    def clear_frozen_gradients(self) -> None:
        """Zero those of the groups that are frozen (optim/parts.py), in this rank's shards."""
        frozen = {index for index, group in enumerate(self.param_groups) if group.get(FROZEN)}
        for unit in self.units if frozen else ():
            unit.clear_gradients(frozen)

    def gradient_square_sum(self) -> Tensor:
        """Sum of the squares of the gradients of this rank's shards, a float64 scalar.

        What several tensor-parallel ranks hold counts by its share in each: the sum over dp (but for stage
        0), tp and pp is that of the whole model.
        """
        squares = [unit.square_sum() for unit in self.units]
        return torch.stack([s.to(squares[0].device) for s in squares]).sum()

    @torch.no_grad()
    def take_weights(self) -> None:
        """After the weights of `pieces` were set from outside: the parameters follow."""
        for unit in self._streamed():
            if unit.master is not None:
                unit.param_shard.copy_(unit.master)
            unit.weights_changed().wait()

    def pieces(self) -> list[Piece]:
        """All that this rank keeps of every parameter; call `take_weights` after writing into them."""
        return [
            piece
            for unit in self.units
            for kind, buffer in (
                ("model", unit.weight_shard),
                ("exp_avg", unit.exp_avg),
                ("exp_avg_sq", unit.exp_avg_sq),
            )
            for piece in unit.pieces(kind, buffer)
        ]

    @contextlib.contextmanager
    def swapped(self, shards: Sequence[Tensor]) -> Iterator[None]:
        """Within the context the model has other weights, one shard per unit; then its own, bit for bit."""
        own = [unit.weight_shard.clone() for unit in self.units]
        self._set_weights(shards)
        yield  # after an error nothing is put back: that takes all ranks, and the others know of none
        self._set_weights(own)

    @torch.no_grad()
    def _set_weights(self, shards: Sequence[Tensor]) -> None:
        for unit, shard in zip(self.units, shards, strict=True):
            unit.weight_shard.copy_(shard)
        self.take_weights()

    def state_dict(self) -> dict[str, Any]:
        """Raises NotImplementedError: a rank holds a share, which `pieces` describes."""
        raise NotImplementedError("ShardedAdamW has no state dict; save and load its pieces() instead")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises NotImplementedError, as `state_dict`."""
        raise NotImplementedError("ShardedAdamW has no state dict; save and load its pieces() instead")


def _members(
    modules: Sequence[tuple[str, nn.Module]], groups: Sequence[dict[str, Any]], seed: int
) -> dict[str, list[Member]]:
    """The parameters of each module, with their groups; every one of the groups exactly once."""
    number = {p: index for index, group in enumerate(groups) for p in group["params"]}
    found: dict[str, list[Member]] = {}
    seen: set[nn.Parameter] = set()
    for name, module in modules:
        named = [(n, p) for n, p in module.named_parameters() if p in number]
        members = [Member(f"{name}.{n}", p, number[p], seed) for n, p in named]
        kinds = {(m.parameter.dtype, m.parameter.device) for m in members}
        if len(kinds) > 1:
            raise ValueError(f"ShardedAdamW: the parameters of {name} must be of one type, got {kinds}")
        if again := [m.name for m in members if m.parameter in seen]:
            raise ValueError(f"ShardedAdamW: {again[0]} is in two modules; name the module around both")
        seen |= {m.parameter for m in members}
        found[name] = members
    if len(seen) != len(number):
        raise ValueError(
            f"ShardedAdamW: {len(number) - len(seen)} parameter(s) of the groups are in none of the modules "
            f"{', '.join(found)}; name the modules that hold them"
        )
    return found
