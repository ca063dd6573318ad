"""Who runs the edge operation's passes on tensors, outside of autograd: here, one process by itself.

[Note: runners] A runner does the forward and the backward of the edge operation (message.py), on values or on
pairs of value and tangent; autograd.py makes a function of it that can be differentiated twice, whoever runs.
The runners that divide the work over tensor-parallel ranks are plan_channel.py and plan_rows.py.

[Note: types] p, q, sum and the weights are of one type, r, f and vec of another, as wide or wider. The
kernels know one, which the centres have: float64 where p is, else float32 (`edge_type`). So a runner widens
bfloat16, or narrows float64 geometry beside float32, for as long as it runs; what is kept for the backward
has the type of p, and every result and gradient that of what it belongs to.
"""

import os
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megagnn.models.egnn.edge.types import (
    ACTIVATIONS,
    DIRECTIONS,
    FEATURES,
    NUM_INPUTS,
    NUM_WEIGHTS,
    EdgeGraph,
    EdgeSpec,
    EdgeWeights,
)
from megagnn.ops import extension
from megagnn.ops.dispatch import ABSENT, DTYPES, accumulator_type, below_autograd

_OPS = torch.ops.megagnn

Tensors = Sequence[Tensor | None]

_INPUTS = ("p", "q", "r", "f")
_TANGENTS = tuple(f"tangent of {name}" for name in _INPUTS)
# What has the type of r, not of p.
_GEOMETRY = ("r", "f", "tangent of r", "tangent of f")


class Call(NamedTuple):
    """Arguments of a pass. `tensors`: p, q, r, f, of pairs their tangents, and the eight weights."""

    graph: EdgeGraph
    spec: EdgeSpec
    pair: bool
    tensors: Tensors


