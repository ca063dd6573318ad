"""Gradients summed over the data-parallel ranks, in buckets, while the backward still computes others.

[Note: buckets] A bucket is what travels in one message: parameters of one type and device, cut in the reverse
order of the model, which is about the backward's. It leaves when the last of its gradients is there and all
buckets before it have left: every rank sends in one order, whatever order its gradients arrive in. Where the
buckets lie depends on shapes, types and the optimizer alone, so it is the same on every rank.

Only the last backward of a step may send. What has been added up by then leaves with it:

    reducer.start()      # gradients of the backward that follows are final
    loss.backward()
    reducer.finish()     # all gradients are sums over the ranks

A backward before `start` adds to the gradients and sends nothing, and without `start` everything leaves in
`finish`. torch.autograd.grad, which leaves `.grad` alone, counts in neither way.

[Note: bits] Sums are the same bits on every rank and whenever they are repeated. On two ranks no bit depends
on the buckets. On more, gloo adds an element's terms in an order that depends on its place in the message,
and another cut rounds differently.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from megagnn.optim.flat import ALIGN_BYTES
from megagnn.parallel import messages
from megagnn.parallel.context import ParallelContext

BUCKET_BYTES = 25 * 2**20


class Extent(NamedTuple):
    """Elements of a buffer that belong to a parameter's gradient."""

    parameter: nn.Parameter
    begin: int
    end: int


@dataclass
class Bucket:
    """Gradients that travel in one message; [Note: buckets]."""

    extents: list[Extent]
    flat: Tensor | None
    """The optimizer's flat gradient, whose slice is the message; None where the message is packed."""
    waiting: set[nn.Parameter] = field(default_factory=set)
    """Parameters whose gradient has not arrived since `start`."""
    pending: messages.Pending | None = None
    """The message under way, from `launch` to `collect`."""

    def __post_init__(self) -> None:
        self.begin, self.end = min(e.begin for e in self.extents), max(e.end for e in self.extents)
        self.homes = [] if self.flat is None else [e.parameter.grad for e in self.extents]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Its parameters, the one whose gradient is expected first in front."""
        return [e.parameter for e in self.extents]

    @property
    def num_bytes(self) -> int:
        """Size of the message, padding included."""
        return (self.end - self.begin) * self.extents[0].parameter.element_size()

    def views(self, message: Tensor) -> list[Tensor]:
        return [
            message[e.begin - self.begin : e.end - self.begin].view(e.parameter.shape) for e in self.extents
        ]

    @torch.no_grad()
    def launch(self, context: ParallelContext) -> None:
        """Starts the sum over the data-parallel ranks; every gradient is there."""
        message = self._packed() if self.flat is None else self._in_place(self.flat)
        self.pending = messages.start_all_reduce(message, context, "dp")

    def _in_place(self, flat: Tensor) -> Tensor:
        """The slice of the flat gradient; gradients that were put elsewhere move home first."""
        for parameter, home in zip(self.parameters, self.homes, strict=True):
            if parameter.grad is not home:
                assert parameter.grad is not None
                assert home is not None
                home.copy_(parameter.grad)
                parameter.grad = home
        return flat[self.begin : self.end]

    def _packed(self) -> Tensor:
        message = self.extents[0].parameter.new_zeros(self.end - self.begin)
        torch._foreach_copy_(self.views(message), _gradients(self.parameters))
        return message

    @torch.no_grad()
    def collect(self) -> None:
        """Waits for the sum; afterwards the parameters' gradients hold it."""
        assert self.pending is not None
        message = self.pending.wait()
        if self.flat is None:
            torch._foreach_copy_(_gradients(self.parameters), self.views(message))
        self.pending = None


