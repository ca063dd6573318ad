"""The blockwise edge operation: messages, their sum and the vector branch, with no tensor of E rows kept.

    a_e = p_i + q_j + W1c rho(d_e)        m_e = act(W2 act(a_e) + b2)       sum_i = sum_e f_e m_e
    w_e = w4 . act(W3 m_e + b3) + b4      vec_i = sum_e f_e w_e t(d_e) r_e

for edges e from j to i, sorted by i; with `bounded`, tanh(w_e) in place of w_e. Blocks of edges go through
the stages one after another and stay in the cache; the backward makes them again (`memory = "recompute"`) or
reads a, c = W2 act(a) and g = W3 m kept by the forward (`"save"`). The derivation is in docs/kernels.md.

[Note: derivatives] There are two kernels of each kind: for values, and for pairs of value and tangent, with
one matrix product of twice the rows for both. The gradient of  <bar, J(x) xi>  with respect to x, which the
second derivative needs, is the backward of the pair operation with tangents xi and cotangents (0, bar); with
respect to bar it is the pair operation's tangent output. So the operation's double backward is one call.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from megagnn.ops import edge_reference, extension
from megagnn.ops.segment import Segments

_FEATURES = ("bessel", "gaussian", "distance", "squared")
_DIRECTIONS = ("unit", "vector", "plus_one")
_ACTIVATIONS = ("silu", "relu")
_NUM_INPUTS, _NUM_WEIGHTS = 4, 8
_OPS = torch.ops.megagnn


@dataclass(frozen=True)
class EdgeSpec:
    """What the operation computes; see the module."""

    feature: Literal["bessel", "gaussian", "distance", "squared"] = "bessel"
    """rho: see `edge_reference.distance_features`."""
    direction: Literal["unit", "vector", "plus_one"] = "unit"
    """t(d): 1/d, 1 or 1/(d+1)."""
    activation: Literal["silu", "relu"] = "silu"
    bounded: bool = False
    """tanh on the scalar of the vector branch."""
    epsilon: float = 1e-3
    """d = sqrt(|r|^2 + epsilon^2), Å."""
    cutoff: float = 5.0
    """c of the Bessel basis, Å."""
    spread: float = 1.0
    """w of the Gaussian basis, Å."""
    memory: Literal["recompute", "save"] = "recompute"
    """Make the blocks again in the backward, or keep their pre-activations: (H + M + K) numbers per edge."""
    block_edges: int | None = None
    """Edges of a block; None takes what fits the cache."""


class EdgeWeights(NamedTuple):
    """Weights of the operation; those of the vector branch and absent parts are None."""

    centres_R: Tensor | None
    """Frequencies of the Bessel basis, 1/Å, or centres of the Gaussian one, Å; a constant."""
    w1c_HR: Tensor
    w2_MH: Tensor
    b2_M: Tensor
    w3_KM: Tensor | None = None
    b3_K: Tensor | None = None
    w4_K: Tensor | None = None
    b4_1: Tensor | None = None


@dataclass(frozen=True)
class EdgeGraph:
    """Both ends of the edges, and how they are cut into blocks.

    destination: Segments of the receivers; the edges must be sorted by them.
    source: Segments of the senders.
    """

    destination: Segments
    source: Segments
    _plans: dict[tuple[int, int], tuple[Tensor, ...]] = field(default_factory=dict, init=False, repr=False)

    def plan(self, block_edges: int, num_workers: int) -> tuple[Tensor, ...]:
        """Blocks and workers, on CUDA also the blocks' edges by source; [Note: plan] in csrc. Made once."""
        key = (block_edges, num_workers)
        if key not in self._plans:
            if self.destination.perm is not None:
                raise ValueError(
                    "edge_message: edges must be sorted by destination, got destination segments with a perm"
                )
            ends = [t.cpu() for t in (self.destination.index, self.source.index, self.destination.ptr)]
            blocks, workers = _OPS.edge_plan(*ends, self.source.num_rows, *key)
            on_cpu = self.destination.index.is_cpu
            runs = (blocks.new_empty(0),) * 3 if on_cpu else self._runs(blocks)
            self._plans[key] = (blocks, workers, *runs)
        return self._plans[key]

    def _runs(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each block's edges in the order of their sources; each block's first run; each run's first edge."""
        block_edges = blocks.view(-1, 4)[:, 1] - blocks.view(-1, 4)[:, 0]
        block_E = torch.repeat_interleave(block_edges.to(self.source.index.device))
        key_E, order_E = (block_E * self.source.num_rows + self.source.index).sort(stable=True)
        _, run_E, counts = key_E.unique_consecutive(return_inverse=True, return_counts=True)
        run_begin = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        first_edges = torch.cat([block_edges.new_zeros(1), block_edges.cumsum(0)]).to(run_E.device)
        runs = torch.cat([run_E, run_E.new_tensor([len(counts)])])[first_edges]
        return order_E, runs, run_begin


def edge_message(
    p_NH: Tensor,
    q_NH: Tensor,
    r_E3: Tensor,
    f_E: Tensor | None,
    weights: EdgeWeights,
    graph: EdgeGraph,
    spec: EdgeSpec,
) -> tuple[Tensor, Tensor | None]:
    """sum (N, M) and vec (N, 3), Å (None without a vector branch), of the module's equations.

    Twice differentiable in every tensor but the centres. float32 and float64 run the kernels; anything else
    runs `edge_reference.edge_message`.

    Args:
        p_NH: what the receiver adds to the hidden layer, its bias included.
        q_NH: what the sender adds.
        r_E3: x_j + shift - x_i, Å.
        f_E: envelope of each edge, or None for one.

    Raises:
        RuntimeError: shapes or types that do not fit, with the names.
        ValueError: edges that are not sorted by destination; p or q without one row per atom.
    """
    if not has_kernels(p_NH):
        return edge_reference.edge_message(p_NH, q_NH, r_E3, f_E, weights, graph, spec)
    tensors = map(_non_leaf, (p_NH, q_NH, r_E3, f_E, *weights))
    sum_NM, vec_N3 = _EdgeMessage.apply(graph, spec, False, *tensors)
    return sum_NM, vec_N3


class EdgePair(NamedTuple):
    """Sums and vectors, and their tangents: (N, M), (N, 3), (N, M), (N, 3)."""

    sum_NM: Tensor
    vec_N3: Tensor | None
    sum_tangent_NM: Tensor
    vec_tangent_N3: Tensor | None


def edge_message_pair(
    values: tuple[Tensor, Tensor, Tensor, Tensor | None],
    tangents: tuple[Tensor, Tensor, Tensor, Tensor | None],
    weights: EdgeWeights,
    graph: EdgeGraph,
    spec: EdgeSpec,
) -> EdgePair:
    """`edge_message` of (p, q, r, f) and its derivative along their tangents, in one pass.

    The weights have no tangents. Once differentiable: this is what a loss on forces needs (docs/kernels.md).
    Raises like `edge_message`, and ValueError for the tangent of an absent envelope.
    """
    if values[3] is None and tangents[3] is not None:
        raise ValueError(
            "edge_message_pair: an absent envelope has no tangent, got one; pass an envelope of ones with it"
        )
    if not has_kernels(values[0]):
        return _pair_reference(values, tangents, weights, graph, spec)
    return EdgePair(*_EdgeMessage.apply(graph, spec, True, *map(_non_leaf, (*values, *tangents, *weights))))


def _non_leaf(tensor: Tensor | None) -> Tensor | None:
    """The same tensor behind a node of its own: of leaves the engine does not say whether they are wanted."""
    if tensor is None or not (tensor.requires_grad and tensor.is_leaf):
        return tensor
    return tensor.view_as(tensor)


def has_kernels(values: Tensor) -> bool:
    """Whether the blockwise kernels serve tensors like this one; torch.compile sees the reference."""
    if torch.compiler.is_compiling():
        return False
    there = (extension.has_cpu and values.is_cpu) or (extension.has_cuda and values.is_cuda)
    return there and values.dtype in (torch.float32, torch.float64)


def _pair_reference(
    values: Any, tangents: Any, weights: EdgeWeights, graph: EdgeGraph, spec: EdgeSpec
) -> EdgePair:
    """By the double-backward trick: the tangent is the derivative of <dummy, gradient> in the dummy."""
    with torch.enable_grad():
        inputs = [v if v is None or v.requires_grad else v.detach().requires_grad_() for v in values]
        p_NH, q_NH, r_E3, f_E = inputs
        sum_NM, vec_N3 = edge_reference.edge_message(p_NH, q_NH, r_E3, f_E, weights, graph, spec)
        outputs = [t for t in (sum_NM, vec_N3) if t is not None]
        dummies = [torch.zeros_like(t, requires_grad=True) for t in outputs]
        pairs = [(x, t) for x, t in zip(inputs, tangents, strict=True) if x is not None]
        gradients = torch.autograd.grad(outputs, [x for x, _ in pairs], dummies, create_graph=True)
        along = sum((g * t).sum() for g, (_, t) in zip(gradients, pairs, strict=True) if t is not None)
        tangent = torch.autograd.grad(along, dummies, create_graph=True)
    return EdgePair(sum_NM, vec_N3, tangent[0], tangent[1] if vec_N3 is not None else None)


@cache
def _cache_bytes() -> int:
    """Second-level cache of one core; 1 MiB where the system does not say."""
    try:
        size = os.sysconf("SC_LEVEL2_CACHE_SIZE")
    except (ValueError, OSError, AttributeError):
        size = 0
    return size if size > 0 else 2**20


def default_block_edges(width: int, element_size: int, planes: int, on_cpu: bool = True) -> int:
    """CPU: edges whose six buffers of `width` fill the second-level cache once, of 256 to 512 rows.

    With fewer rows the weights of wide layers, which do not fit that cache, are read too often. CUDA: enough
    rows to occupy the device; a buffer takes up to 64 MiB.
    """
    if not on_cpu:
        return max(4096, 2**26 // (planes * width * element_size))
    fitting = _cache_bytes() // (6 * width * element_size)
    return max(256, min(512, fitting // 32 * 32)) // planes


# Below this many FLOPs of the W2 product per worker, starting another thread costs more than it saves.
_WORKER_FLOPS = 2e6


def _graph_arguments(
    graph: EdgeGraph, spec: EdgeSpec, weights: tuple[Tensor, ...], planes: int
) -> list[Tensor]:
    w2_MH = weights[2]
    width = max(w2_MH.shape)
    block = spec.block_edges or default_block_edges(width, w2_MH.element_size(), planes, w2_MH.is_cpu)
    flops = 2.0 * graph.destination.num_entries * w2_MH.numel()
    workers = max(1, min(torch.get_num_threads(), int(flops // _WORKER_FLOPS))) if w2_MH.is_cpu else 1
    destination = graph.destination
    return [destination.index, graph.source.index, destination.ptr, *graph.plan(block, workers)]


def _arguments(
    graph: EdgeGraph, spec: EdgeSpec, pair: bool, tensors: tuple[Tensor | None, ...]
) -> tuple[Any, ...]:
    """Lists of the compiled operations; an absent tensor is an empty one."""
    _check_rows(graph, *tensors[:2])
    none = torch.empty(0)
    present = [none if t is None else t.detach() for t in tensors]
    num_inputs = _NUM_INPUTS * (2 if pair else 1)
    inputs = present[:num_inputs] + [none] * (2 * _NUM_INPUTS - num_inputs)
    weights = tuple(present[num_inputs:])
    weights = (*weights[:6], weights[6].reshape(-1), weights[7])
    integers = [
        _FEATURES.index(spec.feature),
        _DIRECTIONS.index(spec.direction),
        _ACTIVATIONS.index(spec.activation),
        int(spec.bounded),
        int(pair),
        1,
    ]
    graph_arguments = _graph_arguments(graph, spec, weights, 2 if pair else 1)
    return inputs, list(weights), graph_arguments, integers, [spec.epsilon**2, spec.cutoff, spec.spread]


def _check_rows(graph: EdgeGraph, p_NH: Tensor | None, q_NH: Tensor | None) -> None:
    """What the kernels cannot see: they know the edges' ends, and not how many atoms the graph has."""
    for name, tensor, segments in (("p", p_NH, graph.destination), ("q", q_NH, graph.source)):
        if tensor is None or tensor.dim() != 2 or tensor.shape[0] != segments.num_rows:
            got = "None" if tensor is None else f"shape {tuple(tensor.shape)}"
            raise ValueError(
                f"edge_message (compiled): {name} must be a matrix of one row per atom of the graph, "
                f"{segments.num_rows}, got {got}"
            )


def _or_none(tensor: Tensor) -> Tensor | None:
    return None if tensor.dim() == 1 and tensor.shape[0] == 0 else tensor


class _EdgeMessage(torch.autograd.Function):
    """graph, spec, pair, inputs (4; of a pair 8), weights (8) -> sum, vec (of a pair: and their tangents)."""

    @staticmethod
    def forward(ctx: Any, graph: EdgeGraph, spec: EdgeSpec, pair: bool, *tensors: Tensor | None) -> Any:
        arguments = _arguments(graph, spec, pair, tensors)
        save = spec.memory == "save" and any(ctx.needs_input_grad)
        *outputs, a, c, g = _OPS.edge_message_forward(*arguments, save)
        ctx.graph, ctx.spec, ctx.pair = graph, spec, pair
        ctx.save_for_backward(*tensors, a, c, g)
        ctx.set_materialize_grads(False)
        return tuple(_or_none(t) for t in (outputs if pair else outputs[:2]))

    @staticmethod
    def backward(ctx: Any, *bars: Tensor | None) -> Any:
        if all(bar is None for bar in bars):
            return (None,) * len(ctx.saved_tensors)
        wanted = _wanted(ctx, _NUM_INPUTS * (2 if ctx.pair else 1))
        if torch.is_grad_enabled() and not ctx.pair:
            gradients = _EdgeBackward.apply(ctx.graph, ctx.spec, wanted, *bars, *ctx.saved_tensors)
        else:
            gradients = _backward(ctx.graph, ctx.spec, ctx.pair, wanted, bars, ctx.saved_tensors)[0]
            gradients = _last_derivative(gradients, (*bars, *ctx.saved_tensors))
        return (None, None, None, *gradients)


def _last_derivative(
    gradients: list[Tensor | None], made_of: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """Gradients whose own derivative is an error, where a graph of them is asked for.

    once_differentiable would leave constants where the cotangents are, and a derivative silently incomplete.
    """
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


def _wanted(ctx: Any, num_inputs: int) -> tuple[bool, bool]:
    """Whether gradients of (r or f), and of the weights, will be used by this very backward.

    needs_input_grad knows only what requires gradients: a force pass over a model in training, which asks for
    positions alone, would pay for those of the weights.
    """
    nodes = iter(ctx.next_functions)  # one per tensor; an absent one has none
    used = [t is not None and _is_used(next(nodes)[0]) for t in ctx.saved_tensors[:-3]]
    geometry = [used[plane + k] for plane in range(0, num_inputs, _NUM_INPUTS) for k in (2, 3)]
    return any(geometry), any(used[num_inputs + 1 :])


def _is_used(node: Any) -> bool:
    return node is not None and torch._C._will_engine_execute_node(node)


def _backward(
    graph: EdgeGraph,
    spec: EdgeSpec,
    pair: bool,
    wanted: tuple[bool, bool],
    bars: tuple[Tensor | None, ...],
    saved: tuple[Tensor | None, ...],
    outputs: bool = False,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of the inputs and weights, and with `outputs` the operation's results."""
    *tensors, a, c, g = saved
    arguments = _arguments(graph, spec, pair, tuple(tensors))
    p_NH, w2_MH, has_vector = arguments[0][0], arguments[1][2], _or_none(arguments[1][4]) is not None
    shapes = [(p_NH.shape[0], w2_MH.shape[0]), (p_NH.shape[0], 3)] * 2
    full = [
        p_NH.new_zeros(shape) if bar is None else bar
        for bar, shape in zip((*bars, *(None,) * (4 - len(bars))), shapes, strict=True)
    ]
    result = _OPS.edge_message_backward(*arguments, [a, c, g], full, *wanted, outputs)
    num_inputs = _NUM_INPUTS * (2 if pair else 1)
    weights = [_or_none(t) for t in result[-(_NUM_WEIGHTS - 1) :]]
    if has_vector and weights[5] is not None:
        weights[5] = weights[5].reshape(tensors[num_inputs + 6].shape)  # type: ignore[union-attr]
    gradients = [*map(_or_none, result[:num_inputs]), None, *weights]
    gradients = [_gradient_of(t, g) for g, t in zip(gradients, tensors, strict=True)]
    return gradients, [_or_none(t) for t in result[2 * _NUM_INPUTS : 2 * _NUM_INPUTS + 4]]


def _gradient_of(tensor: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """None of an absent tensor; the envelope of no edges looks absent to the kernels and is not."""
    if tensor is None:
        return None
    return torch.zeros_like(tensor) if tensor.numel() == 0 else gradient


class _EdgeBackward(torch.autograd.Function):
    """graph, spec, wanted, bars (2), inputs (4), weights (8), kept (3) -> gradients of inputs and weights."""

    @staticmethod
    def forward(
        ctx: Any, graph: EdgeGraph, spec: EdgeSpec, wanted: tuple[bool, bool], *tensors: Tensor | None
    ) -> Any:
        bars, saved = tensors[:2], tensors[2:]
        ctx.graph, ctx.spec = graph, spec
        ctx.save_for_backward(*tensors[:-3])
        ctx.set_materialize_grads(False)
        return tuple(_backward(graph, spec, False, wanted, bars, saved)[0])

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> Any:
        if all(t is None for t in tangents):
            return (None,) * (len(ctx.saved_tensors) + 6)
        bars, tensors = ctx.saved_tensors[:2], ctx.saved_tensors[2:]
        made_of = (*ctx.saved_tensors, *tangents)
        if any(t is not None for t in tangents[_NUM_INPUTS:]):
            gradients = _double_backward_reference(ctx.graph, ctx.spec, bars, tensors, tangents)
            return (None, None, None, *_last_derivative(gradients, made_of), None, None, None)
        values = tensors[:_NUM_INPUTS]
        filled = [
            None if x is None else torch.zeros_like(x) if t is None else t
            for x, t in zip(values, tangents[:_NUM_INPUTS], strict=True)
        ]
        none = torch.empty(0)
        spec_arguments = (*values, *filled, *tensors[_NUM_INPUTS:], none, none, none)
        gradients, outputs = _backward(
            ctx.graph, ctx.spec, True, (True, True), (None, None, *bars), spec_arguments, outputs=True
        )
        bar_gradients = [None if bar is None else out for bar, out in zip(bars, outputs[2:], strict=True)]
        of_values = [*gradients[:_NUM_INPUTS], *gradients[2 * _NUM_INPUTS :]]
        second = _last_derivative([*bar_gradients, *of_values], made_of)
        return (None, None, None, *second, None, None, None)


def _double_backward_reference(
    graph: EdgeGraph, spec: EdgeSpec, bars: Any, tensors: Any, tangents: Any
) -> list[Tensor | None]:
    """The double backward where gradients of the weights are differentiated as well, on the reference."""
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in (*bars, *tensors)]
        bar_leaves, tensor_leaves = leaves[:2], leaves[2:]
        weights: Any = EdgeWeights(*tensor_leaves[_NUM_INPUTS:])  # type: ignore[arg-type]
        inputs: Any = tensor_leaves[:_NUM_INPUTS]
        p_NH, q_NH, r_E3, f_E = inputs
        outputs = edge_reference.edge_message(p_NH, q_NH, r_E3, f_E, weights, graph, spec)
        used: Any = [(y, bar) for y, bar in zip(outputs, bar_leaves, strict=True) if bar is not None]
        first = [t for k, t in enumerate(tensor_leaves) if t is not None and k != _NUM_INPUTS]
        gradients = torch.autograd.grad(
            [y for y, _ in used],
            first,
            [bar for _, bar in used],
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        chosen = [x for k, x in enumerate(tangents) if tensor_leaves[k] is not None and k != _NUM_INPUTS]
        along = sum((g * x).sum() for g, x in zip(gradients, chosen, strict=True) if x is not None)
        present = [t for t in leaves if t is not None]
        second = torch.autograd.grad(along, present, allow_unused=True)
    found = iter(second)
    return [None if t is None else next(found) for t in leaves]
