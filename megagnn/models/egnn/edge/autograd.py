"""The edge operation as a function that can be differentiated twice, whoever runs its passes.

[Note: derivatives] There are two kernels of each kind: for values, and for pairs of value and tangent, with
one matrix product of twice the rows for both. The gradient of  <bar, J(x) xi>  with respect to x, which the
second derivative needs, is the backward of the pair operation with tangents xi and cotangents (0, bar); with
respect to bar it is the pair operation's tangent output. So the operation's double backward is one call.
Where a runner divides the work over ranks, the same holds of the whole, and so of its parts.
"""

from typing import Any

import torch
from torch import Tensor

from megagnn.models.egnn.edge import reference as edge_reference
from megagnn.models.egnn.edge.runner import SERIAL, Call, EdgeRunner, check_types
from megagnn.models.egnn.edge.types import NUM_INPUTS, NUM_WEIGHTS, EdgeGraph, EdgeSpec, EdgeWeights
from megagnn.ops.recompute import current_tape, used_gradients


def apply(runner: EdgeRunner, call: Call) -> tuple[Tensor | None, ...]:
    """sum and vec, and of pairs their tangents, of a call whose tensors autograd watches."""
    check_types(call)
    graph, spec, pair, tensors = call
    return _EdgeMessage.apply(runner, graph, spec, pair, *tensors)


class _EdgeMessage(torch.autograd.Function):
    """runner, graph, spec, pair, inputs (4; of a pair 8), weights (8) -> sum, vec and tangents of a pair."""

    @staticmethod
    def forward(
        ctx: Any, runner: EdgeRunner, graph: EdgeGraph, spec: EdgeSpec, pair: bool, *tensors: Tensor | None
    ) -> Any:
        outputs, kept = _run_forward(runner, Call(graph, spec, pair, tensors), any(ctx.needs_input_grad))
        ctx.runner, ctx.graph, ctx.spec, ctx.pair = runner, graph, spec, pair
        ctx.save_for_backward(*tensors, *kept)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *bars: Tensor | None) -> Any:
        saved = ctx.saved_tensors  # once: a recomputed layer is computed here
        if all(bar is None for bar in bars):
            return (None,) * len(ctx.needs_input_grad)
        num_inputs = NUM_INPUTS * (2 if ctx.pair else 1)
        tensors, kept = saved[: num_inputs + NUM_WEIGHTS], saved[num_inputs + NUM_WEIGHTS :]
        wanted = _wanted(ctx, tensors, num_inputs)
        if torch.is_grad_enabled() and not ctx.pair:
            where = (ctx.runner, ctx.graph, ctx.spec, wanted)
            gradients = _EdgeBackward.apply(*where, *bars, *saved)
        else:
            call = Call(ctx.graph, ctx.spec, ctx.pair, tensors)
            gradients = ctx.runner.backward(call, kept, bars, wanted)[0]
            gradients = _last_derivative(gradients, (*bars, *saved))
        return (None, None, None, None, *gradients)


def _run_forward(
    runner: EdgeRunner, call: Call, differentiated: bool
) -> tuple[list[Tensor | None], list[Tensor]]:
    """The outputs, and what is kept for the backward; see megagnn/ops/recompute.py."""
    tape, save = current_tape(), call.spec.memory == "save" and differentiated
    if tape is None or (tape.replaying and save):
        return runner.forward(call, save)
    if tape.replaying and differentiated:
        like = next(t for t in call.tensors if t is not None)
        return list(tape.take()), [like.new_empty(0) for _ in range(2)]
    outputs, kept = runner.forward(call, False)
    if differentiated and not save:
        tape.put([None if t is None else t.detach() for t in outputs])
    return outputs, kept


