"""The blockwise edge operation in single stages, with the matrix products, and so collectives, between them.

`edge_message` runs a block through all stages at once. Where the channels are divided over ranks, the sums
over channels must be completed between the stages; `BlockStages` runs each stage by itself, on one block:

    before   z = act(p_i + q_j + W1c rho(d))                   (rows, H)
    product  c = z W2^T                  partial over H        (rows, M)   reduce-scatter of channels
    message  m = act(c + b2); sum_i += f m                     (rows, M)
    product  g = m W3^T                  partial over M        (rows, K)   reduce-scatter of channels
    scalar   w = w4 . act(g + b3)        partial over K        (count)     all-reduce
    vector   vec_i += f tanh(w + b4) t(d) r

rows are the block's edges, of a pair those of the tangents below those of the values. The backward makes or
reads the stages again and returns by vector_backward (g_bar), message_backward (c_bar), before_backward; the
product of each gathers the channels of its cotangent (all-gather) and needs no sum.

[Note: shards] Of tp ranks each holds p (N, H/tp), q, w1c (H/tp, R), w2 (M, H/tp), b2 (M/tp), w3 (K, M/tp),
b3 (K/tp), w4 (K/tp), and the whole of r, f, b4, the centres and the graph. All must cut the same blocks: give
`spec.block_edges`. Then `sum` is (N, M/tp), and `vec` whole on every rank. Gradients of p, q and the divided
weights are those of the shard; that of b4 is whole on every rank; those of r and f are partial, to be summed
over ranks at the end. What vec gives to r and f is whole on every rank: one rank alone adds it (`first`).
"""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megagnn.models.egnn.edge.runner import Call, compiled_arguments, has_kernels, widened
from megagnn.models.egnn.edge.types import EdgeGraph, EdgeSpec, EdgeWeights

# As the enumerations of csrc/edge_stage.cpp.
_STAGES = ["radial", "before", "message", "scalar", "vector"]
_STAGES += [f"{stage}_backward" for stage in ("vector", "message", "before", "radial")]
_BUFFERS = ["d", "d_bar", "w", "w_bar", "rho", "rho_bar", "a", "z", "a_slope", "z_bar"]
_BUFFERS += ["c", "m", "c_slope", "m_bar", "g", "u", "g_bar"]
_OUTPUTS = ["sum", "vec", "sum_tangent", "vec_tangent"]
_INPUT_BARS = [f"{tangent}{name}_bar" for tangent in ("", "tangent_") for name in "pqrf"]
_RESULTS = [*_INPUT_BARS, *_OUTPUTS, "b2_bar", "b3_bar", "w4_bar", "b4_bar"]
_WEIGHT_BARS = [field.split("_")[0] + "_bar" for field in EdgeWeights._fields]
# Slopes take the place of what they are made of, or of nothing where that is kept.
_IN_PLACE = {"a_slope": "a", "c_slope": "c", "g_bar": "g"}

Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]


class StageBlock(NamedTuple):
    """One block on its way through the stages. Blocks of different `memory` may be under way together."""

    number: int
    begin: int
    end: int
    memory: int = 0


class EdgeGradients(NamedTuple):
    """Gradients of (p, q, r, f), of their tangents (None each without), and of the weights (no centres)."""

    values: tuple[Tensor | None, ...]
    tangents: tuple[Tensor | None, ...]
    weights: EdgeWeights


