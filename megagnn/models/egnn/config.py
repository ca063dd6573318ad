"""The section [model] of the EGNN, and its presets.

The preset `satorras` follows the published EGNN (Satorras, Hoogeboom, Welling, "E(n) Equivariant Graph Neural
Networks", ICML 2021, eqs. 3-6, and its code), and `study` that of "Scaling Laws of Graph Neural Networks for
Atomistic Materials Modeling". Neither is smooth at the cutoff, so neither is for molecular dynamics.
"""

from typing import Any, Literal

from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from megagnn.models.config import ModelConfig
from megagnn.overrides import STRICT, Free, Refused, Told

Aggregation = Literal["constant", "sum", "mean"]


@dataclass(frozen=True, config=STRICT)
class EGNNConfig(ModelConfig):
    """The E(n)-equivariant graph network (docs/model.md): parts of the layer, and how its edges are run."""

    family: Refused[Literal["egnn"]] = "egnn"
    """The model family."""

    preset: Free[Literal["default", "satorras", "study"]] = "default"
    """Named set of parts: the default, Satorras et al. 2021 as published, or the scaling study's EGNN."""
    distance_feature: Refused[Literal["bessel", "gaussian", "distance", "squared"]] = "bessel"
    """What the message network sees of the distance: a radial basis, the distance itself, or its square."""
    envelope: Refused[bool] = True
    """Multiply every edge branch's output by a smooth cutoff function of the input distance."""
    update_coordinates: Refused[bool] = True
    """Move the atoms' latent coordinates in every layer but the last (eq. 4 of Satorras et al.)."""
    direction: Refused[Literal["unit", "vector", "plus_one"]] = "unit"
    """Vector of the coordinate branch: r/d, r, or r/(d+1)."""
    direction_sign: Refused[Literal[1, -1]] = 1
    """+1 for r_ij = x_j - x_i (towards the neighbour), -1 for x_i - x_j as published."""
    message_aggregation: Refused[Aggregation] = "constant"
    """Divisor of the sum of messages: the training set's mean number of neighbours, 1, or the degree."""
    coordinate_aggregation: Refused[Aggregation] = "constant"
    """The same for the coordinate update."""
    activation: Refused[Literal["silu", "relu"]] = "silu"
    """Non-linearity of every network."""
    normalisation: Refused[Literal["rms", "none"]] = "rms"
    """Normalisation of the node features before each layer and before the heads."""
    residual: Refused[bool] = True
    """Add each layer's node update to its input (else it replaces it)."""
    message_hidden: Refused[PositiveInt | None] = None
    """Hidden width of phi_e; `width` if not given."""
    message_width: Refused[PositiveInt | None] = None
    """Width of a message m_ij; `width` if not given."""
    coordinate_hidden: Refused[PositiveInt | None] = None
    """Hidden width of phi_x; `width` if not given."""
    node_hidden: Refused[PositiveInt | None] = None
    """Hidden width of phi_h; `width` if not given."""
    coordinate_bias: Refused[bool] = False
    """Bias in the last Linear of phi_x."""
    coordinate_tanh: Refused[bool] = False
    """Bound phi_x by a tanh, where it moves coordinates."""
    self_edges: Refused[bool] = False
    """Let every atom send a message to itself."""
    aggregation_backend: Told[Literal["own", "torch_scatter", "torch_sparse", "torch"]] = "own"
    """What gathers atoms to edges and sums edges over atoms; a library other than ours runs unfused."""
    edge_operation: Told[Literal["fused", "unfused"]] = "fused"
    """Edges in blocks that stay in the cache, or every intermediate as a tensor (the reference)."""
    edge_memory: Told[Literal["save", "recompute"]] = "save"
    """Fused: keep two numbers per edge and channel for the backward, or recompute the blocks."""
    edge_block: Told[PositiveInt | None] = None
    """Edges of a block; what fits the cache if not given."""

    @property
    def has_self_edges(self) -> bool:
        return self.self_edges

    def check_dtype(self, dtype: str) -> None:
        if dtype == "bfloat16" and self.aggregation_backend == "torch_sparse":
            raise ValueError(
                "train.dtype = 'bfloat16' needs sums over neighbours in float32, got "
                "model.aggregation_backend = 'torch_sparse', which adds bfloat16 in bfloat16; use 'own'"
            )

    def technique(self) -> list[str]:
        """See `ModelConfig`: `fused edges, save`."""
        kept = [self.edge_memory] if self.edge_operation == "fused" else []
        return [f"{self.edge_operation} edges", *kept, *super().technique()]


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
