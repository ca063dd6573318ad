"""The plan `channel`: each rank keeps its F/tp channels of every edge's rows.

A product over channels gives partial sums, which a reduce-scatter completes and divides; in the backward an
all-gather brings the cotangents of all channels to each rank's product. Two blocks are under way at a time:
while the message of one travels, the other computes.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megagnn.models.egnn.edge.runner import Call, Tensors, kept_of, typed_gradients, typed_outputs, widened
from megagnn.models.egnn.edge.stages import BlockStages, backward_block, forward_block, interleave
from megagnn.models.egnn.edge.types import NUM_INPUTS, EdgeWeights
from megagnn.parallel import messages
from megagnn.parallel.collectives import unstack
from megagnn.parallel.context import ParallelContext

# Numbers in one message of a block. All ranks must cut the same blocks, so that this depends on the widths
# alone; large enough that a message takes longer than its start, and no larger, for blocks take memory.
_MESSAGE_NUMBERS, _LEAST_ROWS = 2**19, 512
_DEPTH = 2


class _ChannelLinks:
    """The collectives between the stages."""

    def __init__(self, context: ParallelContext) -> None:
        self.context = context

    def product(self, x: Tensor, y: Tensor, out: Tensor) -> messages.Pending:
        """Partial sums of all channels, each rank's part as one matrix; this rank's sum to `out`."""
        partial = out.new_empty((self.context.tp_size, *out.shape))
        for rank, columns in enumerate(y.chunk(self.context.tp_size, 1)):
            torch.mm(x, columns, out=partial[rank])
        return messages.start_reduce_scatter(partial, self.context, "tp").then(out.copy_)

    def reduce_scalar(self, w: Tensor) -> messages.Pending:
        """In place."""
        return messages.start_all_reduce(w, self.context, "tp")

    def gather(self, bar: Tensor) -> messages.Pending:
        """All channels of a cotangent."""
        pending = messages.start_all_gather(bar, self.context, "tp")
        return pending.then(lambda parts: unstack(parts, -1))


class ChannelRunner:
    """See the module and `runner.EdgeRunner`; for who holds what, [Note: shards] in stages.py.

    Gradients of r and f are partial, that of b4 is whole on every rank, all others are of this rank's slice.
    Messages are sums and their cotangents: they travel in the kernels' type, bfloat16 ones in float32.
    """

    def __init__(self, context: ParallelContext) -> None:
        self.context, self.links = context, _ChannelLinks(context)

    def forward(self, call: Call, save: bool) -> tuple[list[Tensor | None], list[Tensor]]:
        stages = self._stages(call, save)
        outputs = stages.start_forward()
        interleave(stages, lambda block: forward_block(stages, block, self.links), _DEPTH)
        absent = () if stages.has_vector else (None,)
        if not stages.has_vector:
            outputs = tuple(t for k in range(stages.planes) for t in (outputs[2 * k], *absent))
        return typed_outputs(call, outputs), kept_of(call, stages.kept_tensors())

    def backward(
        self, call: Call, kept: Tensors, bars: Tensors, wanted: tuple[bool, bool], outputs: bool = False
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        stages = self._stages(call, False, kept)
        first, (geometry, weights) = self.context.tp_rank == 0, wanted
        bars = [bar if bar is None else bar.to(stages.dtype) for bar in bars]
        gradients = stages.start_backward(bars, geometry, weights)
        interleave(stages, lambda block: backward_block(stages, block, self.links, first), _DEPTH)
        inputs = [*gradients.values, *(gradients.tangents if call.pair else ())]
        found = typed_gradients(call, [*inputs, *gradients.weights])
        return found, self.forward(call, False)[0] if outputs else []

    def _stages(self, call: Call, save: bool, kept: Tensors = ()) -> BlockStages:
        call = widened(call)
        values: Any = call.tensors[:NUM_INPUTS]
        tangents: Any = call.tensors[NUM_INPUTS : 2 * NUM_INPUTS] if call.pair else None
        weights = EdgeWeights(*call.tensors[-len(EdgeWeights._fields) :])  # type: ignore[arg-type]
        block = call.spec.block_edges or block_edges(weights, 2 if call.pair else 1)
        found = [t.to(values[0].dtype) for t in kept if t is not None and t.numel()]
        spec = replace(call.spec, block_edges=block)
        return BlockStages(values, weights, call.graph, spec, tangents, save, found)


def block_edges(weights: EdgeWeights, planes: int) -> int:
    """Edges of a block, the same on every rank."""
    rows = max(_LEAST_ROWS, _MESSAGE_NUMBERS // max(weights.w2_MH.shape[0], 1))
    return rows // planes
