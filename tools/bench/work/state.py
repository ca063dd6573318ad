"""What a rank keeps between two steps, by the arithmetic: parameters, gradients, state and master copies.

Bytes of a weight: the parameter itself, 4 of its gradient, in bfloat16 4 of a master copy, and the state:

    AdamW                       8    two moments
    Muon, hidden matrices       4    the momentum
    SOAP, hidden matrices       8 + 8 (m/n + n/m)    two moments, two factors and two bases: 24 where m = n

and AdamW's for what is no hidden matrix. ZeRO's stages divide state and masters by the data-parallel ranks,
then gradients, then parameters; tensor-parallel ranks divide everything. Matrices are dealt out whole, so
that the shares of ranks differ by one matrix at most.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from megagnn.parallel.parameter import layout_of

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Weights:
    """Shapes of the parameters of a whole model."""

    matrices: tuple[Shape, ...]
    """Of hidden matrices, (m, n)."""
    num_others: int
    """Numbers in all the others."""

    @classmethod
    def of(cls, model: nn.Module) -> Weights:
        """A model's, also one that holds slices."""
        named = [(layout_of(p), getattr(p, "matrix_rate", None) is not None) for p in model.parameters()]
        matrices = tuple(layout.full_shape for layout, is_matrix in named if is_matrix)
        return cls(matrices, sum(layout.full_numel for layout, is_matrix in named if not is_matrix))

    @property
    def numel(self) -> int:
        return self.num_others + sum(map(math.prod, self.matrices))


def state_bytes(rule: str, shape: Shape) -> float:
    """State of a hidden matrix."""
    m, n = shape
    return {"adamw": 8 * m * n, "muon": 4 * m * n, "soap": 8 * m * n + 8 * (m * m + n * n)}[rule]


def floor_bytes(weights: Weights, rule: str, stage: int, dtype: str, dp: int, tp: int = 1) -> float:
    """What one of dp x tp ranks keeps, where all keep the same."""
    state = 8 * weights.num_others + sum(state_bytes(rule, shape) for shape in weights.matrices)
    whole, divided = _weight_bytes(stage, dtype)
    # The state is the last to be whole.
    shared = state if stage == 0 else state / dp
    return (weights.numel * (whole + divided / dp) + shared) / tp


def one_matrix_bytes(weights: Weights, rule: str, stage: int, dtype: str, tp: int = 1) -> float:
    """By how much more the rank with the most keeps at most: the largest matrix, of what is divided.

    Of a matrix that tensor-parallel ranks divide, one of them keeps all of the state.
    """
    if rule == "adamw" or (stage == 0 and tp == 1):
        return 0.0
    divided = _weight_bytes(stage, dtype)[1]
    return max(state_bytes(rule, s) + divided * math.prod(s) / tp for s in weights.matrices)


def _weight_bytes(stage: int, dtype: str) -> tuple[int, int]:
    """(what is whole, what is divided) over the data-parallel ranks, of a weight, its gradient and master."""
    weight, master = {"float32": (4, 0), "bfloat16": (2, 4)}[dtype]
    parts = [master, 4, weight]  # in the order in which the stages divide them
    divided = sum(parts[:stage])
    return sum(parts) - divided, divided
