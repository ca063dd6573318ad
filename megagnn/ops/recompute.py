"""Layers that are recomputed in the backward, and what the edge operation does in each pass.

A layer under `recomputed` keeps its inputs alone; the backward recomputes it and then goes through it. With
`spec.memory = "save"` the edge operation keeps nothing the first time and its pre-activations the second.
With "recompute" its backward recomputes its blocks anyway: the first pass then leaves the operation's
outputs, a few numbers per atom, and the second takes them instead of running the edges once more. So both
together cost no more products than either.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar, Token
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class Tape:
    """Outputs of one layer's edge operations, from the first pass to the second."""

    def __init__(self) -> None:
        self._outputs: list[Sequence[Tensor | None]] = []
        self._next = 0
        self.replaying = False

    def put(self, outputs: Sequence[Tensor | None]) -> None:
        self._outputs.append(outputs)

    def rewind(self, replaying: bool) -> None:
        """Begin a pass. There may be several second ones: `create_graph` goes through a layer twice."""
        self._next, self.replaying = 0, replaying

    def take(self) -> Sequence[Tensor | None]:
        """Those of the next one, in the order in which they were kept."""
        self._next += 1
        # Detached: autograd will hang the second pass's graph on them, which must not outlive it here.
        return [None if t is None else t.detach() for t in self._outputs[self._next - 1]]


_tape: ContextVar[Tape | None] = ContextVar("megagnn_tape", default=None)


def current_tape() -> Tape | None:
    """The tape of the layer that is running, if it will be, or is being, recomputed."""
    return _tape.get()


class _Use:
    """The context in which a pass runs, which can be entered again."""

    def __init__(self, tape: Tape, replaying: bool) -> None:
        self.tape, self.replaying = tape, replaying
        self._tokens: list[Token[Tape | None]] = []

    def __enter__(self) -> None:
        self.tape.rewind(self.replaying)
        self._tokens.append(_tape.set(self.tape))

    def __exit__(self, *exception: object) -> None:
        _tape.reset(self._tokens.pop())


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, whose intermediates are recomputed in the backward.

    The function must give the same numbers again; it may hold collectives, which run again, too.
    """

    def contexts() -> tuple[Any, Any]:
        tape = Tape()
        return _Use(tape, False), _Use(tape, True)

    return checkpoint(
        function,
        *arguments,
        use_reentrant=False,
        preserve_rng_state=False,  # nothing here is random
        determinism_check="none",  # the edge operation keeps less the first time than the second
        context_fn=contexts,
    )


def used_gradients(ctx: Any, tensors: Sequence[Tensor | None]) -> list[bool]:
    """Whether this backward uses a gradient of each tensor that a Function was applied to, in their order.

    needs_input_grad knows only what requires gradients: a force pass over a model in training, which asks for
    positions alone, would pay for those of the weights, as the input half of a split backward would.
    """
    nodes = iter(ctx.next_functions)  # one per tensor; an absent one has none
    return [t is not None and _is_used(next(nodes)[0]) for t in tensors]


def by_autograd(
    function: Callable[..., Sequence[Tensor]],
    tensors: Sequence[Tensor | None],
    used: Sequence[bool],
    bars: Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients that can be differentiated again, by PyTorch's operations.

    Args:
        function: what a Function computes, of the tensors.
        tensors: what it was applied to.
        used: which of their gradients are wanted; None takes the place of the others.
        bars: cotangents of its results.
    """
    aliases = [t.view_as(t) if t is not None and u else t for t, u in zip(tensors, used, strict=True)]
    wanted = [t for t, u in zip(aliases, used, strict=True) if t is not None and u]
    if not wanted:
        return [None] * len(used)
    pairs = [(y, bar) for y, bar in zip(function(*aliases), bars, strict=True) if y.requires_grad]
    outputs, given = [y for y, _ in pairs], [bar for _, bar in pairs]
    found = iter(torch.autograd.grad(outputs, wanted, given, create_graph=True))
    return [next(found) if u else None for u in used]


def _is_used(node: Any) -> bool:
    if node is None:
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf that autograd.grad was asked for: the engine hands its gradient out itself
        return True
