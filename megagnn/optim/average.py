"""The moving average of weights of which a rank keeps a share."""

import contextlib
from collections.abc import Iterator

import torch

from megagnn.optim.pieces import Piece
from megagnn.optim.zero.optimizer import ShardedOptimizer


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
        """Take the model's present weights into the average."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates)) if self.decay > 0 else 0.0
        self.num_updates += 1
        for unit, shard in zip(self.optimizer.units, self.shards, strict=True):
            shard.lerp_(unit.weight_shard.to(shard.device), 1.0 - decay)
            self.optimizer.storage.release([shard])

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the model holds the average; afterwards its own weights again, bit for bit."""
        with self.optimizer.swapped(self.shards):
            yield

    def pieces(self) -> list[Piece]:
        """What this rank keeps of it."""
        units = zip(self.optimizer.units, self.shards, strict=True)
        return [piece for unit, shard in units for piece in unit.pieces("average", shard)]
