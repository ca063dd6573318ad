"""Processor time of training, and how many epochs fit into a budget; for environments without megagnn."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, ClassVar


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


class EpochClock:
    """The same for Lightning, whose hooks it has: seconds of each training epoch without its validation."""

    seconds: ClassVar[list[float]] = []
    """Of the one training of this process."""

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