def _last_derivative(
    gradients: list[Tensor | None], made_of: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """Gradients whose own derivative is an error, not silently incomplete, where it is asked for."""
    if not torch.is_grad_enabled():
        return gradients
    return list(_Last.apply(len(gradients), *gradients, *made_of))


class _Last(torch.autograd.Function):
    """count, gradients (count), what they were made of -> the gradients."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> Any:
        return tuple(None if t is None else t.detach() for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> Any:
        raise RuntimeError(
            "edge_message: its second derivatives, and those of edge_message_pair, cannot be differentiated; "
            "use edge_reference.edge_message for higher ones"
        )


def _wanted(ctx: Any, tensors: tuple[Tensor | None, ...], num_inputs: int) -> tuple[bool, bool]:
    """Whether gradients of (r or f), and of the weights, will be used by this very backward."""
    used = used_gradients(ctx, tensors)
    geometry = [used[plane + k] for plane in range(0, num_inputs, NUM_INPUTS) for k in (2, 3)]
    return any(geometry), any(used[num_inputs + 1 :])


_MADE_OF = 2 + NUM_INPUTS + NUM_WEIGHTS  # bars, inputs, weights


class _EdgeBackward(torch.autograd.Function):
    """runner, graph, spec, wanted, bars (2), inputs (4), weights (8), what is kept -> gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        runner: EdgeRunner,
        graph: EdgeGraph,
        spec: EdgeSpec,
        wanted: tuple[bool, bool],
        *tensors: Tensor | None,
    ) -> Any:
        ctx.runner, ctx.graph, ctx.spec = runner, graph, spec
        bars, given, kept = tensors[:2], tensors[2:_MADE_OF], tensors[_MADE_OF:]
        ctx.save_for_backward(*tensors[:_MADE_OF])
        ctx.num_kept = len(kept)
        ctx.set_materialize_grads(False)
        return tuple(runner.backward(Call(graph, spec, False, given), kept, bars, wanted)[0])

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> Any:
        saved = ctx.saved_tensors
        if all(t is None for t in tangents):
            return (None,) * len(ctx.needs_input_grad)
        bars, tensors = saved[:2], saved[2:]
        no_kept = (None,) * ctx.num_kept
        made_of = (*saved, *tangents)
        if any(t is not None for t in tangents[NUM_INPUTS:]):
            if ctx.runner is not SERIAL:
                raise RuntimeError(
                    "edge_message: gradients of weights divided over ranks cannot be differentiated; "
                    "use model.edge_operation = 'unfused'"
                )
            gradients = _double_backward_reference(ctx.graph, ctx.spec, bars, tensors, tangents)
            return (None,) * 4 + (*_last_derivative(gradients, made_of), *no_kept)
        values = tensors[:NUM_INPUTS]
        filled = [
            None if x is None else torch.zeros_like(x) if t is None else t
            for x, t in zip(values, tangents[:NUM_INPUTS], strict=True)
        ]
        none = torch.empty(0)
        call = Call(ctx.graph, ctx.spec, True, (*values, *filled, *tensors[NUM_INPUTS:]))
        gradients, outputs = ctx.runner.backward(
            call, (none, none), (None, None, *bars), (True, True), outputs=True
        )
        bar_gradients = [None if bar is None else out for bar, out in zip(bars, outputs[2:], strict=True)]
        of_values = [*gradients[:NUM_INPUTS], *gradients[2 * NUM_INPUTS :]]
        second = _last_derivative([*bar_gradients, *of_values], made_of)
        return (None,) * 4 + (*second, *no_kept)


def _double_backward_reference(
    graph: EdgeGraph, spec: EdgeSpec, bars: Any, tensors: Any, tangents: Any
) -> list[Tensor | None]:
    """The double backward where gradients of the weights are differentiated as well, on the reference."""
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in (*bars, *tensors)]
        bar_leaves, tensor_leaves = leaves[:2], leaves[2:]
        weights: Any = EdgeWeights(*tensor_leaves[NUM_INPUTS:])  # type: ignore[arg-type]
        inputs: Any = tensor_leaves[:NUM_INPUTS]
        p_NH, q_NH, r_E3, f_E = inputs
        outputs = edge_reference.edge_message(p_NH, q_NH, r_E3, f_E, weights, graph, spec)
        used: Any = [(y, bar) for y, bar in zip(outputs, bar_leaves, strict=True) if bar is not None]
        first = [t for k, t in enumerate(tensor_leaves) if t is not None and k != NUM_INPUTS]
        gradients = torch.autograd.grad(
            [y for y, _ in used],
            first,
            [bar for _, bar in used],
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        chosen = [x for k, x in enumerate(tangents) if tensor_leaves[k] is not None and k != NUM_INPUTS]
        along = sum((g * x).sum() for g, x in zip(gradients, chosen, strict=True) if x is not None)
        present = [t for t in leaves if t is not None]
        second = torch.autograd.grad(along, present, allow_unused=True)
    found = iter(second)
    return [None if t is None else next(found) for t in leaves]
