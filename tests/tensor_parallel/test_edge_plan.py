"""The rows plan: a function of edges that no family knows, on ranks, equals one process; its pairs, too."""

from typing import Any

import torch
from torch import Tensor

from megagnn.ops import gather, segment_sum
from megagnn.ops.dual import Dual
from megagnn.ops.lift import lift
from megagnn.parallel import collectives
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.row_collectives import Rows
from megagnn.tensor_parallel.edge_plan import by_rows, edge_rows
from tests.distributed.parity import batch_of
from tests.distributed.spawn import spawn
from tests.tolerances import PARITY

F, HIDDEN = 8, 6


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sums(batch: dict[str, Tensor], context: ParallelContext, inputs: list[Any], weights: list[Tensor]) -> Any:
    """Sums of softmax_channels(h_i + W h_j tanh(r . b)) and of a vector of two numbers, over neighbours."""
    part = edge_rows(batch, context)

    def function(h_i: Tensor, h_j: Tensor, w_FF: Tensor, b_F: Tensor) -> tuple[Tensor, Tensor, None]:
        sender_EF = gather(h_j, part.source) @ w_FF.t()
        r_EF = torch.tanh(inputs_r[part.edges] * b_F)
        m_EF = torch.softmax(gather(h_i, part.destination) + sender_EF * r_EF, -1)
        return (
            segment_sum(m_EF, part.destination),
            segment_sum(m_EF[:, :2].contiguous(), part.destination),
            None,
        )

    inputs_r = numbers(5, len(batch["edge_index"][0]), 1)
    divided = [(weights[0], -1), (weights[1], None)]

    def run(h_i: Tensor, h_j: Tensor) -> Any:
        return tuple(by_rows(function, part.rows, [h_i], [h_j], divided, replicated={1}))

    return lift(run)(*inputs)


def measured(context: ParallelContext, share: tuple[int, ...], dual: bool) -> list[Tensor]:
    """Results and gradients of inputs and weights, whole."""
    batch = batch_of(share)
    num_atoms, rank, ranks = len(batch["atomic_numbers"]), context.tp_rank, context.tp_size
    own = slice(rank * F // ranks, (rank + 1) * F // ranks)
    planes = [numbers(k, num_atoms, F)[:, own].requires_grad_() for k in range(4)]
    weights = [numbers(7, F, F)[:, own].requires_grad_(), numbers(8, F).requires_grad_()]
    inputs = [Dual(*planes[:2]), Dual(*planes[2:])] if dual else planes[::2]
    features, narrow, nothing = sums(batch, context, inputs, weights)
    assert nothing is None
    found = [features.value, features.tangent, narrow.value, narrow.tangent] if dual else [features, narrow]
    leaves = [*(planes if dual else planes[::2]), *weights]
    widths = [F] * (len(found) // 2) + [2] * (len(found) // 2)
    bars = [numbers(11 + k, num_atoms, width) for k, width in enumerate(widths)]
    loss = sum((x * b[:, own] if b.shape[1] == F else x * b).sum() for x, b in zip(found, bars, strict=True))
    gradients = torch.autograd.grad(loss, leaves)  # type: ignore[arg-type]
    whole = [collectives.gather(x, -1, context) for x in found[: len(found) // 2]] + found[len(found) // 2 :]
    whole += [collectives.gather(g, -1, context) for g in gradients[:-1]]
    return [x.detach() for x in [*whole, gradients[-1]]]


def both(context: ParallelContext) -> list[Tensor]:
    """Of values and of pairs, for structures of every kind."""
    return [x for dual in (False, True) for x in measured(context, (0, 1, 2, 3, 4, 5), dual)]


def test_two_ranks_equal_one_process() -> None:
    """Of values and of pairs: results and the gradients of every input and weight."""
    want = both(ParallelContext())
    for got in spawn(2, both, tp=2):
        for g, w in zip(got, want, strict=True):
            assert (g - w).abs().max() <= PARITY * w.abs().max()
            assert w.abs().max() > 0


def test_the_edges_of_all_ranks_are_those_of_the_batch() -> None:
    batch = batch_of((0, 1, 2))
    found = [edge_rows(batch, ParallelContext(tp_size=3, tp_rank=rank)) for rank in range(3)]
    assert [part.edges.stop for part in found[:-1]] == [part.edges.start for part in found[1:]]
    assert found[-1].edges.stop == batch["edge_index"].shape[1]
    for part in found:
        part.destination.validate()
        part.source.validate()
        receivers = part.destination.index + part.rows.own.start
        assert torch.equal(torch.stack((receivers, part.source.index)), batch["edge_index"][:, part.edges])


def test_one_rank_sends_nothing() -> None:
    rows = Rows((0, 4), ParallelContext())
    ones = [torch.ones(4, 2)]
    (found,) = by_rows(lambda h_i, h_j, w: [h_i + h_j @ w], rows, ones, ones, [(torch.eye(2), 0)])
    assert torch.equal(found, torch.full((4, 2), 2.0))
