"""Bytes that a parameter takes with its gradient and the optimizer's state."""

from megagnn.models.precision import Precision


def bytes_per_parameter(precision: Precision, zero_stage: int, dp_size: int) -> float:
    """Weight, gradient, two moments, master weight on each of `dp_size` ranks: the table of `Precision`."""
    master = 0 if precision.master is None else precision.master.itemsize
    state = 2 * precision.gradients.itemsize + master
    parts = (state, precision.gradients.itemsize, precision.parameters.itemsize)  # in the order of the stages
    divided = sum(parts[:zero_stage])
    return sum(parts) - divided + divided / dp_size
