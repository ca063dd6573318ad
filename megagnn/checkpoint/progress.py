"""Where a run stands, and the name of the format that keeps it."""

from dataclasses import dataclass, field

FORMAT, VERSION = "megagnn-checkpoint", 2


@dataclass(frozen=True)
class Progress:
    """Where a run stands: with the tensors, all that makes a resumed run the same bits."""

    step: int = 0
    """Optimizer steps done."""
    epoch: int = 0
    """Epoch the next step belongs to."""
    step_in_epoch: int = 0
    """Steps of that epoch's plan done."""
    first_structure: int = 0
    """Structures of that epoch that its plan leaves out: done before the number of ranks changed."""
    best_loss: float = float("inf")
    """Lowest validation loss so far; infinite where none was taken, or where the loss has changed since."""
    best_step: int | None = None
    """When that was."""
    average_updates: int = 0
    """Updates of the moving average so far."""
    optimizer_steps: int = 0
    """Steps that the optimizer counts."""
    dp_size: int = 1
    """Data-parallel ranks of the run: with another number, batches are others."""
    recent_norms: list[float] = field(default_factory=list)
    """Gradient norms of the last good steps, for their median; kept where optim.spike_factor is set."""
    bad_in_a_row: int = 0
    """Bad steps since the last good one."""
    skipped_steps: int = 0
    """Bad steps in all."""
    validation_due: bool = False
    """Whether a signal left no time for the validation of this step: a resumed run begins with it."""
    validated_on: str = ""
    """Fingerprint of the validation split: losses on another cannot be compared."""
    stages: list[int] = field(default_factory=list)
    """Layers of each pipeline stage, where there are any."""
