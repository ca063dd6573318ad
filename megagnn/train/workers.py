"""Processes that read structures and find neighbours: how they begin, how many there are, and their death.

They are spawned, not forked: a rank has threads by then, of OpenMP, of gloo and of its own watch, and perhaps
an MPI library or a GPU, whose locks and registered memory a forked child would inherit in any state. To begin
takes a second or two of imports (docs/loading.md), once a run: they live until it ends.
"""

import math
import os
import signal
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

from megagnn.train.signals import WISHES

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
TRIAL_SECONDS = 20.0
"""As long "auto" measures before it decides: to begin must pay, and short runs need none."""
# Below this share of a step the making of its batch is not worth a process.
_LEAST_SHARE = 0.02
_SLACK = 1.25


class ReaderLostError(OSError):
    """A process that reads data died."""


@contextmanager
def beginning() -> Iterator[None]:
    """Processes begun in this context have one thread, and hear no signal until they have said what to do."""
    saved = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))  # read when a process loads its libraries
    before = signal.pthread_sigmask(signal.SIG_BLOCK, WISHES)
    # A spawned process would run the main module again, be it a script that begins a training.
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def deaths_explained() -> Iterator[None]:
    """A `ReaderLostError` in place of what a DataLoader says, in words of this project."""
    try:
        yield
    except RuntimeError as error:
        # an error that a process met is told as one "in DataLoader worker process 0"
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise ReaderLostError(
            f"a process that reads data (data.num_workers) died: killed, or out of memory? ({error}) The "
            "same command with --resume continues; fewer processes, or smaller batches, take less memory"
        ) from error


def of_a_step(seconds: Sequence[float], batches: int) -> float:
    """Median over the steps of what each of their batches took, in seconds.

    Of the first tenth, one at least, nothing is taken, for it is slower; a validation or a checkpoint makes
    one step long, and moves no median.
    """
    steps = [sum(seconds[k : k + batches]) for k in range(0, len(seconds) - batches + 1, batches)]
    return statistics.median(steps[max(1, len(steps) // 10) :])


def processes_needed(making: float, using: float, spare_cores: int) -> int:
    """Processes that make batches as fast as they are used, on cores that nothing else has; 0 if it is not
    worth one.

    making, using: seconds to make batches in the training process, and to train on them.
    """
    if spare_cores < 1 or making < _LEAST_SHARE * using:
        return 0
    return min(spare_cores, max(1, math.ceil(_SLACK * making / max(using, 1e-9))))
