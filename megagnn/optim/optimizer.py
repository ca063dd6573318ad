"""AdamW for a model, and the moving average of its weights."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from megagnn.config import OptimConfig


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, ICLR 2019); decay on matrices only, not on biases and gains."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)


class WeightAverage:
    """Exponential moving average of a model's parameters: a <- d a + (1 - d) w after every step.

    The decay starts small, d_t = min(d, (1 + t) / (10 + t)), so that early averages forget the initial
    weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay, self.num_updates = model, decay, 0
        self.average: dict[str, Tensor] = {n: p.detach().clone() for n, p in model.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the model's present weights into the average."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates)) if self.decay > 0 else 0.0
        self.num_updates += 1
        weights = [p.detach() for p in self.model.parameters()]
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
