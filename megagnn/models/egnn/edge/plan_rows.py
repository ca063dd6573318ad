"""The plan `edge`: each rank takes the destination rows that hold about E/tp edges, and all channels.

Atoms arrive and leave divided by channels, as everywhere between layers: p goes to the ranks that own its
rows (all-to-all), q to all (all-gather), the sums back (all-to-all). The weights of the edge products, of
which each rank holds a slice, are gathered just in time, are not kept, and are gathered again for the
backward, while the layer before is still at work (`WeightRing`); their gradients are reduce-scattered.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megagnn.models.egnn.edge.runner import SERIAL, Call, Tensors, typed_gradients, typed_outputs, widened
from megagnn.models.egnn.edge.types import NUM_INPUTS, EdgeWeights
from megagnn.ops.recompute import current_tape
from megagnn.parallel import messages
from megagnn.parallel.collectives import stack, start_gather_along, start_reduce_scatter_along, unstack
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.row_collectives import Rows, start_join, start_to_channels, start_to_rows

# Dimension along which each weight of EdgeWeights is divided; None for what every rank holds.
WEIGHT_DIMS: tuple[int | None, ...] = (None, -2, -1, -1, -1, -1, -1, None)
_VERSIONS = tuple[int, ...]


class WeightRing:
    """The whole weights of every layer's edge operation, gathered one layer ahead.

    Args:
        layers: of each layer, what gives its slices.
    """

    def __init__(self, context: ParallelContext, layers: Sequence[Callable[[], EdgeWeights]]) -> None:
        self.context, self.layers = context, list(layers)
        self.prepare: Callable[[int], None] = lambda index: None
        """Called before the slices of a layer are read, which may be ahead of its turn."""
        self._coming: dict[int, tuple[_VERSIONS, messages.Pending]] = {}
        self._held: dict[int, tuple[_VERSIONS, Tensor]] = {}

    def start(self, index: int) -> None:
        """Begin to gather a layer's weights, if there is such a layer."""
        if 0 <= index < len(self.layers) and index not in self._coming and index not in self._held:
            slices = self._slices(index)
            flat = torch.cat([t.reshape(-1) for t in slices])
            self._coming[index] = (_versions(slices), messages.start_all_gather(flat, self.context, "tp"))

    def take(self, index: int, hold: bool = False) -> EdgeWeights:
        """A layer's whole weights; with `hold` the next call for them needs no message."""
        slices = self._slices(index)
        versions, found = self._held.pop(index, ((), None))
        if found is None:
            self.start(index)
            versions, pending = self._coming.pop(index)
            found = pending.wait()
        if versions != _versions(slices):  # gathered before an optimizer step
            return self.take(index, hold)
        if hold:
            self._held[index] = (versions, found)
        return self._whole(index, found)

    def _slices(self, index: int) -> list[Tensor]:
        self.prepare(index)
        weights = self.layers[index]()
        return [
            t.detach()
            for t, dim in zip(weights, WEIGHT_DIMS, strict=True)
            if t is not None and dim is not None
        ]

    def _whole(self, index: int, parts: Tensor) -> EdgeWeights:
        """From (tp, all slices one after another)."""
        weights, begin, whole = self.layers[index](), 0, []
        for tensor, dim in zip(weights, WEIGHT_DIMS, strict=True):
            if tensor is None or dim is None:
                whole.append(None if tensor is None else tensor.detach())
                continue
            part = parts[:, begin : begin + tensor.numel()].view(-1, *tensor.shape)
            whole.append(unstack(part, dim))
            begin += tensor.numel()
        return EdgeWeights(*whole)  # type: ignore[arg-type]


_NUM_KEPT = 2  # of the edges, c and g; after them p and q, which would cost messages to recompute


def _atoms(whole: Call) -> list[Tensor]:
    """p and q, of pairs also their tangents."""
    inputs = whole.tensors[: -len(WEIGHT_DIMS)]
    found = [t for plane in range(0, len(inputs), NUM_INPUTS) for t in inputs[plane : plane + 2]]
    return [t for t in found if t is not None]


def _versions(tensors: Sequence[Tensor]) -> _VERSIONS:
    return tuple(t._version for t in tensors)


