"""Named model configurations: the parts of the EGNN layer, chosen by data.

`default` is ModelConfig's own defaults (docs/model.md). `satorras` follows the published EGNN (Satorras,
Hoogeboom, Welling, "E(n) Equivariant Graph Neural Networks", ICML 2021, eqs. 3-6, and its code): squared
distance, x_i - x_j, sum of messages, mean of coordinate updates, residual, no normalisation, no envelope.
`study` follows the EGNN of "Scaling Laws of Graph Neural Networks for Atomistic Materials Modeling": plain
distance, r/(d+1), ReLU, mean coordinate update bounded by tanh, no residual. Neither of the two is smooth at
the cutoff, so neither is for molecular dynamics.
"""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "satorras": {
        "distance_feature": "squared",
        "envelope": False,
        "direction": "vector",
        "direction_sign": -1,
        "message_aggregation": "sum",
        "coordinate_aggregation": "mean",
        "activation": "silu",
        "normalisation": "none",
        "residual": True,
        "update_coordinates": True,
        "depth_scaling": False,
        "initialisation": "torch",
    },
    "study": {
        "distance_feature": "distance",
        "envelope": False,
        "direction": "plus_one",
        "direction_sign": -1,
        "message_aggregation": "sum",
        "coordinate_aggregation": "mean",
        "coordinate_tanh": True,
        "activation": "relu",
        "normalisation": "none",
        "residual": False,
        "update_coordinates": True,
        "depth_scaling": False,
        "initialisation": "torch",
    },
}