class BlockStages:
    """Stages of one call of the operation on this rank's channels; see the module for their order.

    For values, or for pairs of value and tangent. The forward's stages follow `start_forward`, the backward's
    `start_backward`; autograd sees none of them.

    Args:
        values: p (N, H), q (N, H), r (E, 3) in Å, f (E) or None.
        weights: see [Note: shards].
        tangents: of the values, for pairs.
        save: keep c and g of all edges for the backward (`spec.memory` is not read).
        kept: those of an earlier call, `kept_tensors`, to be read.

    Raises:
        RuntimeError: shapes or types that do not fit, with the names.
        ValueError: edges not sorted by destination; p or q without one row per atom; no kernels for them.
    """

    def __init__(
        self,
        values: Inputs,
        weights: EdgeWeights,
        graph: EdgeGraph,
        spec: EdgeSpec,
        tangents: Inputs | None = None,
        save: bool = False,
        kept: Sequence[Tensor] = (),
    ) -> None:
        if not has_kernels(values[0]) or values[0].dtype not in (torch.float32, torch.float64):
            raise ValueError(
                "BlockStages (compiled): p must be float32 or float64 where the kernels are built, got "
                f"{values[0].dtype} on {values[0].device}; use edge_reference.edge_message"
            )
        self.planes, self.save = 1 if tangents is None else 2, save or bool(kept)
        self._inputs, self._weights = (*values, *(tangents or ())), weights
        call = Call(graph, spec, self.planes == 2, (*self._inputs, *weights))
        inputs, lists, graph_lists, *numbers = compiled_arguments(widened(call))
        self.w1c_HR, self.w2_MH, self.w3_KM = lists[1], lists[2], lists[4]
        self.has_vector = weights.w3_KM is not None
        self._none = none = torch.empty(0)
        without_products = [none if k in (2, 4) else t.contiguous() for k, t in enumerate(lists)]
        self._lists = ([t.contiguous() for t in inputs], without_products, graph_lists, *numbers)
        radial, hidden, message, vector = lists[1].shape[1], lists[1].shape[0], len(lists[3]), len(lists[5])
        self._widths = dict.fromkeys(("rho", "rho_bar"), radial) | dict.fromkeys(("a", "z", "z_bar"), hidden)
        self._widths |= dict.fromkeys(("c", "m", "m_bar"), message) | dict.fromkeys(("g", "u"), vector)
        self._like = values[0].detach()
        self.dtype = self._like.dtype
        self._blocks = graph_lists[3].view(-1, 4)[:, :2].tolist()
        self.num_blocks = len(self._blocks)
        self._longest = max((end - begin for begin, end in self._blocks), default=0)
        self._memory: dict[tuple[int, str], Tensor] = {}
        self._views: dict[tuple[int, str, int], Tensor] = {}  # of a block of so many edges
        self._results: dict[str, Tensor] = {}
        self._bars = [none] * 4
        rows, names = self.planes * len(values[2]), ("c", "g") if self.has_vector else ("c",)
        self._kept = {k: self._like.new_empty(rows, self._widths[k]) for k in names if save and not kept}
        self._kept |= dict(zip(names, kept, strict=False))

    def block(self, index: int, memory: int = 0) -> StageBlock:
        """Block `index`, in scratch number `memory`, whose earlier block is lost."""
        begin, end = self._blocks[index]
        return StageBlock(index, begin, end, memory)

    def buffer(self, block: StageBlock, name: str) -> Tensor:
        """The block's c or g, (rows, width), for a product to write to; kept where `save`."""
        if name not in self._kept:
            return self._scratch(block, name)
        return self._kept[name][self.planes * block.begin : self.planes * block.end]

    def kept_tensors(self) -> list[Tensor]:
        """c and g of all edges, empty ones where nothing is kept or there is no vector branch."""
        return [self._kept.get(name, self._like.new_empty(0)) for name in ("c", "g")]

    def _scratch(self, block: StageBlock, name: str) -> Tensor:
        count, width = block.end - block.begin, self._widths.get(name)
        key, view_key = (block.memory, name), (block.memory, name, count)
        if view_key not in self._views:
            if key not in self._memory:
                self._memory[key] = self._like.new_empty(self.planes * self._longest * (width or 1))
            shape = (self.planes, count) if width is None else (self.planes * count, width)
            self._views[view_key] = self._memory[key][: shape[0] * shape[1]].view(shape)
        return self._views[view_key]

    def _run(
        self,
        stage: str,
        block: StageBlock,
        *scratch: str,
        without: Sequence[str] = (),
        **given: Tensor,
    ) -> None:
        buffers = {name: self._scratch(block, _IN_PLACE.get(name, name)) for name in scratch} | given
        results = {name: t for name, t in self._results.items() if name not in without}
        torch.ops.megagnn.edge_stage(
            _STAGES.index(stage),
            *self._lists,
            [buffers.get(name, self._none) for name in _BUFFERS],
            [results.get(name, self._none) for name in _RESULTS],
            self._bars,
            block.number,
        )

    def start_forward(self) -> tuple[Tensor | None, ...]:
        """Zeros that the stages add to: sum (N, M) and vec (N, 3) or None; of pairs also their tangents."""
        widths = {"sum": self._widths["c"]} | ({"vec": 3} if self.has_vector else {})
        names = _OUTPUTS[: 2 * self.planes]
        self._results = {
            k: self._like.new_zeros(len(self._like), w) for k in names if (w := widths.get(k[:3]))
        }
        return tuple(self._results.get(name) for name in names)

    def before(self, block: StageBlock, backward: bool = False) -> Tensor:
        """z, (rows, H); `backward` also makes the slopes, which its stages read."""
        self._run("radial", block, "d", "rho")
        a = self._scratch(block, "a")
        torch.mm(self._scratch(block, "rho"), self.w1c_HR.t(), out=a)
        self._run("before", block, "z", *["a_slope"] * backward, a=a)
        return self._scratch(block, "z")

    def message(self, block: StageBlock, c: Tensor, backward: bool = False) -> Tensor:
        """m, (rows, M), of the whole sum c; in the forward adds to `sum`."""
        self._run("message", block, "m", *["c_slope"] * backward, c=c)
        return self._scratch(block, "m")

    def scalar(self, block: StageBlock, g: Tensor, backward: bool = False) -> Tensor:
        """w, (planes, count), of the whole sum g: the part of these channels, without b4."""
        self._run("scalar", block, "w", *["u", "g_bar"] * backward, g=g)
        return self._scratch(block, "w")

    def vector(self, block: StageBlock, w: Tensor) -> None:
        """Adds to `vec`; w must be the sum over all channels."""
        self._run("vector", block, "d", w=w)

    def start_backward(
        self, bars: Sequence[Tensor | None], geometry: bool = True, weights: bool = True
    ) -> EdgeGradients:
        """Zeros that the stages add to: of r and f with `geometry` alone, of weights with `weights` alone.

        bars: cotangents of the outputs, None for zeros.
        """
        wanted = dict(zip(_INPUT_BARS, self._inputs, strict=False))
        if not geometry:
            wanted = {k: t for k, t in wanted.items() if k.endswith(("p_bar", "q_bar"))}
        if weights:
            wanted |= dict(zip(_WEIGHT_BARS[1:], self._weights[1:], strict=True))
        gradients = {k: self._like.new_zeros(t.shape) for k, t in wanted.items() if t is not None}
        self._results = {k: t.view(-1) if k == "w4_bar" else t for k, t in gradients.items()}
        self._bars = [
            self._like.new_zeros(len(self._like), width) if bar is None else bar.detach().contiguous()
            for bar, width in zip(
                (*bars, *(None,) * (4 - len(bars))), (self._widths["c"], 3) * 2, strict=True
            )
        ]
        of = [gradients.get(name) for name in (*_INPUT_BARS, *_WEIGHT_BARS)]
        return EdgeGradients(tuple(of[:4]), tuple(of[4:8]), EdgeWeights(*of[8:]))  # type: ignore[arg-type]

    def vector_backward(self, block: StageBlock, w: Tensor, first: bool = True) -> Tensor:
        """g_bar, (rows, K); w is the sum over all channels, `first` as in [Note: shards]."""
        self._scratch(block, "d_bar").zero_()
        without = [] if first else _INPUT_BARS
        self._run("vector_backward", block, "d", "d_bar", "w_bar", "u", "g_bar", w=w, without=without)
        return self._scratch(block, "g")

    def back_product(self, block: StageBlock, name: str, y_bar: Tensor, x: Tensor) -> None:
        """Gradients of y = x W^T, W being w2 or w3: x_bar for the next stage, and W_bar."""
        w, x_bar = (self.w2_MH, "z_bar") if name == "w2" else (self.w3_KM, "m_bar")
        if (w_bar := self._results.get(name + "_bar")) is not None:
            w_bar.addmm_(y_bar.t(), x)
        torch.mm(y_bar, w, out=self._scratch(block, x_bar))

    def message_backward(self, block: StageBlock) -> Tensor:
        """c_bar, (rows, M), of sum_bar and of the m_bar of `back_product`."""
        self._run("message_backward", block, "m", "c_slope", "m_bar")
        return self._scratch(block, "m_bar")

    def before_backward(self, block: StageBlock) -> None:
        """Adds to the gradients of p, q, w1c and, by the distance, r, from the z_bar of `back_product`."""
        self._run("before_backward", block, "a_slope", "z_bar")
        a_bar = self._scratch(block, "z_bar")
        if (w1c_bar := self._results.get("w1c_bar")) is not None:
            w1c_bar.addmm_(a_bar.t(), self._scratch(block, "rho"))
        if "r_bar" not in self._results:
            return
        if not self.has_vector:
            self._scratch(block, "d_bar").zero_()
        torch.mm(a_bar, self.w1c_HR, out=self._scratch(block, "rho_bar"))
        self._run("radial_backward", block, "d", "d_bar", "rho_bar")