class RowsRunner:
    """See the module and `runner.EdgeRunner`. The call's graph is that of this rank's own edges.

    p, q, sum and the weights are sharded by channels, vec is replicated; gradients of r and f are whole.
    What is no sum travels in its own type, such as bfloat16; gradients of q and the weights, which are summed
    over ranks, in the kernels' type.

    Args:
        ring, index: of the model's layers, and this layer's place in it.
    """

    def __init__(self, rows: Rows, ring: WeightRing, index: int) -> None:
        self.rows, self.context, self.ring, self.index = rows, rows.context, ring, index

    def forward(self, call: Call, save: bool) -> tuple[list[Tensor | None], list[Tensor]]:
        tape = current_tape()
        again = tape is not None and tape.replaying
        weights = self.ring.take(self.index, hold=again)
        if not again:
            self.ring.start(self.index + 1)
        whole = self._whole_call(call, weights)
        outputs, kept = SERIAL.forward(whole, save)
        if call.spec.memory == "save":  # a recomputed layer must keep as many tensors each time
            kept += [t if save else t.new_empty(0) for t in _atoms(whole)]
        return self._outputs(outputs), kept

    def backward(
        self, call: Call, kept: Tensors, bars: Tensors, wanted: tuple[bool, bool], outputs: bool = False
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        weights = self.ring.take(self.index)
        self.ring.start(self.index - 1)
        kept, atoms = kept[:_NUM_KEPT], [t for t in kept[_NUM_KEPT:] if t is not None and t.dim() == 2]
        whole = self._whole_call(call, weights, atoms)
        bars = [bar if bar is None else self._own_bar(k, bar) for k, bar in enumerate(bars)]
        # Widened here: gradients that are summed over ranks come, and travel, in the kernels' type.
        gradients, found = SERIAL.backward(widened(whole), kept, bars, wanted, outputs)
        num_inputs = len(call.tensors) - len(WEIGHT_DIMS)
        inputs = [self._input_gradient(k, t, call) for k, t in enumerate(gradients[:num_inputs])]
        summed = [*inputs, *self._weight_gradients(gradients[num_inputs:])]
        return typed_gradients(call, summed), self._outputs(typed_outputs(call, found))

    def _whole_call(self, call: Call, weights: EdgeWeights, atoms: Tensors = ()) -> Call:
        """The call with own rows of p, all of q, and whole weights; `atoms`, if given, are those p and q."""
        tensors = list(call.tensors[: -len(WEIGHT_DIMS)])
        for k, plane in enumerate(range(0, len(tensors), NUM_INPUTS)):
            if atoms:
                tensors[plane : plane + 2] = atoms[2 * k : 2 * k + 2]
                continue
            p, q = tensors[plane], tensors[plane + 1]
            assert p is not None
            assert q is not None
            coming_p = start_to_rows(p.detach(), self.rows)
            coming_q = start_gather_along(q.detach(), -1, self.context, "tp")
            tensors[plane], tensors[plane + 1] = coming_p.wait(), coming_q.wait()
        centres_R = call.tensors[-len(WEIGHT_DIMS)]
        return Call(call.graph, call.spec, call.pair, (*tensors, centres_R, *weights[1:]))

    def _outputs(self, outputs: Tensors) -> list[Tensor | None]:
        """sum to channels, vec to every rank."""
        starts = (start_to_channels, start_join)
        coming = [None if t is None else starts[k % 2](t, self.rows) for k, t in enumerate(outputs)]
        return [None if c is None else c.wait() for c in coming]

    def _own_bar(self, number: int, bar: Tensor) -> Tensor:
        if number % 2 == 1:
            return bar[self.rows.own]
        return start_to_rows(bar.contiguous(), self.rows).wait()

    def _input_gradient(self, number: int, gradient: Tensor | None, call: Call) -> Tensor | None:
        tensor, kind = call.tensors[number], number % NUM_INPUTS
        if gradient is None or tensor is None or kind > 1:
            return gradient
        if kind == 0:
            return start_to_channels(gradient.to(tensor.dtype), self.rows).wait()
        return start_reduce_scatter_along(gradient, -1, self.context, "tp").wait()

    def _weight_gradients(self, gradients: Tensors) -> list[Tensor | None]:
        """Sums over ranks, each rank its slice, in one message; of what every rank holds, the whole sum."""
        tp, result = self.context.tp_size, list(gradients)
        sharded = [
            (k, t, d)
            for k, (t, d) in enumerate(zip(gradients, WEIGHT_DIMS, strict=True))
            if t is not None and d
        ]
        if not sharded:
            return result
        parts = [stack(t, d, tp).view(tp, -1) for _, t, d in sharded]
        coming = messages.start_reduce_scatter(torch.cat(parts, 1), self.context, "tp")
        if (b4_bar := result[-1]) is not None:
            result[-1] = messages.all_reduce(b4_bar.contiguous(), self.context, "tp")
        flat = coming.wait().split([part.shape[1] for part in parts])
        for (k, t, d), own in zip(sharded, flat, strict=True):
            shape = list(t.shape)
            shape[d] //= tp
            result[k] = own.view(shape)
        return result
