"""The section [parallel]: how the ranks of a run divide the work."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from megagnn.overrides import STRICT, Change, Told


@dataclass(frozen=True, config=STRICT)
class ParallelConfig:
    """How the ranks divide the work: data x pipeline x tensor makes the number of ranks."""

    data: Told[PositiveInt | None] = None
    """Ranks that hold the same parameters and take different structures; what the others leave if not given.
    """
    pipeline: Told[PositiveInt] = 1
    """Ranks that hold different layers; a step's `optim.accumulate_steps` batches go through them."""
    schedule: Told[str] = "auto"
    """In which order pipeline ranks do what: a name of docs/pipeline.md, for the model's kind of forces.
    `auto` is `conservative` for conservative forces, and else `1f1b`."""
    stage_costs: Told[Literal["modelled", "measured"]] = "modelled"
    """Layers are cut into stages of even cost: multiply-adds counted, or times on the first step's batch."""
    stages: Told[tuple[PositiveInt, ...] | None] = None
    """Layers of each stage, in their order, instead of such a cut."""
    timeline_step: Annotated[PositiveInt, Change.UNTOLD] = 10
    """After so many steps of a pipeline the timeline of one is kept, planned and measured: in TensorBoard and
    for chrome://tracing in out_dir/timeline.json."""
    tensor: Told[PositiveInt] = 1
    """Ranks that hold one set of parameters between them and work on the same batch."""
    plan: Told[Literal["auto", "channel", "edge"]] = "auto"
    """How the edge products are divided over the tensor-parallel ranks."""
    zero_stage: Told[Annotated[int, Field(ge=0, le=3)]] = 0
    """What data-parallel ranks divide: nothing, optimizer state (1), gradients, too (2), parameters, too (3).
    """
    bucket_megabytes: Told[PositiveFloat] = 25.0
    """Data-parallel gradients are summed in messages of about this size, during the backward."""
