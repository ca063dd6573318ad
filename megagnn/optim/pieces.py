"""What a rank keeps of each parameter: how checkpoints see any optimizer, sharded or not."""

from dataclasses import dataclass

from torch import Tensor

from megagnn.parallel.parameter import ParameterLayout, layout_of


@dataclass(frozen=True)
class Piece:
    """A run of values of one parameter, or of something that has one number beside each of its numbers.

    The runs of all data-parallel ranks together make this rank's tensor-parallel slice of the parameter,
    row by row, each number once; or, where `replicated`, every data-parallel rank keeps the whole slice.
    """

    name: str
    """The parameter's name in the model."""
    kind: str
    """"model" (the weight, in the widest type in which it is kept), "average" (its moving average), or the
    name of a state of the update rule, such as "exp_avg"."""
    layout: ParameterLayout
    """Shape of the whole parameter, and which slice of it this rank's tensor-parallel coordinate holds."""
    begin: int
    """First element of the run, counted in the slice laid out row by row."""
    end: int
    """One past its last element."""
    values: Tensor
    """The run itself, (end - begin,), not a copy: whoever loads writes into it."""
    replicated: bool
    """Whether every data-parallel rank keeps this piece, and one of them is enough."""
    of_one_rank: bool = False
    """Whether a single tensor-parallel rank keeps it, though it is no slice."""


def whole_slice(name: str, kind: str, parameter: Tensor, values: Tensor) -> Piece:
    """A parameter's slice, or a tensor of its shape, that all data-parallel ranks keep whole."""
    run = values.detach().view(-1)
    return Piece(name, kind, layout_of(parameter), 0, run.numel(), run, replicated=True)
