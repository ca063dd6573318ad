"""Floating-point operations of training, counted from the configuration and the graphs.

Matrix products only, multiply-adds counted as 2; gathers, sums, activations are of lower order in the width.
What is counted is the model's work, not the machine's: blocks or layers that are recomputed to save memory,
and padding, do not count, so that a run's compute does not depend on how its memory was saved.
"""

from megagnn.models.config import ModelConfig
from megagnn.models.family import layer_works

# Products of a training step in units of one forward: forward, backward with respect to inputs and weights;
# for conservative forces by one backward, see docs/forces.md.
UNITS = {"none": 3, "direct": 3, "conservative": 8}


def step_flops(config: ModelConfig, num_atoms: float, num_edges: float) -> float:
    """Operations of forward and backward over graphs of so many atoms and directed edges in all."""
    works = layer_works(config)
    products = sum(w.per_edge for w in works) * num_edges + sum(w.per_atom for w in works) * num_atoms
    return 2.0 * UNITS[config.forces] * products
