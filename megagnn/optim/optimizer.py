"""The optimizer of a run, also those of PyTorch and NVIDIA apex, and the moving average of the weights."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megagnn.models.family import Model
from megagnn.ops.dispatch import accumulator_type
from megagnn.optim.adamw import FlatAdamW
from megagnn.optim.config import OptimConfig
from megagnn.optim.interface import (
    RunOptimizer,
    gradient_square_sum,
    one_number_of_steps,
    parameters_of,
    whole_norm,
)
from megagnn.optim.parts import FROZEN, share_of
from megagnn.optim.pieces import Piece, whole_slice
from megagnn.optim.rules import rule_of
from megagnn.optim.rules.adamw import ADAMW
from megagnn.optim.zero.offload import DiskStorage, MemoryStorage, Storage
from megagnn.optim.zero.optimizer import MATRICES, ShardedOptimizer
from megagnn.parallel.config import ParallelConfig
from megagnn.parallel.context import ParallelContext


class _PerParameter(RunOptimizer):
    """For optimizers that keep their state beside each parameter; gradients are scaled in place."""

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


def make_optimizer(model: nn.Module, config: OptimConfig) -> RunOptimizer:
    """AdamW (Loshchilov and Hutter, ICLR 2019); decay on matrices only, not on biases and gains.

    The implementation is the configuration's; the pieces of all are alike, so that a run may continue with
    another. `own` takes over the memory of the parameters: move the model first. Raises ValueError for
    another rule than AdamW, and for `apex` where it is not installed.
    """
    if config.rule != "adamw":
        raise ValueError(
            f"optim.rule = '{config.rule}' runs by make_sharded_optimizer (ZeRO stage 0 and above), and this "
            "is AdamW over whole parameters; use that one, or optim.rule = 'adamw'"
        )
    groups = parameter_groups(model, config)
    settings: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "eps": config.eps}
    if config.implementation == "own":
        return FlatAdamW(groups, **settings)
    return (make_apex_adamw if config.implementation == "apex" else TorchAdamW)(groups, **settings)


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Matrices, which decay, and vectors, which do not, each divided by their shares of the learning rate,
    and those for the rule of matrices apart, if `optim.rule` has one.

    A share is that of the parametrisation times that of the part (optim/parts.py). The product of rate and
    decay is the same for all matrices of a part, and follows the part's share.
    """
    kinds: dict[tuple[bool, bool, float, float], list[nn.Parameter]] = {
        (False, False, 1.0, 1.0): [],
        (False, True, 1.0, 1.0): [],
    }
    matrices = rule_of(config.rule).matrices
    of_matrices = {"momentum": config.momentum, "refresh_every": config.refresh_every, MATRICES: True}
    for name, p in model.named_parameters():
        share = share_of(name.removeprefix("model."), config)  # a potential's, or those of its model
        is_matrix = matrices is not None and getattr(p, "matrix_rate", None) is not None
        rate: float = getattr(p, "matrix_rate" if is_matrix else "rate", 1.0)
        kinds.setdefault((is_matrix, p.ndim < 2, rate, share), []).append(p)
    return [
        {
            "params": params,
            "weight_decay": 0.0 if vectors else config.weight_decay / rate,
            "rate": rate * share,
            **({FROZEN: True} if share == 0 else {}),
            **(of_matrices if is_matrix else {}),
        }
        for (is_matrix, vectors, rate, share), params in sorted(kinds.items(), key=lambda kind: kind[0])
        if params or rate == share == 1.0
    ]


def is_sharded(config: OptimConfig, parallel: ParallelConfig, dtype: str) -> bool:
    """Whether a run needs `make_sharded_optimizer`, which also takes other rules than AdamW, and adds
    gradients of bfloat16 up in float32."""
    return (
        parallel.zero_stage > 0 or config.offload != "none" or dtype == "bfloat16" or config.rule != "adamw"
    )


def make_sharded_optimizer(
    model: Model, config: OptimConfig, parallel: ParallelConfig, context: ParallelContext, seed: int = 0
) -> ShardedOptimizer:
    """The rule by ZeRO, for a model on its device; what `parallel.zero_stage` and `optim.offload` say.

    The seed is that of the initial weights, where the model was made with deferred parameters.
    Raises ValueError where the offload folder cannot be written.
    """
    storage: Storage = MemoryStorage(host=config.offload == "host")
    if config.offload == "disk":
        assert config.offload_dir is not None
        storage = DiskStorage(config.offload_dir)
    optimizer = ShardedOptimizer(
        model.blocks(),
        parameter_groups(model, config),
        context,
        parallel.zero_stage,
        config.learning_rate,
        config.betas,
        config.eps,
        bucket_bytes=int(parallel.bucket_megabytes * 2**20),
        storage=storage,
        seed=seed,
        rule=rule_of(config.rule),
    )
    if optimizer.residency is not None:
        model.read_ahead(optimizer.residency.looker(model.layers))
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Each group's learning rate: its share of this one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate", 1.0)


class WeightAverage:
    """Exponential moving average of a model's parameters: a <- d a + (1 - d) w after every step.

    The decay starts small, d_t = min(d, (1 + t) / (10 + t)), so that early averages forget the initial
    weights. The average of bfloat16 weights is float32: in bfloat16 steps of 1 - d would be rounded away.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay, self.num_updates = model, decay, 0
        self.average: dict[str, Tensor] = {
            n: p.detach().to(accumulator_type(p.dtype), copy=True) for n, p in model.named_parameters()
        }

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates)) if self.decay > 0 else 0.0
        self.num_updates += 1
        weights = [p.detach().to(accumulator_type(p.dtype)) for p in self.model.parameters()]
        torch._foreach_lerp_(list(self.average.values()), weights, 1.0 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the model holds the average; afterwards its own weights again, bit for bit."""
        own = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self._load(self.average)
        try:
            yield
        finally:
            self._load(own)

    @torch.no_grad()
    def _load(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(values[name])

    def pieces(self) -> list[Piece]:
        """The whole of it, which every data-parallel rank keeps."""
        parameters = dict(self.model.named_parameters())
        return [whole_slice(n, "average", parameters[n], a) for n, a in self.average.items()]
