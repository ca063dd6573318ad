"""Floating-point operations of training, counted from the configuration and the graphs.

Matrix products only, multiply-adds counted as 2; gathers, sums, activations are of lower order in the width.
What is counted is the model's work, not the machine's: blocks or layers that are made again to save memory,
and padding, do not count, so that a run's compute does not depend on how its memory was saved.
"""

from megagnn.models.egnn.config import ModelConfig

# Products of a training step in units of one forward: forward, backward with respect to inputs and weights;
# for conservative forces by one backward, see docs/forces.md.
UNITS = {"none": 3, "direct": 3, "conservative": 8}


def step_flops(config: ModelConfig, num_atoms: float, num_edges: float) -> float:
    """Operations of forward and backward over graphs of so many atoms and directed edges in all."""
    return 2.0 * UNITS[config.forces] * (_per_edge(config) * num_edges + _per_atom(config) * num_atoms)


def _per_edge(config: ModelConfig) -> float:
    """Multiply-adds of a forward pass for each edge: the radial block of phi_e, its second product, phi_x."""
    width = config.width
    hidden, message = config.message_hidden or width, config.message_width or width
    branch = config.coordinate_hidden or width
    num_features = config.num_radial if config.distance_feature in ("bessel", "gaussian") else 1
    layers = config.num_layers
    vectors = (layers - 1) * config.update_coordinates + (config.forces == "direct")
    return float(layers * (num_features * hidden + hidden * message) + vectors * (message * branch + branch))


def _per_atom(config: ModelConfig) -> float:
    """The same for each atom: both atom blocks of phi_e, phi_h, and the energy head."""
    width = config.width
    hidden, message = config.message_hidden or width, config.message_width or width
    node = config.node_hidden or width
    layer = 2 * width * hidden + (width + message) * node + node * width
    return float(config.num_layers * layer + width * width + width)
