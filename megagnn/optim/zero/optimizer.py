"""ZeRO stages 1 to 3: ranks divide state, gradients and parameters; the average of weights alike."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megagnn.optim.bucket_reducer import BUCKET_BYTES
from megagnn.optim.interface import PiecesOptimizer, sum_over
from megagnn.optim.parts import FROZEN
from megagnn.optim.pieces import Piece
from megagnn.optim.rule import Rule
from megagnn.optim.rules import RULES
from megagnn.optim.zero.matrices import Gathering, Matrix, by_group
from megagnn.optim.zero.offload import MemoryStorage, Storage
from megagnn.optim.zero.reducer import ShardedReducer
from megagnn.optim.zero.residency import Residency
from megagnn.optim.zero.unit import Member, Unit
from megagnn.parallel import messages
from megagnn.parallel.context import ParallelContext

MATRICES = "matrices"
"""Key of a parameter group that is for the rule of matrices."""
Arriving = Callable[[], Mapping[Matrix, Tensor]]
"""Awaits the directions of matrices."""


class ShardedOptimizer(PiecesOptimizer):
    """Any update rule (optim/rule.py) by ZeRO (Rajbhandari et al., SC 2020).

    It takes the parameters' memory over, one flat buffer for each of `modules`: move the model first. What a
    rank keeps in each stage: [Note: stages] in zero/unit.py. Stage 0 keeps all, and is there for bfloat16
    parameters with float32 gradients and for other rules than AdamW. Gradients are summed by `reducer`, which
    comes with it. In stage 3 the parameters are whole only while their module runs, which must be by calling
    it; then losses on forces need `one_backward`, for a graph through a gradient would need them at other
    times.

    A step is `zero_grad()`, `reducer.start()`, a backward, `reducer.finish()`, `step()`. State dicts are not
    offered; `pieces` says what a rank keeps, for checkpoints.

    Args:
        modules: with their names in the model, in the order in which they run; each parameter in one of them.
        groups: of parameters, with their own settings, as for torch.optim.AdamW.
        rule: AdamW if not given. Groups with the key "matrices" are for its rule of matrices.
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
        rule: Rule | None = None,
    ) -> None:
        if stage not in (0, 1, 2, 3):
            raise ValueError(f"ShardedOptimizer: stage must be 0, 1, 2 or 3, got {stage}")
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.context, self.stage, self.num_steps = context, stage, 0
        self.rule = rule or RULES["adamw"]
        self.storage = storage or MemoryStorage()
        members = _members(modules, self.param_groups, seed)
        spent = torch.zeros(context.dp_size if stage > 0 else 1, context.tp_size, dtype=torch.float64)
        self.units = [
            Unit(name, members[name], context, stage, self.storage, self.rule, spent)
            for name, _ in modules
            if members[name]
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

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step with the gradients that the reducer has summed; raises ValueError for a closure."""
        if closure is not None:
            raise ValueError("ShardedOptimizer: closures are not supported; call the backward before step()")
        self.scaled_step(1.0)

    @torch.no_grad()
    def scaled_step(self, grad_scale: float) -> None:
        self.num_steps += 1
        coming: list[messages.Pending] = []
        windows = list(self._windows())
        gathering, last = self._gather_matrices(windows[0], grad_scale), None
        for window, after in zip(windows, [*windows[1:], []], strict=True):
            self.storage.fetch(buffer for unit in after for _, buffer in unit.kept)
            ahead = self._gather_matrices(after, grad_scale)
            for unit in window:
                unit.update_elements(self.param_groups, self.num_steps, grad_scale)
            arriving = self._start_matrices(gathering)
            if last is not None:
                coming += self._finish(*last)
            last = (window, gathering, arriving)
            if not gathering.travels:
                coming, last = [*coming, *self._finish(*last)], None
            gathering = ahead
        coming += self._finish(*last) if last is not None else []
        for pending in coming:  # they arrive where they belong: waiting earlier would save no memory
            pending.wait()

    def _finish(
        self, window: Sequence[Unit], gathering: Gathering, arriving: Arriving
    ) -> list[messages.Pending]:
        """The matrices of a window take their step, and the new weights are sent."""
        self._update_matrices(gathering, arriving())
        coming = []
        for unit in window:
            unit.round_matrices()
            coming.append(unit.weights_changed())
            self.storage.release(buffer for _, buffer in unit.kept)
        return coming

    def _windows(self) -> Iterator[list[Unit]]:
        """Units whose matrices are updated together, others one by one; the same on tensor-parallel ranks."""
        window: list[Unit] = []
        for unit in self.units:
            sizes = [u.matrix_numel for u in (*window, unit)]
            if window and (0 in sizes or sum(sizes) > self.storage.window):
                yield window
                window = []
            window.append(unit)
        yield window

    def _gather_matrices(self, units: Sequence[Unit], grad_scale: float) -> Gathering:
        work = [w for unit in units for w in unit.work(self.param_groups)]
        return Gathering(work, grad_scale, self.context)

    def _start_matrices(self, gathering: Gathering) -> Arriving:
        if not gathering.work:
            return dict
        assert self.rule.matrices is not None
        return gathering.update(self.rule.matrices, self.param_groups, self.num_steps)

    def _update_matrices(self, gathering: Gathering, found: Mapping[Matrix, Tensor]) -> None:
        for number, chosen in by_group(gathering.work).items():
            settings, weights = self.param_groups[number], [w.matrix.weight for w in chosen]
            steps = [found[w.matrix].to(w.matrix.weight.device) for w in chosen]
            rate = float(settings["lr"])
            if settings["weight_decay"]:
                torch._foreach_mul_(weights, 1 - rate * settings["weight_decay"])
            torch._foreach_sub_(weights, steps, alpha=rate)

    def _streamed(self) -> Iterator[Unit]:
        """The units one after another, what lies on a disk read ahead and released."""
        for unit, after in zip(self.units, [*self.units[1:], None], strict=True):
            if after is not None:
                self.storage.fetch(buffer for _, buffer in after.kept)
            yield unit
            self.storage.release(buffer for _, buffer in unit.kept)

    def clear_frozen_gradients(self) -> None:
        frozen = {index for index, group in enumerate(self.param_groups) if group.get(FROZEN)}
        for unit in self.units if frozen else ():
            unit.clear_gradients(frozen)

    def gradient_norm(self, context: ParallelContext) -> Tensor:
        squares = [unit.square_sum() for unit in self.units]
        total = torch.stack([s.to(squares[0].device) for s in squares]).sum()
        return sum_over(total, context, ("dp", "tp", "pp") if self.stage > 0 else ("tp", "pp")).sqrt()

    @torch.no_grad()
    def take_weights(self) -> None:
        """After the weights of `pieces` were set from outside: the parameters follow."""
        for unit in self._streamed():
            if unit.master is not None:
                unit.param_shard.copy_(unit.master)
            unit.weights_changed().wait()

    def pieces(self, model: nn.Module | None = None) -> list[Piece]:
        """See the interface; units know the model's names. Call `take_weights` after writing into them."""
        found = []
        for unit in self.units:
            found += [*unit.pieces("model", unit.weight_shard), *unit.state_pieces()]
        return found

    def pieces_loaded(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.take_weights()

    def kept(self) -> list[tuple[str, Tensor]]:
        return [item for unit in self.units for item in unit.kept]

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


def _members(
    modules: Sequence[tuple[str, nn.Module]], groups: Sequence[dict[str, Any]], seed: int
) -> dict[str, list[Member]]:
    """The parameters of each module, with their groups; every one of the groups exactly once."""
    number = {p: index for index, group in enumerate(groups) for p in group["params"]}
    found: dict[str, list[Member]] = {}
    seen: set[nn.Parameter] = set()
    for name, module in modules:
        named = [(n, p) for n, p in module.named_parameters() if p in number]
        members = [
            Member(f"{name}.{n}", p, number[p], seed, groups[number[p]].get(MATRICES, False))
            for n, p in named
        ]
        kinds = {(m.parameter.dtype, m.parameter.device) for m in members}
        if len(kinds) > 1:
            raise ValueError(f"ShardedOptimizer: the parameters of {name} must be of one type, got {kinds}")
        if again := [m.name for m in members if m.parameter in seen]:
            raise ValueError(f"ShardedOptimizer: {again[0]} is in two modules; name the module around both")
        seen |= {m.parameter for m in members}
        found[name] = members
    if len(seen) != len(number):
        raise ValueError(
            f"ShardedOptimizer: {len(number) - len(seen)} parameter(s) of the groups are in none of the "
            f"modules {', '.join(found)}; name the modules that hold them"
        )
    return found


class ShardedAverage:
    """`optim.optimizer.WeightAverage` of the shards that a rank keeps, in the type of the master copies."""

    def __init__(self, optimizer: ShardedOptimizer, decay: float) -> None:
        self.optimizer, self.decay, self.num_updates = optimizer, decay, 0
        storage = optimizer.storage
        self.shards = [
            storage.zeros(f"{unit.name}.average", unit.shard_size, unit.state_dtype, unit.weight_shard.device)
            for unit in optimizer.units
        ]
        for unit, shard in zip(optimizer.units, self.shards, strict=True):
            shard.copy_(unit.weight_shard)

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates)) if self.decay > 0 else 0.0
        self.num_updates += 1
        for unit, shard in zip(self.optimizer.units, self.shards, strict=True):
            shard.lerp_(unit.weight_shard.to(shard.device), 1.0 - decay)
            self.optimizer.storage.release([shard])

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        with self.optimizer.swapped(self.shards):
            yield

    def pieces(self) -> list[Piece]:
        units = zip(self.optimizer.units, self.shards, strict=True)
        return [piece for unit, shard in units for piece in unit.pieces("average", shard)]
