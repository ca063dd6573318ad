"""The state of every random generator of a process, as tensors."""

import random

import numpy as np
import torch
from torch import Tensor


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
