"""The stages of the blockwise edge operation: as one rank, and with the channels divided over several."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from megagnn.models.egnn.edge import EdgeSpec, EdgeWeights, edge_message, edge_message_pair
from megagnn.models.egnn.edge.stages import (
    BlockStages,
    EdgeGradients,
    StageBlock,
    forward_block,
    interleave,
)
from megagnn.ops import extension
from tests.models.egnn.edge_cases import (
    Case,
    Widths,
    largest_error,
    present,
    random_case,
    random_graph,
    tangents_of,
)
from tests.models.egnn.stage_runs import CallableLinks, run_backward, run_forward
from tests.tolerances import RELATIVE, assert_close

pytestmark = pytest.mark.skipif(not extension.has_cpu, reason="the stages are compiled")

SPEC = EdgeSpec(block_edges=16, bounded=True)
WIDTHS = Widths(R=5, H=8, M=12, K=16)
# Another order of sums over the edges and over the channels than that of the fused operation.
CLOSE = 10 * RELATIVE[torch.float64]


class Call:
    """A case, its tangents if it is of pairs, and cotangents of the outputs."""

    def __init__(self, case: Case, pair: bool, spec: EdgeSpec = SPEC) -> None:
        self.case, self.spec = case, spec
        self.tangents = tangents_of(case) if pair else None
        generator = torch.Generator().manual_seed(11)
        sizes = [case.weights.w2_MH.shape[0], 3 if case.weights.w3_KM is not None else None]
        num_atoms = case.inputs[0].shape[0]
        self.bars = [
            None if n is None else torch.randn(num_atoms, n, generator=generator, dtype=torch.float64)
            for n in sizes * (2 if pair else 1)
        ]

    def fused(self) -> list[Tensor]:
        """Outputs and gradients of the operation in one piece."""
        case = self.case.leaves()
        tangents: Any = None
        if self.tangents is not None:
            tangents = tuple(None if t is None else t.clone().requires_grad_() for t in self.tangents)
            outputs = present(edge_message_pair(case.inputs, tangents, case.weights, case.graph, self.spec))
        else:
            outputs = present(edge_message(*case.inputs, case.weights, case.graph, self.spec))
        leaves = [*present(case.inputs), *present(tangents or ()), *present(case.weights[1:])]
        gradients = torch.autograd.grad(outputs, leaves, present(self.bars))
        return [*[t.detach() for t in outputs], *gradients]

    def stages(self, save: bool = False, rank: int = 0, tp: int = 1) -> BlockStages:
        """Of the channels of one rank."""
        case = self.case
        columns = [True, True, False, False]
        values: Any = [_part(t, 1, rank, tp) if c else t for t, c in zip(case.inputs, columns, strict=True)]
        tangents: Any = self.tangents and [
            _part(t, 1, rank, tp) if c else t for t, c in zip(self.tangents, columns, strict=True)
        ]
        dims = (None, 0, 1, 0, 1, 0, 0, None)
        weights = [t if d is None else _part(t, d, rank, tp) for t, d in zip(case.weights, dims, strict=True)]
        return BlockStages(
            tuple(values),
            EdgeWeights(*weights),  # type: ignore[arg-type]
            case.graph,
            self.spec,
            tangents and tuple(tangents),
            save,
        )


def _part(tensor: Tensor | None, dim: int, rank: int, tp: int) -> Tensor | None:
    return None if tensor is None else tensor.chunk(tp, dim)[rank].contiguous()


def flat(outputs: Sequence[Tensor | None], gradients: EdgeGradients) -> list[Tensor]:
    """In the order of `Call.fused`."""
    return present([*outputs, *gradients.values, *gradients.tangents, *gradients.weights])


class Ranks:
    """Ranks as threads; their collectives meet at a barrier."""

    def __init__(self, tp: int) -> None:
        self.tp = tp
        self._slots: list[Any] = [None] * tp
        self._barrier = threading.Barrier(tp, timeout=60)

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        """The function's result of each rank; an error of one ends all."""

        def guarded(rank: int) -> Any:
            try:
                return function(rank)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.tp) as pool:
            return list(pool.map(guarded, range(self.tp)))

    def all_gather(self, rank: int, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor."""
        self._slots[rank] = tensor.clone()
        self._barrier.wait()
        found = list(self._slots)
        self._barrier.wait()
        return found

    def collectives(self, rank: int) -> dict[str, Callable[..., Tensor]]:
        """What the drivers need of this rank."""

        def product(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
            whole = torch.stack(self.all_gather(rank, x @ y)).sum(0)
            return out.copy_(whole.chunk(self.tp, 1)[rank])

        return {
            "product": product,
            "reduce_scalar": lambda w: torch.stack(self.all_gather(rank, w)).sum(0),
            "gather": lambda bar: torch.cat(self.all_gather(rank, bar), 1),
        }


def split(
    call: Call, tp: int, save: bool = False, all_first: bool = False, change: dict[str, Any] | None = None
) -> list[Tensor]:
    """Outputs and gradients by `tp` ranks, put together, in the order of `Call.fused`."""
    ranks = Ranks(tp)

    def work(rank: int) -> tuple[Any, EdgeGradients]:
        stages = call.stages(save, rank, tp)
        calls = {**ranks.collectives(rank), **(change or {})}
        bars = [_part(bar, 1, rank, tp) if k % 2 == 0 else bar for k, bar in enumerate(call.bars)]
        outputs = run_forward(stages, calls["product"], calls["reduce_scalar"])
        return outputs, run_backward(stages, bars, **calls, first=all_first or rank == 0)

    results = ranks.run(work)

    def joined(tensors: Sequence[Tensor | None], how: int | str) -> Tensor | None:
        if tensors[0] is None:
            return None
        found = present(tensors)
        if how == "sum":
            return torch.stack(found).sum(0)
        if how == "same":
            assert all(torch.equal(found[0], t) for t in found)
            return found[0]
        assert isinstance(how, int)
        return torch.cat(found, how)

    def columns(
        of: Callable[[Any], Sequence[Tensor | None]], hows: Sequence[int | str]
    ) -> list[Tensor | None]:
        rows = zip(*[of(result) for result in results], strict=True)
        return [joined(tensors, how) for tensors, how in zip(rows, hows, strict=True)]

    inputs = (1, 1, "sum", "sum")
    return present(
        [
            *columns(lambda result: result[0], (1, "same") * (len(call.bars) // 2)),
            *columns(lambda result: result[1].values, inputs),
            *columns(lambda result: result[1].tangents, inputs),
            *columns(lambda result: result[1].weights, ("same", 0, 1, 0, 1, 0, 0, "same")),
        ]
    )


CASES: list[tuple[dict[str, Any], bool]] = [
    ({}, True),
    ({"envelope": False, "bias": False}, True),
    ({"vector": False}, True),
    ({"feature": "squared"}, False),
]


@pytest.mark.parametrize(("options", "bounded"), CASES)
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("save", [False, True])
def test_stages_make_the_fused_operation(
    options: dict[str, Any], bounded: bool, pair: bool, save: bool
) -> None:
    spec = EdgeSpec(block_edges=16, bounded=bounded, feature=options.get("feature", "bessel"))
    call = Call(random_case(widths=WIDTHS, **options), pair, spec)
    stages = call.stages(save)
    assert stages.num_blocks > 5
    got = flat(run_forward(stages), run_backward(stages, call.bars))
    assert largest_error(got, call.fused()) < CLOSE


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("save", [False, True])
def test_channels_divided_over_ranks(tp: int, pair: bool, save: bool) -> None:
    """What the stages are for: the same outputs and gradients, with sums over ranks between the stages."""
    call = Call(random_case(widths=WIDTHS), pair)
    assert largest_error(split(call, tp, save), call.fused()) < CLOSE


@pytest.mark.parametrize("options", [{"vector": False}, {"envelope": False, "bias": False}])
def test_absent_parts_divided_over_ranks(options: dict[str, Any]) -> None:
    call = Call(random_case(widths=WIDTHS, **options), True)
    assert largest_error(split(call, 2), call.fused()) < CLOSE


def test_mistakes_in_the_collectives_are_seen() -> None:
    """The scalar not summed before tanh; what all ranks know counted by all; a cotangent not gathered."""
    call = Call(random_case(widths=WIDTHS), False)
    want = call.fused()
    vec, r_bar, f_bar = 1, 4, 5

    unsummed = _with_own_scalar(call, 2)
    assert largest_error([unsummed[0]], [want[0]]) < CLOSE
    assert largest_error([unsummed[vec]], [want[vec]]) > 1e-2

    counted_twice = split(call, 2, all_first=True)
    for k, (got, right) in enumerate(zip(counted_twice, want, strict=True)):
        assert (largest_error([got], [right]) > 1e-2) == (k in (r_bar, f_bar))

    own_half = {"gather": lambda bar: torch.cat([bar, torch.zeros_like(bar)], 1)}
    assert largest_error(split(call, 2, change=own_half)[2:], want[2:]) > 1e-2


def _with_own_scalar(call: Call, tp: int) -> list[Tensor]:
    """sum, and vec of the ranks added up, where each takes tanh of its own part."""
    ranks = Ranks(tp)

    def work(rank: int) -> Any:
        return run_forward(call.stages(rank=rank, tp=tp), ranks.collectives(rank)["product"])

    results = ranks.run(work)
    return [torch.cat([r[0] for r in results], 1), torch.stack([r[1] for r in results]).sum(0)]


def test_two_blocks_under_way() -> None:
    """The collective of one block may run while the next block is computed: each has its own scratch."""
    call = Call(random_case(widths=WIDTHS), False)
    stages = call.stages()
    sum_NM, vec_N3 = stages.start_forward()

    def product(k: int) -> Tensor:
        block = stages.block(k, memory=k % 2)
        return torch.mm(stages.before(block), stages.w2_MH.t(), out=stages.buffer(block, "c"))

    c = product(0)
    for k in range(stages.num_blocks):
        following = product(k + 1) if k + 1 < stages.num_blocks else c
        block = stages.block(k, memory=k % 2)
        g = torch.mm(stages.message(block, c), stages.w3_KM.t())
        stages.vector(block, stages.scalar(block, g))
        c = following
    assert largest_error(present([sum_NM, vec_N3]), call.fused()[:2]) < CLOSE


def test_gradients_that_nobody_wants_are_left_out() -> None:
    call = Call(random_case(widths=WIDTHS), False)
    stages, want = call.stages(), call.fused()
    forces = run_backward(stages, call.bars, weights=False)
    assert present(forces.weights) == []
    assert largest_error(present(forces.values), want[2:6]) < CLOSE
    without = run_backward(stages, call.bars, geometry=False)
    assert without.values[2:] == (None, None)
    assert largest_error(present(without.weights), want[6:]) < CLOSE


def test_absent_cotangents_are_zeros() -> None:
    call = Call(random_case(widths=WIDTHS), False)
    stages = call.stages()
    whole = run_backward(stages, call.bars)
    parts = [run_backward(stages, [call.bars[0]]), run_backward(stages, [None, call.bars[1]])]
    for both, first, second in zip(*(present(g.values) for g in (whole, *parts)), strict=True):
        assert_close(first + second, both, CLOSE)


def test_no_edges() -> None:
    call = Call(random_case(random_graph(5, 0), WIDTHS), True)
    stages = call.stages(save=True)
    assert stages.num_blocks == 0
    gradients = run_backward(stages, call.bars)
    assert all(not t.any() for t in present([*run_forward(stages), *gradients.values, *gradients.weights]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_types(dtype: torch.dtype) -> None:
    case = random_case(widths=WIDTHS).to(dtype)
    outputs = run_forward(BlockStages(case.inputs, case.weights, case.graph, SPEC))
    for got, want in zip(outputs, edge_message(*case.inputs, case.weights, case.graph, SPEC), strict=True):
        assert got is not None
        assert want is not None
        assert got.dtype == dtype
        assert_close(got, want, 10 * RELATIVE[dtype])


def test_misuse() -> None:
    case = random_case(widths=WIDTHS)
    stages = BlockStages(case.inputs, case.weights, case.graph, SPEC)
    block = stages.block(0)
    rows = block.end - block.begin
    stages.start_forward()
    c = torch.zeros(rows, WIDTHS.M, dtype=torch.float64)
    stages.message(block, c)
    with pytest.raises(RuntimeError, match=rf"edge_stage \(compiled\): c must have shape \({rows}, 12\)"):
        stages.message(block, c[1:])
    with pytest.raises(RuntimeError, match=r"c must have shape .* got .* Float"):
        stages.message(block, c.float())
    with pytest.raises(RuntimeError, match="c must be contiguous and on the device of p"):
        stages.message(block, torch.zeros(WIDTHS.M, rows, dtype=torch.float64).t())
    with pytest.raises(RuntimeError, match="c must be given to this stage, got none"):
        stages.message(block, torch.empty(0))
    with pytest.raises(RuntimeError, match=r"the block must lie in \[0, \d+\), got 99"):
        stages.message(StageBlock(99, 0, rows), c)
    with pytest.raises(RuntimeError, match="sum_bar must be given to this stage, got none"):
        stages.message_backward(block)
    half: Any = tuple(t.bfloat16() for t in case.present_inputs())
    with pytest.raises(ValueError, match=r"BlockStages \(compiled\): p must be float32 or float64"):
        BlockStages(half, case.weights, case.graph, SPEC)


def test_a_stage_of_the_vector_branch_without_one() -> None:
    case = random_case(widths=WIDTHS, vector=False)
    stages = BlockStages(case.inputs, case.weights, case.graph, SPEC)
    block = stages.block(0)
    with pytest.raises(RuntimeError, match="this stage must have a vector branch, got no b3"):
        stages.scalar(block, torch.zeros(block.end - block.begin, 1, dtype=torch.float64))


class RecordedLinks(CallableLinks):
    """Links that say when a message starts and when somebody waits for it."""

    def __init__(self, events: list[str]) -> None:
        super().__init__(torch.mm, lambda w: w, lambda bar: bar)
        self.events, self.count = events, 0

    def product(self, x: Tensor, y: Tensor, out: Tensor) -> Any:
        number, self.count = self.count, self.count + 1
        self.events.append(f"start {number}")
        result, events = torch.mm(x, y, out=out), self.events

        class Message:
            def wait(self) -> Tensor:
                events.append(f"wait {number}")
                return result

        return Message()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_messages_travel_while_the_next_block_computes(depth: int) -> None:
    """With several blocks under way a block's message has left before the one before it is waited for."""
    call = Call(random_case(widths=WIDTHS, vector=False), False)
    stages, events = call.stages(), list[str]()
    links = RecordedLinks(events)
    outputs = stages.start_forward()
    interleave(stages, lambda block: forward_block(stages, block, links), depth)
    assert largest_error(present(outputs), call.fused()[:1]) < CLOSE
    under_way = [events.index(f"start {k + depth - 1}") < events.index(f"wait {k}") for k in range(3)]
    assert all(under_way)
    assert events.index(f"start {depth}") > events.index("wait 0"), "no more than that many at a time"


def test_autograd_sees_none_of_the_tensors() -> None:
    """Leaves that want gradients give the same as tensors that do not, and no graph."""
    case = random_case(random_graph(6, 20))
    leaves = case.leaves()
    wanted = run_forward(BlockStages(case.inputs, case.weights, case.graph, SPEC))
    got = run_forward(BlockStages(leaves.inputs, leaves.weights, case.graph, SPEC))
    for x, y in zip(got, wanted, strict=True):
        assert x is None or (torch.equal(x, y) and not x.requires_grad)