class GradientReducer:
    """Sums the gradients of a model over the data-parallel ranks; see [Note: buckets] for its use.

    The loss is a sum over global counts (`objective.loss`), so the sum of gradients and not their mean is the
    global gradient. A missing gradient counts as zero. On one data-parallel rank there are no hooks, and
    `finish` fills in missing gradients alone.

    parameters: in the order of the model; those that need no gradient take no part.
    bucket_bytes: a bucket holds no more, unless one parameter does.
    flat_buffers: gradients of FlatAdamW, which must hold the parameters' `.grad` by now: their slices are
        reduced where they lie, padding included. All other gradients are packed and copied back.

    Raises ValueError for bucket_bytes below 1.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        context: ParallelContext,
        bucket_bytes: int = BUCKET_BYTES,
        flat_buffers: Sequence[Tensor] = (),
    ) -> None:
        self.context = context
        self.parameters = [p for p in dict.fromkeys(parameters) if p.requires_grad]
        sent = self.parameters if context.dp_size > 1 else []
        self.buckets = cut_buckets(sent, bucket_bytes, flat_buffers)
        self._started, self._next = False, 0  # index of the bucket to leave next
        self._nodes: list[Any] = []  # kept alive, for autograd forgets them and their hooks otherwise
        for bucket in self.buckets:
            for parameter in bucket.parameters:
                self._watch(parameter, bucket)

    def _watch(self, parameter: nn.Parameter, bucket: Bucket) -> None:
        node: Any = get_gradient_edge(parameter).node
        node.register_prehook(self._before_arrival(parameter, bucket))
        parameter.register_post_accumulate_grad_hook(lambda p: self._arrived(p, bucket))
        self._nodes.append(node)

    def start(self) -> None:
        """The backward that follows is the last of the step: its gradients leave as they become ready.

        Raises RuntimeError where the `finish` of an earlier start is missing.
        """
        if self._started:
            raise RuntimeError("GradientReducer: start() after start(); call finish() between them")
        self._started = True
        for bucket in self.buckets:
            bucket.waiting = set(bucket.parameters)

    def finish(self) -> None:
        """Sends what has not left yet and waits: the gradients are sums over the data-parallel ranks."""
        self._started = False
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in self.buckets[self._next :]:
            bucket.launch(self.context)
        self._next = 0
        for bucket in self.buckets:
            bucket.collect()

    def _before_arrival(self, parameter: nn.Parameter, bucket: Bucket) -> Callable[[Any], None]:
        """Runs before a backward adds to `.grad`, so that no message under way is written over."""

        def check(_: Any) -> None:
            if self._started and parameter not in bucket.waiting:
                raise RuntimeError(
                    f"GradientReducer: the gradient of a parameter of shape {tuple(parameter.shape)} arrived "
                    "twice since start(), and the first may be under way; only one backward, the last of a "
                    "step, may run between start() and finish()"
                )

        return check

    def _arrived(self, parameter: nn.Parameter, bucket: Bucket) -> None:
        if not self._started:
            return
        bucket.waiting.discard(parameter)
        while self._next < len(self.buckets) and not self.buckets[self._next].waiting:
            self.buckets[self._next].launch(self.context)
            self._next += 1


def cut_buckets(
    parameters: Sequence[nn.Parameter], bucket_bytes: int, flat_buffers: Sequence[Tensor] = ()
) -> list[Bucket]:
    """The buckets of parameters in the order of the model, in the order in which they leave.

    Each flat buffer is cut from its end. The order of buckets is that in which they are complete if gradients
    arrive in the reverse order of the model: a bucket comes the later, the earlier its first parameter.
    """
    if bucket_bytes < 1:
        raise ValueError(f"GradientReducer: bucket_bytes must be at least 1, got {bucket_bytes}")
    place = {parameter: index for index, parameter in enumerate(parameters)}
    families: dict[Any, list[Extent]] = {}
    for parameter in reversed(parameters):
        number = _number_of_flat_buffer(parameter, flat_buffers)
        family = families.setdefault((number, parameter.dtype, parameter.device), [])
        if number is None or parameter.grad is None:
            begin = family[-1].end if family else 0
        else:
            begin = int(parameter.grad.storage_offset()) - int(flat_buffers[number].storage_offset())
        family.append(Extent(parameter, begin, begin + parameter.numel()))
    buckets = []
    for (number, _, _), family in families.items():
        if number is not None:
            family.sort(key=lambda extent: -extent.begin)
        flat = None if number is None else flat_buffers[number]
        buckets += [Bucket(extents, flat) for extents in _cut(family, bucket_bytes)]
    return sorted(buckets, key=lambda bucket: -min(place[p] for p in bucket.parameters))


def _cut(family: list[Extent], bucket_bytes: int) -> list[list[Extent]]:
    """Runs of neighbours with nothing but padding between them, of at most bucket_bytes or one parameter."""
    runs: list[list[Extent]] = []
    for extent in family:
        run, size = runs[-1] if runs else [], extent.parameter.element_size()
        if run:
            gap = max(run[-1].begin, extent.begin) - min(run[-1].end, extent.end)
            span = max(run[0].end, extent.end) - min(run[0].begin, extent.begin)
        if run and gap * size < ALIGN_BYTES and span * size <= bucket_bytes:
            run.append(extent)
        else:
            runs.append([extent])
    return runs


def _number_of_flat_buffer(parameter: nn.Parameter, flat_buffers: Sequence[Tensor]) -> int | None:
    if parameter.grad is None or parameter.numel() == 0 or not parameter.grad.is_contiguous():
        return None
    pointer = parameter.grad.untyped_storage().data_ptr()
    pointers = [buffer.untyped_storage().data_ptr() for buffer in flat_buffers]
    return pointers.index(pointer) if pointer in pointers else None


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]
