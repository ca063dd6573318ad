"""The section [model]: sizes, parts of the layer, outputs."""

from typing import Literal

from pydantic import PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from megagnn.overrides import STRICT

Aggregation = Literal["constant", "sum", "mean"]


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """The EGNN: size, parts of the layer, outputs. `preset` names a set of defaults for the other keys."""

    preset: Literal["default", "satorras", "study"] = "default"
    """Named set of parts: the default, Satorras et al. 2021 as published, or the scaling study's EGNN."""
    width: PositiveInt = 128
    """Channels of a node, F."""
    num_layers: PositiveInt = 4
    """Message-passing layers, L."""
    cutoff: PositiveFloat = 5.0
    """Neighbours are the atoms within this distance, Å."""
    forces: Literal["conservative", "direct", "none"] = "conservative"
    """-dE/dx, an equivariant head of its own, or energies only."""
    stress: bool = False
    """Predict the stress from the strain derivative of the energy (needs conservative forces)."""
    distance_feature: Literal["bessel", "gaussian", "distance", "squared"] = "bessel"
    """What the message network sees of the distance: a radial basis, the distance itself, or its square."""
    num_radial: PositiveInt = 16
    """Radial basis functions, R (used by `bessel` and `gaussian`)."""
    envelope: bool = True
    """Multiply every edge branch's output by a smooth cutoff function of the input distance."""
    update_coordinates: bool = True
    """Move the atoms' latent coordinates in every layer but the last (eq. 4 of Satorras et al.)."""
    direction: Literal["unit", "vector", "plus_one"] = "unit"
    """Vector of the coordinate branch: r/d, r, or r/(d+1)."""
    direction_sign: Literal[1, -1] = 1
    """+1 for r_ij = x_j - x_i (towards the neighbour), -1 for x_i - x_j as published."""
    message_aggregation: Aggregation = "constant"
    """Divisor of the sum of messages: the training set's mean number of neighbours, 1, or the degree."""
    coordinate_aggregation: Aggregation = "constant"
    """The same for the coordinate update."""
    activation: Literal["silu", "relu"] = "silu"
    """Non-linearity of every network."""
    normalisation: Literal["rms", "none"] = "rms"
    """Normalisation of the node features before each layer and before the heads."""
    residual: bool = True
    """Add each layer's node update to its input (else it replaces it)."""
    depth_scaling: bool = True
    """Multiply each layer's node update by 1/sqrt(L) and its coordinate update by 1/L."""
    initialisation: Literal["lecun", "torch"] = "lecun"
    """Initial Linear weights: normal with variance 1/inputs and no bias, or PyTorch's default."""
    parametrisation: Literal["standard", "mup"] = "standard"
    """One learning rate for all parameters, or rates and initial outputs that follow width and depth, so that
    the best learning rate stays where it is (maximal update)."""
    base_width: PositiveInt = 64
    """Width at which `mup` is the standard parametrisation."""
    base_layers: PositiveInt = 4
    """Number of layers at which it is."""
    message_hidden: PositiveInt | None = None
    """Hidden width of phi_e; `width` if not given."""
    message_width: PositiveInt | None = None
    """Width of a message m_ij; `width` if not given."""
    coordinate_hidden: PositiveInt | None = None
    """Hidden width of phi_x; `width` if not given."""
    node_hidden: PositiveInt | None = None
    """Hidden width of phi_h; `width` if not given."""
    coordinate_bias: bool = False
    """Bias in the last Linear of phi_x."""
    coordinate_tanh: bool = False
    """Bound phi_x by a tanh, where it moves coordinates."""
    self_edges: bool = False
    """Let every atom send a message to itself."""
    level_embedding: bool = True
    """Embed the level of theory of a structure into its atoms (with one level it is left out)."""
    aggregation_backend: Literal["own", "torch_scatter", "torch_sparse", "torch"] = "own"
    """What gathers atoms to edges and sums edges over atoms; a library other than ours runs unfused."""
    edge_operation: Literal["fused", "unfused"] = "fused"
    """Edges in blocks that stay in the cache, or every intermediate as a tensor (the reference)."""
    edge_memory: Literal["save", "recompute"] = "save"
    """Fused: keep two numbers per edge and channel for the backward, or make the blocks again."""
    edge_block: PositiveInt | None = None
    """Edges of a block; what fits the cache if not given."""
    recompute_layers: bool = False
    """Keep the inputs of each layer only, and run it again in the backward."""

    def __post_init__(self) -> None:
        if self.stress and self.forces != "conservative":
            raise ValueError(
                f"model.stress needs model.forces = 'conservative', got '{self.forces}'; set one of the two "
                "to match"
            )
