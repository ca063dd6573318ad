"""SIGTERM, SIGUSR1 and SIGINT: a wish to stop, which the trainer grants at the end of a step, or of a
batch of a validation.

The ranks agree on it there (`train.bad_steps.judge`), so that all stop at the same step, whichever of them
the signal reached. Who wants an end at once signals again.
"""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from megagnn.launch.watch import SAME_WISH_SECONDS

WISHES = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_WORKER_SECONDS = 30


class StopSignals:
    """Catches the signals from entering the context to leaving it, or in a thread not the main one, nothing.

    Args:
        speaks: whether this rank says on stderr that it heard.
    """

    def __init__(self, speaks: bool = True) -> None:
        self.received = ""
        """Name of the first signal; empty before."""
        self._speaks, self._since = speaks, 0.0
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._handle) for number in WISHES}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self.received:
            self.received, self._since = name, time.monotonic()
            if self._speaks:  # sys.stderr may be in the middle of another line, and must not be entered again
                text = f"\n{name}: stopping at the end of this step; signal again to stop at once\n"
                os.write(2, text.encode())
        elif number != signal.SIGUSR1 and time.monotonic() - self._since > SAME_WISH_SECONDS:
            signal.signal(number, self._former[signal.Signals(number)])
            os.kill(os.getpid(), number)


def outlive_the_signal(_: int = 0) -> None:
    """For a process that reads data: the batch system signals it, too, but a step still needs its batches.

    SIGTERM ends it half a minute later, should nobody have stopped it by then.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, WISHES)  # of `workers.beginning`


def _end_later(*_: Any) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_WORKER_SECONDS)