class Awaited(Protocol):
    """A result under way, such as that of a collective."""

    def wait(self) -> Tensor:
        """The result, when it is there."""


class Links(Protocol):
    """Collectives between the stages of a block; each call starts one."""

    def product(self, x: Tensor, y: Tensor, out: Tensor) -> Awaited:
        """x y written to out; over ranks, x y summed and scattered by columns."""

    def reduce_scalar(self, w: Tensor) -> Awaited:
        """w (planes, count) summed over ranks."""

    def gather(self, bar: Tensor) -> Awaited:
        """A cotangent (rows, width / tp) to that of all channels, (rows, width)."""


Steps = Generator[Awaited, Tensor, None]
"""A block on its way through the stages, which yields what it waits for."""


def forward_block(stages: BlockStages, block: StageBlock, links: Links) -> Steps:
    """The forward of one block, in the order of csrc/edge_driver.h."""
    z = stages.before(block)
    m = stages.message(block, (yield links.product(z, stages.w2_MH.t(), stages.buffer(block, "c"))))
    if stages.has_vector:
        g = yield links.product(m, stages.w3_KM.t(), stages.buffer(block, "g"))
        stages.vector(block, (yield links.reduce_scalar(stages.scalar(block, g))))


def backward_block(stages: BlockStages, block: StageBlock, links: Links, first: bool) -> Steps:
    """The backward of one block. Kept pre-activations are read, others recomputed."""
    saved = stages.save
    z = stages.before(block, backward=True)
    c = stages.buffer(block, "c")
    m = stages.message(block, c if saved else (yield links.product(z, stages.w2_MH.t(), c)), backward=True)
    if stages.has_vector:
        g = stages.buffer(block, "g")
        g = g if saved else (yield links.product(m, stages.w3_KM.t(), g))
        w = yield links.reduce_scalar(stages.scalar(block, g, backward=True))
        stages.back_product(block, "w3", (yield links.gather(stages.vector_backward(block, w, first))), m)
    stages.back_product(block, "w2", (yield links.gather(stages.message_backward(block))), z)
    stages.before_backward(block)


def interleave(stages: BlockStages, steps: Callable[[StageBlock], Steps], depth: int = 1) -> None:
    """Run all blocks, up to `depth` of them under way: while one waits, the next computes.

    The order is a function of the number of blocks alone, so that ranks start their collectives alike.
    """
    under_way: deque[tuple[Steps, Awaited]] = deque()
    following = iter(range(stages.num_blocks))

    def begin() -> None:
        for number in following:  # the next one that waits for anything
            block = steps(stages.block(number, memory=number % depth))
            try:
                under_way.append((block, next(block)))
                return
            except StopIteration:
                continue

    for _ in range(depth):
        begin()
    while under_way:
        block, awaited = under_way.popleft()
        try:
            under_way.append((block, block.send(awaited.wait())))
        except StopIteration:
            begin()
