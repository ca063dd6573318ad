"""Gradients in buckets equal one process, however they are cut, and leave while the backward still runs."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from megagnn.optim.bucket_reducer import BUCKET_BYTES, Bucket, GradientReducer
from megagnn.optim.config import OptimConfig
from megagnn.optim.optimizer import make_optimizer
from megagnn.parallel import messages
from megagnn.parallel.context import ParallelContext
from tests.distributed.spawn import spawn
from tests.tolerances import PARITY

WIDTH, ROWS = 9, 8
IMPLEMENTATIONS = ("own", "torch")
BUCKETS = (1, 1000, BUCKET_BYTES)  # one parameter each, several, everything of one kind
NUM_MICRO_BATCHES = (1, 2)


class Network(nn.Module):
    """A chain; and parameters that get a gradient never, or from the first row alone."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(4)
        layers = [nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(4)]
        self.weights = [layer.get_parameter("weight") for layer in layers]
        self.layers = nn.ModuleList(layers)
        if bias:
            self.never, self.sometimes = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(WIDTH))
        self.double()

    def forward(self, x: Tensor, sometimes: bool = False) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return torch.cat([x[:1] * self.sometimes, x[1:]]) if sometimes else x


def loss_of(model: nn.Module, rows: slice, sometimes: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    data = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
    return model(data[rows], sometimes).square().sum()


def gradients(model: nn.Module) -> Tensor:
    assert all(p.grad is not None for p in model.parameters())
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def make(
    context: ParallelContext,
    implementation: Any,
    bucket_bytes: int,
    bias: bool = True,
    kind: Callable[..., GradientReducer] = GradientReducer,
) -> tuple[Network, GradientReducer]:
    model = Network(bias)
    optimizer = make_optimizer(model, OptimConfig(implementation=implementation))
    optimizer.zero_grad()
    return model, kind(model.parameters(), context, bucket_bytes, optimizer.gradient_buffers())


def step(
    model: nn.Module, reducer: GradientReducer, context: ParallelContext, num_micro_batches: int
) -> Tensor:
    """Gradients of the global loss; micro-batch m of rank r has every (ranks micro-batches)-th row."""
    stride = context.dp_size * num_micro_batches
    for micro in range(num_micro_batches):
        if micro == num_micro_batches - 1:
            reducer.start()
        first = context.dp_rank + context.dp_size * micro
        loss_of(model, slice(first, None, stride), sometimes=first == 0).backward()
    reducer.finish()
    return gradients(model)


def expected() -> Tensor:
    """One process, everything at once, by nothing but torch."""
    model = Network()
    loss_of(model, slice(None), sometimes=True).backward()
    model.never.grad = torch.zeros_like(model.never)
    return gradients(model)


class Hasty(GradientReducer):
    """The bug that is guarded against: a bucket leaves with its first gradient."""

    def _before_arrival(self, parameter: nn.Parameter, bucket: Bucket) -> Callable[[Any], None]:
        return lambda _: None

    def _arrived(self, parameter: nn.Parameter, bucket: Bucket) -> None:
        if bucket is self.buckets[min(self._next, len(self.buckets) - 1)] and bucket.pending is None:
            bucket.launch(self.context)
            assert bucket.pending is not None
            bucket.pending.wait()
            self._next += 1


def sums(context: ParallelContext) -> dict[tuple[Any, ...], Tensor]:
    """Of every implementation, size and number of micro-batches; two steps each, which must agree."""
    result = {}
    for implementation in IMPLEMENTATIONS:
        for size in BUCKETS:
            model, reducer = make(context, implementation, size)
            for number in NUM_MICRO_BATCHES:
                model.zero_grad()
                got = step(model, reducer, context, number).clone()
                model.zero_grad()
                assert torch.equal(step(model, reducer, context, number), got)
                result[implementation, size, number] = got
    return result


def hasty(context: ParallelContext) -> Tensor:
    return step(*make(context, "own", BUCKET_BYTES, kind=Hasty), context, 1)


def events(context: ParallelContext, reverse: bool) -> list[str]:
    """What happens in a step: gradients of layers, messages, the end of the backward."""
    seen: list[str] = []
    model = Network(bias=False)
    weights = model.weights[::-1] if reverse and context.dp_rank == 0 else model.weights
    for number, weight in enumerate(weights):
        weight.register_post_accumulate_grad_hook(lambda _, n=number: seen.append(f"gradient {n}"))
    reducer = GradientReducer(weights, context, bucket_bytes=1)
    start = messages.start_all_reduce

    def record(tensor: Tensor, context: ParallelContext, axis: str) -> messages.Pending:
        seen.append("message")
        return start(tensor, context, axis)

    with mock.patch.object(messages, "start_all_reduce", record):
        reducer.start()
        loss_of(model, slice(context.dp_rank, None, context.dp_size)).backward()
        seen.append("end")
        reducer.finish()
    return seen


def sum_during_the_backward(context: ParallelContext) -> tuple[Tensor, Tensor]:
    """The last layer's gradient when the first layer's is not there yet, and at the end."""
    model, reducer = make(context, "own", 1, bias=False)
    first, last, inside = model.weights[0], model.weights[3], []

    def look(*_: Any) -> None:
        assert first.grad is not None
        assert last.grad is not None
        assert not first.grad.any()
        pending = reducer.buckets[0].pending
        assert pending is not None
        pending.wait()
        inside.append(last.grad.clone())

    model.layers[1].register_full_backward_hook(look)
    reducer.start()
    loss_of(model, slice(context.dp_rank, None, context.dp_size)).backward()
    reducer.finish()
    assert last.grad is not None
    return inside[0], last.grad


def twice(context: ParallelContext, bucket_bytes: int) -> tuple[str, Tensor]:
    """The message of a second backward, and the gradients after it, which must be those of the first."""
    model, reducer = make(context, "own", bucket_bytes)
    reducer.start()
    for _ in range(2):
        rows = slice(context.dp_rank, None, context.dp_size)
        try:
            loss_of(model, rows, sometimes=context.dp_rank == 0).backward()
            message = "nothing was raised"
        except RuntimeError as error:
            message = str(error)
    reducer.finish()
    return message, gradients(model)


def sent(context: ParallelContext) -> tuple[float, int]:
    model, reducer = make(context, "torch", 1000)
    with context.traffic.measured() as traffic:
        step(model, reducer, context, 2)
    return float(traffic.total("dp")), sum(p.numel() for p in model.parameters())


def on_rank(context: ParallelContext) -> dict[str, Any]:
    return {
        "sums": sums(context),
        "hasty": hasty(context),
        "events": events(context, reverse=False),
        "crossed": events(context, reverse=True),
        "during": sum_during_the_backward(context),
        "twice": [twice(context, size) for size in BUCKETS],
        "sent": sent(context),
    }


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What each rank found; one spawn for all tests, for starting ranks is what takes time."""
    return spawn(request.param, on_rank)


def error(got: Tensor) -> float:
    want = expected()
    return ((got - want).abs().max() / want.abs().max()).item()


def test_sums_equal_one_process(ranks: list[dict[str, Any]]) -> None:
    assert len(ranks[0]["sums"]) == len(IMPLEMENTATIONS) * len(BUCKETS) * len(NUM_MICRO_BATCHES)
    for cell, got in ranks[0]["sums"].items():
        assert error(got) < PARITY, cell
        for rank in ranks:
            assert torch.equal(rank["sums"][cell], got), "ranks hold the same bits"


def test_bits_on_two_ranks_do_not_depend_on_buckets(ranks: list[dict[str, Any]]) -> None:
    for number in NUM_MICRO_BATCHES:
        results = [got for (_, _, n), got in ranks[0]["sums"].items() if n == number]
        if len(ranks) == 2:
            assert all(torch.equal(got, results[0]) for got in results)


def test_a_bucket_that_leaves_too_early_is_wrong(ranks: list[dict[str, Any]]) -> None:
    assert all(error(rank["hasty"]) > 0.1 for rank in ranks)


def test_messages_leave_during_the_backward(ranks: list[dict[str, Any]]) -> None:
    order = [f"gradient {n}" for n in (3, 2, 1, 0)]
    want = [event for gradient in order for event in (gradient, "message")] + ["end"]
    assert all(rank["events"] == want for rank in ranks)


def test_ranks_whose_gradients_come_in_another_order_send_in_one(ranks: list[dict[str, Any]]) -> None:
    """The first rank's backward meets the parameters in the order 0, 1, 2, 3: bucket 3 must leave first."""
    want = [*(f"gradient {n}" for n in range(4)), *["message"] * 4, "end"]
    assert ranks[0]["crossed"] == want
    assert all(rank["crossed"] == ranks[0]["events"] for rank in ranks[1:])


def test_a_sum_is_complete_before_the_backward_ends(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        inside, end = rank["during"]
        assert end.any()
        assert torch.equal(inside, end)


def test_a_second_backward_is_refused_and_does_no_harm(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for message, got in rank["twice"]:
            assert "arrived twice since start()" in message
            assert "only one backward, the last of a step" in message
            assert error(got) < PARITY


def test_every_gradient_is_sent_once(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        elements, numel = rank["sent"]
        assert elements == pytest.approx(2 * (len(ranks) - 1) / len(ranks) * numel)
