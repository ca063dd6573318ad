"""The optimizer of a run, its step with clipping, and the moving average of the weights."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megagnn.models.family import Model
from megagnn.ops import square_sum
from megagnn.ops.dispatch import accumulator_type
from megagnn.optim.adamw import FlatAdamW
from megagnn.optim.apex import make_apex_adamw
from megagnn.optim.config import OptimConfig
from megagnn.optim.parts import FROZEN, clear_frozen_gradients, share_of
from megagnn.optim.zero.offload import DiskStorage, MemoryStorage, Storage
from megagnn.optim.zero.optimizer import ShardedAdamW
from megagnn.parallel import messages
from megagnn.parallel.config import ParallelConfig
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.parameter import layout_of


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, ICLR 2019); decay on matrices only, not on biases and gains.

    The implementation is the configuration's; the state dicts of all are alike, so that a run may continue
    with another. `own` takes over the memory of the parameters: move the model first. Raises ValueError for
    `apex` where it is not installed.
    """
    groups = parameter_groups(model, config)
    settings: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "eps": config.eps}
    if config.implementation == "own":
        return FlatAdamW(groups, **settings)
    if config.implementation == "apex":
        optimizer = make_apex_adamw(groups, **settings)
    else:
        optimizer = torch.optim.AdamW(groups, **settings, fused=True)
    optimizer.register_step_post_hook(_say_that_weights_changed)
    return optimizer


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Matrices, which decay, and vectors, which do not, each divided by their shares of the learning rate.

    A share is that of the parametrisation times that of the part (optim/parts.py). The product of rate and
    decay is the same for all matrices of a part, and follows the part's share.
    """
    kinds: dict[tuple[bool, float, float], list[nn.Parameter]] = {(False, 1.0, 1.0): [], (True, 1.0, 1.0): []}
    for name, p in model.named_parameters():
        share = share_of(name.removeprefix("model."), config)  # a potential's, or those of its model
        kinds.setdefault((p.ndim < 2, getattr(p, "rate", 1.0), share), []).append(p)
    return [
        {
            "params": params,
            "weight_decay": 0.0 if vectors else config.weight_decay / rate,
            "rate": rate * share,
            **({FROZEN: True} if share == 0 else {}),
        }
        for (vectors, rate, share), params in sorted(kinds.items(), key=lambda kind: kind[0])
        if params or rate == share == 1.0
    ]


def is_sharded(config: OptimConfig, parallel: ParallelConfig, dtype: str) -> bool:
    """Whether a run needs `make_sharded_optimizer`, which also adds gradients of bfloat16 up in float32."""
    return parallel.zero_stage > 0 or config.offload != "none" or dtype == "bfloat16"


def make_sharded_optimizer(
    model: Model, config: OptimConfig, parallel: ParallelConfig, context: ParallelContext, seed: int = 0
) -> ShardedAdamW:
    """AdamW by ZeRO, for a model on its device; what `parallel.zero_stage` and `optim.offload` say.

    The seed is that of the initial weights, where the model was made with deferred parameters.
    Raises ValueError where the offload folder cannot be written.
    """
    storage: Storage = MemoryStorage(host=config.offload == "host")
    if config.offload == "disk":
        assert config.offload_dir is not None
        storage = DiskStorage(config.offload_dir)
    optimizer = ShardedAdamW(
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
    )
    if optimizer.residency is not None:
        model.read_ahead(optimizer.residency.looker(model.layers))
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Each group's learning rate: its share of this one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate", 1.0)


def _say_that_weights_changed(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Fused steps do not count versions, by which weights gathered ahead (`WeightRing`) are known as old."""
    torch.autograd.graph.increment_version(_parameters(optimizer))


def gradient_buffers(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Flat buffers of which the parameters' `.grad` are views; none for other optimizers than our own."""
    return optimizer.gradient_buffers() if isinstance(optimizer, FlatAdamW) else []


def hold_frozen_parts(optimizer: torch.optim.Optimizer) -> None:
    """The gradients, sums over the ranks by now, count as zero where a part is frozen (optim/parts.py)."""
    if isinstance(optimizer, ShardedAdamW):
        optimizer.clear_frozen_gradients()
    else:
        clear_frozen_gradients(optimizer)


def gradient_norm(optimizer: torch.optim.Optimizer, context: ParallelContext) -> Tensor:
    """Euclidean norm of the gradients of the whole model, a scalar, the same on every rank.

    Gradients are sums over the data-parallel ranks by now. Tensor-parallel ranks hold slices of some
    parameters and replicas of the others, which count once; pipeline stages hold different layers. On one
    rank along both axes nothing is sent. Otherwise the norm is float64.
    """
    if isinstance(optimizer, ShardedAdamW):
        axes = ("dp", "tp", "pp") if optimizer.stage > 0 else ("tp", "pp")
        return _sum_over(optimizer.gradient_square_sum(), context, axes).sqrt()
    parameters = _parameters(optimizer)
    whole_model_here = context.tp_size == 1 and context.pp_size == 1
    if whole_model_here and not isinstance(optimizer, FlatAdamW):
        return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    total = optimizer.gradient_square_sum() if isinstance(optimizer, FlatAdamW) else _square_sum(parameters)
    if whole_model_here:
        return total.sqrt()
    replicas = [p for p in parameters if context.tp_size > 1 and not layout_of(p).is_sharded]
    # Each rank takes an equal share in the replicas' squares: the sum counts them once, and is one number
    # even where machines round replicas differently.
    total = total - (1 - 1 / context.tp_size) * _square_sum(replicas).to(total.device)
    return _sum_over(total, context, ("tp", "pp")).sqrt()


def _sum_over(total: Tensor, context: ParallelContext, axes: Sequence[str]) -> Tensor:
    """A scalar summed over the ranks of these axes, on its own device."""
    home, total = total.device, total.to(context.device)
    for axis in axes:
        messages.all_reduce(total, context, axis)
    return total.to(home)


def _square_sum(parameters: list[Tensor]) -> Tensor:
    """Sum of the squares of these parameters' gradients, a float64 scalar on their device."""
    squares = [square_sum(p.grad.contiguous()) for p in parameters if p.grad is not None]
    return torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)


def clipped_step(optimizer: torch.optim.Optimizer, norm: Tensor, clip_norm: float | None) -> None:
    """One step with gradients times min(1, clip_norm / norm), where `norm` is theirs; no limit with None.

    Our own optimizer scales them as it reads them and leaves them as they are; the others' are scaled in
    place.
    """
    if not isinstance(optimizer, FlatAdamW | ShardedAdamW):
        if clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(_parameters(optimizer), clip_norm, norm)
        optimizer.step()
        return
    # As in torch, the small number keeps a norm of zero harmless. A norm of NaN gives NaN.
    scale = 1.0 if clip_norm is None else clip_norm / (float(norm) + 1e-6)
    optimizer.step(grad_scale=1.0 if scale > 1 else scale)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


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
        """Take the model's present weights into the average."""
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
