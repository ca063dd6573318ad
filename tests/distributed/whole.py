"""Whole parameters, of what the tensor-parallel ranks hold."""

from torch import Tensor

from megagnn.parallel import collectives
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.parameter import ParameterLayout


def gather_whole(tensor: Tensor, layout: ParameterLayout, context: ParallelContext) -> Tensor:
    """The whole of a parameter, or of anything of its shape, from the slices of all ranks, on every rank."""
    if not layout.is_sharded:
        return tensor.detach()
    assert layout.dim is not None
    dim = layout.dim - len(layout.full_shape)
    return collectives.start_gather_along(tensor.detach(), dim, context, "tp").wait()
