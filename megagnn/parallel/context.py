"""Which rank this is: a value passed as an argument, never a module global."""

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class ParallelContext:
    """Coordinates of one rank. Only data parallelism (`dp`) exists so far.

    Every structure of a batch lives on one data-parallel rank; parameters are the same on all.
    """

    dp_size: int = 1
    dp_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dp_group: Any = None
    """Process group of the data-parallel ranks; None for one process."""

    @property
    def is_main(self) -> bool:
        """Whether this rank prints, logs and writes."""
        return self.dp_rank == 0

    def __str__(self) -> str:
        return f"dp{self.dp_rank}"
