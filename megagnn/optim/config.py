"""The section [optim] of a configuration."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from megagnn.overrides import STRICT, Factors, Names, Refused, Told, UserPath


@dataclass(frozen=True, config=STRICT)
class OptimConfig:
    """The optimizer, its learning-rate schedule, clipping and weight averaging."""

    rule: Told[str] = "adamw"
    """Update rule: adamw, or muon or soap for hidden matrices and AdamW for the rest."""
    implementation: Told[Literal["own", "torch", "apex"]] = "own"
    """Of AdamW: megagnn's kernel over flat buffers, PyTorch's fused one, or NVIDIA apex's."""
    learning_rate: Told[PositiveFloat] = 1e-3
    """Peak learning rate."""
    betas: Told[tuple[float, float]] = (0.9, 0.99)
    """Decay rates of AdamW's moments, and SOAP's."""
    momentum: Told[Annotated[float, Field(ge=0, lt=1)]] = 0.95
    """Decay rate of Muon's momentum."""
    refresh_every: Told[PositiveInt] = 10
    """Steps after which SOAP finds the eigenvectors of its factors again."""
    eps: Told[PositiveFloat] = 1e-8
    """AdamW's epsilon."""
    weight_decay: Told[NonNegativeFloat] = 0.0
    """Decoupled weight decay, on matrices only."""
    offload: Told[Literal["none", "host", "disk"]] = "none"
    """Where moments, master copies and gradient shards lie, and in ZeRO stage 3 parameters, too: beside the
    parameters, in the memory of the CPU, or in files."""
    offload_dir: Told[UserPath | None] = None
    """Folder of those files, one the rank's own or shared."""
    schedule: Told[Literal["cosine", "wsd", "constant"]] = "cosine"
    """After warm-up: cosine to the floor; stay, then decay linearly (warmup-stable-decay); or stay."""
    warmup_steps: Told[NonNegativeInt] = 100
    """Steps of linear warm-up."""
    decay_fraction: Told[Annotated[float, Field(gt=0, le=1)]] = 0.2
    """Share of the steps that the decay of `wsd` takes, at the end."""
    final_ratio: Told[Annotated[float, Field(ge=0, le=1)]] = 0.01
    """Learning rate at the end, as a share of the peak."""
    clip_norm: Told[PositiveFloat | None] = 10.0
    """Global gradient norm is clipped to this; no clipping if not given ("none" on the command line)."""
    spike_factor: Told[Annotated[float, Field(gt=1)] | None] = None
    """A gradient norm above so many times the median of the last 100 is bad; no limit if not given."""
    rates: Told[Factors] = Field(default_factory=dict)
    """{layers = 0.1}: share of the learning rate that a part of the model has; the longest name counts."""
    freeze: Told[Names] = ()
    """Parts of the model that stay as they are, such as "element_embedding" or "layers.0"."""
    accumulate_steps: Refused[PositiveInt] = 1
    """Batches of each rank whose gradients make one optimizer step."""
    ema_decay: Told[Annotated[float, Field(ge=0, lt=1)]] = 0.99
    """Decay of the exponential moving average of the weights, which validation and use see; 0 turns it off.
    """
