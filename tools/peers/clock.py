"""Time and memory of training, and how many epochs fit into a budget; for environments without megagnn."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, ClassVar

from torch.profiler import ProfilerActivity, profile

from tools.bench.memory.step import peak_of


class Clock:
    """Processor seconds of this process, all threads, in each call of a function that trains one epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, each of whose calls is added to `seconds`."""

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds.append(time.process_time() - start)

        return wrapper


class StepClock:
    """Seconds by the wall of each training step, loading of its batch excluded, and the memory of one."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.profiled: int | None = None
        """Number of the step whose memory is wanted; it takes longer."""
        self.peak_bytes = 0.0
        """The most that tensors held in it, above what they held before."""

    def start(self) -> None:
        """A step begins."""
        self._profiler: profile | None = None
        if len(self.seconds) == self.profiled:
            self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profiler.start()
        self._since = time.perf_counter()

    def stop(self) -> None:
        """It has ended."""
        self.seconds.append(time.perf_counter() - self._since)
        if self._profiler is not None:
            self._profiler.stop()
            self.peak_bytes = peak_of(self._profiler)

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, each of whose calls is a step."""

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self.start()
            result = function(*args, **kwargs)
            self.stop()
            return result

        return wrapper


class EpochClock:
    """Both for Lightning, whose hooks it has: seconds of each training epoch without its validation."""

    seconds: ClassVar[list[float]] = []
    """Of the one training of this process."""
    steps: ClassVar[StepClock] = StepClock()

    def on_train_batch_start(self, *_: Any) -> None:
        self.steps.start()

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps.stop()

    def on_train_epoch_start(self, *_: Any) -> None:
        self.seconds.append(0.0)
        self._since = time.process_time()

    def on_validation_start(self, trainer: Any, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.seconds[-1] += time.process_time() - self._since

    def on_validation_end(self, *_: Any) -> None:
        self._since = time.process_time()

    def on_train_epoch_end(self, *_: Any) -> None:
        self.seconds[-1] += time.process_time() - self._since


def epochs_within(budget: float, seconds: Sequence[float]) -> int:
    """How many epochs fit into a budget of seconds, by the first few epochs of a trial.

    What the first epoch takes longer than the others, as for compiling, is paid once.

    Raises:
        ValueError: fewer than two epochs were tried, or not two fit.
    """
    if len(seconds) < 2:
        raise ValueError(f"{len(seconds)} epoch(s) do not tell the time of one; try 2 or more")
    each = median(seconds[1:])
    epochs = int((budget - max(seconds[0] - each, 0.0)) / each)
    if epochs < 2:
        raise ValueError(
            f"{budget:.0f} processor seconds hold {max(epochs, 0)} epoch(s) of {each:.1f} s; give 2 or more"
        )
    return epochs
