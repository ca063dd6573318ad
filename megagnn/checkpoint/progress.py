"""Position of a run, the name of the format that keeps it, and the states of random generators."""

import random
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

FORMAT, VERSION = "megagnn-checkpoint", 2


@dataclass(frozen=True)
class Progress:
    """Position of a run: with the tensors, all that gives a resumed run the same bits."""

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


def random_state(device: torch.device) -> dict[str, Tensor]:
    """{generator: state} of PyTorch on the CPU and on `device`, of NumPy and of Python."""
    _, words, at, has_gauss, gauss = np.random.get_state(legacy=True)
    _, numbers, left = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray([*words, at, has_gauss], dtype=np.int64)),
        "numpy_gauss": torch.tensor(gauss, dtype=torch.float64),
        "python": torch.tensor(numbers, dtype=torch.int64),
        "python_gauss": torch.tensor(float("nan") if left is None else left, dtype=torch.float64),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: dict[str, Tensor], device: torch.device) -> None:
    """Generators continue as those of `random_state` would have."""
    torch.set_rng_state(states["torch"])
    *words, at, has_gauss = states["numpy"].tolist()
    gauss = float(states["numpy_gauss"])
    np.random.set_state(("MT19937", np.asarray(words, dtype=np.uint32), at, has_gauss, gauss))
    left = float(states["python_gauss"])
    random.setstate((3, tuple(states["python"].tolist()), None if left != left else left))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
