"""Layers that are computed again in the backward, and what the edge operation does in each pass.

A layer under `recomputed` keeps its inputs alone; the backward runs it again and then goes through it. With
`spec.memory = "save"` the edge operation keeps nothing the first time and its pre-activations the second.
With "recompute" its backward makes its blocks again anyway: the first pass then leaves the operation's
outputs, a few numbers per atom, and the second takes them instead of running the edges once more. So both
together cost no more products than either.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint


class Tape:
    """Outputs of one layer's edge operations, from the first pass to the second."""

    def __init__(self) -> None:
        self._outputs: deque[Sequence[Tensor | None]] = deque()
        self.replaying = False

    def put(self, outputs: Sequence[Tensor | None]) -> None:
        """Keep the outputs of an operation."""
        self._outputs.append(outputs)

    def take(self) -> Sequence[Tensor | None]:
        """Those of the next one, in the order in which they were kept."""
        return self._outputs.popleft()


_tape: ContextVar[Tape | None] = ContextVar("megagnn_tape", default=None)


def current_tape() -> Tape | None:
    """The tape of the layer that is running, if it will be, or is being, computed again."""
    return _tape.get()


@contextlib.contextmanager
def _use(tape: Tape, replaying: bool) -> Iterator[None]:
    tape.replaying = replaying
    token = _tape.set(tape)
    try:
        yield
    finally:
        _tape.reset(token)


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, whose intermediates are made again in the backward.

    The function must give the same numbers again; it may hold collectives, which run again, too.
    """

    def contexts() -> tuple[Any, Any]:
        tape = Tape()
        return _use(tape, False), _use(tape, True)

    return checkpoint(
        function,
        *arguments,
        use_reentrant=False,
        preserve_rng_state=False,  # nothing here is random
        determinism_check="none",  # the edge operation keeps less the first time than the second
        context_fn=contexts,
    )