class EdgeRunner(Protocol):
    """See [Note: runners]."""

    def forward(self, call: Call, save: bool) -> tuple[list[Tensor | None], list[Tensor]]:
        """sum, vec, and of pairs their tangents; and what `backward` is to be given as `kept`.

        That is c and g of all edges with `save`, else empty tensors, and what else the runner may want.
        """

    def backward(
        self, call: Call, kept: Tensors, bars: Tensors, wanted: tuple[bool, bool], outputs: bool = False
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Gradients, one for each of `call.tensors`; with `outputs` also the operation's results (4).

        bars: cotangents of the results, 2 or, of pairs, 4; None for zero. wanted: whether gradients of
        (r or f), of the weights, will be used.
        """


def check_types(call: Call) -> None:
    """RuntimeError, with the tensor's name, for types that [Note: types] does not have."""
    p_NH, r_E3 = call.tensors[0], call.tensors[2]
    assert p_NH is not None
    assert r_E3 is not None
    narrow, wide = p_NH.dtype, r_E3.dtype
    if _is_of(call, narrow) and narrow == edge_type(p_NH):
        return
    if torch.promote_types(narrow, wide) != wide:
        raise RuntimeError(
            f"edge_message (compiled): r must have the type of p, {narrow}, or a wider one, got {wide}"
        )
    names = (*_INPUTS, *(_TANGENTS if call.pair else ()), *EdgeWeights._fields)
    for name, tensor in zip(names, call.tensors, strict=True):
        owner, kind = ("r", wide) if name in _GEOMETRY else ("p", narrow)
        if name == "centres_R":
            owner, kind = "the kernels", edge_type(p_NH)
        if tensor is not None and tensor.dtype != kind:
            raise RuntimeError(
                f"edge_message (compiled): {name.split('_')[0]} must have the type of {owner}, {kind}, "
                f"got {tensor.dtype}"
            )


def has_kernels(values: Tensor) -> bool:
    """Whether runners serve a p like this one; torch.compile sees the reference."""
    if torch.compiler.is_compiling():
        return False
    there = (extension.has_cpu and values.is_cpu) or (extension.has_cuda and values.is_cuda)
    return there and values.dtype in DTYPES


def edge_type(p_NH: Tensor) -> torch.dtype:
    """The type in which the kernels compute: float64 for a p in float64, else float32."""
    return accumulator_type(p_NH.dtype)


def _is_of(call: Call, kind: torch.dtype) -> bool:
    return all(t is None or t.dtype == kind for t in call.tensors)


def widened(call: Call) -> Call:
    """The call in the kernels' type; the same data where they have it, and no graph held alive."""
    return call._replace(tensors=[None if t is None else t.detach() for t in _cast(call).tensors])


def typed_outputs(call: Call, outputs: Tensors) -> list[Tensor | None]:
    """sum, vec, and their tangents, in the types of p and r."""
    like = (call.tensors[0], call.tensors[2])
    return [_typed(t, like[k % 2]) for k, t in enumerate(outputs)]


def typed_gradients(call: Call, gradients: Tensors) -> list[Tensor | None]:
    """Gradients in the types of the call's tensors."""
    return [_typed(g, t) for g, t in zip(gradients, call.tensors, strict=True)]


def _typed(result: Tensor | None, like: Tensor | None) -> Tensor | None:
    if like is None:
        return None
    return result if result is None or result.dtype == like.dtype else result.to(like.dtype)


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


def plan_key(
    block_edges: int | None,
    shape: tuple[int, int],
    element_size: int,
    num_edges: int,
    planes: int,
    threads: int | None,
) -> tuple[int, int]:
    """Edges of a block and workers of a pass, for `EdgeGraph.plan`.

    Args:
        block_edges: as in `EdgeSpec`.
        shape: (M, H) of the W2 product.
        planes: 1 of values, 2 of pairs.
        threads: of the CPU; None on a GPU.
    """
    on_cpu, (M, H) = threads is not None, shape
    block = block_edges or default_block_edges(max(M, H), element_size, planes, on_cpu)
    flops = 2.0 * num_edges * M * H
    return block, 1 if threads is None else max(1, min(threads, int(flops // _WORKER_FLOPS)))


def _graph_arguments(
    graph: EdgeGraph, spec: EdgeSpec, weights: tuple[Tensor, ...], planes: int
) -> list[Tensor]:
    w2_MH, destination = weights[2], graph.destination
    key = plan_key(
        spec.block_edges,
        (w2_MH.shape[0], w2_MH.shape[1]),
        w2_MH.element_size(),
        destination.num_entries,
        planes,
        torch.get_num_threads() if w2_MH.is_cpu else None,
    )
    return [destination.index, graph.source.index, destination.ptr, *graph.plan(*key)]


def compiled_arguments(call: Call) -> tuple[Any, ...]:
    """Lists of the compiled operations, with the tensors as they are; an absent one is an empty one."""
    graph, spec, pair, tensors = call
    _check_rows(graph, *tensors[:2])
    present = [ABSENT if t is None else t for t in tensors]
    num_inputs = NUM_INPUTS * (2 if pair else 1)
    inputs = present[:num_inputs] + [ABSENT] * (2 * NUM_INPUTS - num_inputs)
    weights = tuple(present[num_inputs:])
    weights = (*weights[:6], weights[6].reshape(-1), weights[7])
    integers = [
        FEATURES.index(spec.feature),
        DIRECTIONS.index(spec.direction),
        ACTIVATIONS.index(spec.activation),
        int(spec.bounded),
        int(pair),
        1,
    ]
    graph_arguments = _graph_arguments(graph, spec, weights, 2 if pair else 1)
    return inputs, list(weights), graph_arguments, integers, [spec.epsilon**2, spec.cutoff, spec.spread]


def _check_rows(graph: EdgeGraph, p_NH: Tensor | None, q_NH: Tensor | None) -> None:
    for name, tensor, segments in (("p", p_NH, graph.destination), ("q", q_NH, graph.source)):
        if tensor is None or tensor.dim() != 2 or tensor.shape[0] != segments.num_rows:
            got = "None" if tensor is None else f"shape {tuple(tensor.shape)}"
            raise ValueError(
                f"edge_message (compiled): {name} must be a matrix of one row per atom of the graph, "
                f"{segments.num_rows}, got {got}"
            )


def or_none(tensor: Tensor) -> Tensor | None:
    """The tensor, or None for the empty one by which the compiled operations mark an absent tensor."""
    return None if tensor.dim() == 1 and tensor.shape[0] == 0 else tensor


class SerialRunner:
    """One process, the compiled operations."""

    def forward(self, call: Call, save: bool) -> tuple[list[Tensor | None], list[Tensor]]:
        arguments = compiled_arguments(_cast(call))
        with below_autograd():
            *outputs, c, g = _OPS.edge_message_forward(*arguments, save)
        outputs = [or_none(t) for t in (outputs if call.pair else outputs[:2])]
        return typed_outputs(call, outputs), kept_of(call, (c, g))

    def backward(
        self, call: Call, kept: Tensors, bars: Tensors, wanted: tuple[bool, bool], outputs: bool = False
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        arguments, tensors = compiled_arguments(_cast(call)), call.tensors
        p_NH, w2_MH, has_vector = arguments[0][0], arguments[1][2], or_none(arguments[1][4]) is not None
        shapes = [(p_NH.shape[0], w2_MH.shape[0]), (p_NH.shape[0], 3)] * (2 if call.pair else 1)
        full = [
            p_NH.new_zeros(shape) if bar is None else bar.to(p_NH.dtype)
            for bar, shape in zip(bars, shapes, strict=True)
        ]
        full += [ABSENT] * (4 - len(full))
        wide = [t.to(p_NH.dtype) for t in kept if t is not None]
        with below_autograd():
            result = _OPS.edge_message_backward(*arguments, wide, full, *wanted, outputs)
        num_inputs = NUM_INPUTS * (2 if call.pair else 1)
        weights = [or_none(t) for t in result[-(NUM_WEIGHTS - 1) :]]
        if has_vector and weights[5] is not None:
            weights[5] = weights[5].reshape(tensors[num_inputs + 6].shape)  # type: ignore[union-attr]
        gradients = [*map(or_none, result[:num_inputs]), None, *weights]
        gradients = [_gradient_of(t, g) for g, t in zip(gradients, tensors, strict=True)]
        found = [or_none(t) for t in result[2 * NUM_INPUTS : 2 * NUM_INPUTS + 4]]
        return typed_gradients(call, gradients), typed_outputs(call, found)


def _cast(call: Call) -> Call:
    """`widened` for calls below autograd, which hold nothing alive."""
    p_NH = call.tensors[0]
    assert p_NH is not None
    kind = edge_type(p_NH)
    if _is_of(call, kind):
        return call
    return call._replace(tensors=[None if t is None else t.to(kind) for t in call.tensors])


def kept_of(call: Call, kept: Sequence[Tensor]) -> list[Tensor]:
    """c and g as they are kept for the backward, in the type of p."""
    p_NH = call.tensors[0]
    assert p_NH is not None
    return [t.to(p_NH.dtype) for t in kept]


SERIAL = SerialRunner()


def _gradient_of(tensor: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """None of an absent tensor; the envelope of no edges looks absent to the kernels and is not."""
    if tensor is None:
        return None
    return torch.zeros_like(tensor) if tensor.numel() == 0 else gradient
