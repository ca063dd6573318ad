"""Gradient buckets in one process: where they are cut, and what happens on one data-parallel rank."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megagnn.optim.adamw import FlatAdamW
from megagnn.optim.bucket_reducer import BUCKET_BYTES, Bucket, GradientReducer, cut_buckets
from megagnn.parallel.context import ParallelContext
from tests.optim.test_adamw import groups


def make_parameters() -> dict[str, nn.Parameter]:
    """Two layers of a matrix (24 float64, three times 64 bytes) and a vector (3, padded to 8)."""
    shapes = {"w0": (4, 6), "b0": (3,), "w1": (6, 4), "b1": (3,)}
    return {n: nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for n, shape in shapes.items()}


def names(buckets: list[Bucket], parameters: dict[str, nn.Parameter]) -> list[list[str]]:
    name_of = {p: name for name, p in parameters.items()}
    return [[name_of[p] for p in bucket.parameters] for bucket in buckets]


@pytest.mark.parametrize(
    ("bucket_bytes", "expected"),
    [
        (1, [["b1"], ["w1"], ["b0"], ["w0"]]),
        (27 * 8, [["b1", "w1"], ["b0", "w0"]]),
        (27 * 8 - 1, [["b1"], ["w1"], ["b0"], ["w0"]]),
        (BUCKET_BYTES, [["b1", "w1", "b0", "w0"]]),
    ],
)
def test_packed_buckets_follow_the_backward(bucket_bytes: int, expected: list[list[str]]) -> None:
    parameters = make_parameters()
    buckets = cut_buckets(list(parameters.values()), bucket_bytes)
    assert names(buckets, parameters) == expected
    assert sum(bucket.num_bytes for bucket in buckets) == 54 * 8
    for bucket in buckets:
        message = torch.zeros(bucket.end - bucket.begin)
        for view in bucket.views(message):
            view.add_(1)
        assert (message == 1).all()


@pytest.mark.parametrize(
    ("bucket_bytes", "expected", "sizes"),
    [
        (1, [["b1"], ["w1"], ["b0"], ["w0"]], [3, 24, 3, 24]),
        (27 * 8, [["w1"], ["b1", "b0"], ["w0"]], [24, 11, 24]),  # 3 + 5 of padding + 3
        (BUCKET_BYTES, [["b1", "b0"], ["w1", "w0"]], [11, 48]),
    ],
)
def test_flat_buffers_are_cut_from_their_ends(
    bucket_bytes: int, expected: list[list[str]], sizes: list[int]
) -> None:
    """Matrices and vectors lie in two buffers; a bucket that is complete earlier leaves earlier."""
    parameters = make_parameters()
    optimizer = FlatAdamW(groups(nn.ParameterDict(parameters)))
    flat = optimizer.gradient_buffers()
    buckets = cut_buckets(list(parameters.values()), bucket_bytes, flat)
    assert names(buckets, parameters) == expected
    assert [bucket.num_bytes // 8 for bucket in buckets] == sizes
    for bucket in buckets:
        assert bucket.flat is not None
        parts = bucket.views(bucket.flat[bucket.begin : bucket.end])
        for p, part in zip(bucket.parameters, parts, strict=True):
            assert p.grad is not None
            assert part.data_ptr() == p.grad.data_ptr()


def test_what_lies_between_is_not_sent() -> None:
    """A frozen parameter's gradient is no padding, and types do not mix."""
    frozen = make_parameters()
    frozen["w1"].requires_grad_(False)
    frozen["half"] = nn.Parameter(torch.zeros(2))
    optimizer = FlatAdamW(frozen.values())
    trainable = [p for p in frozen.values() if p.requires_grad]
    buckets = cut_buckets(trainable, BUCKET_BYTES, optimizer.gradient_buffers())
    assert names(buckets, frozen) == [["half"], ["b1"], ["b0", "w0"]]


def test_gradients_that_share_memory_by_chance_are_packed() -> None:
    parameters = make_parameters()
    memory = torch.zeros(54, dtype=torch.float64)
    parts = memory.split([p.numel() for p in parameters.values()])
    for p, part in zip(parameters.values(), parts, strict=True):
        p.grad = part.view_as(p)
    assert all(b.flat is None for b in cut_buckets(list(parameters.values()), 1))


def test_one_rank_has_no_hooks_and_fills_in_zeros() -> None:
    model = nn.Linear(2, 1)
    reducer = GradientReducer(model.parameters(), ParallelContext())
    assert not reducer.buckets
    assert not model.weight._post_accumulate_grad_hooks
    for _ in range(2):
        reducer.start()
        model.weight.sum().backward()
        model.weight.sum().backward()
        reducer.finish()
    assert model.weight.grad is not None
    assert model.weight.grad.tolist() == [[4, 4]]
    assert model.bias.grad is not None
    assert model.bias.grad.tolist() == [0]


def test_frozen_parameters_take_no_part() -> None:
    model = nn.Linear(2, 1).requires_grad_(False)
    reducer = GradientReducer(model.parameters(), ParallelContext(dp_size=2))
    reducer.finish()
    assert model.weight.grad is None
    assert not reducer.buckets


def test_errors() -> None:
    with pytest.raises(ValueError, match="bucket_bytes must be at least 1, got 0"):
        GradientReducer([], ParallelContext(), bucket_bytes=0)
    reducer = GradientReducer([], ParallelContext())
    reducer.start()
    with pytest.raises(RuntimeError, match=r"start\(\) after start\(\); call finish\(\) between them"):
        reducer.start()
    reducer.finish()
    reducer.start()


def test_an_alien_gradient_moves_home() -> None:
    parameter: Any = nn.Parameter(torch.zeros(3))
    optimizer = FlatAdamW([parameter])
    (bucket,) = cut_buckets([parameter], 1, optimizer.gradient_buffers())
    parameter.grad = torch.arange(3.0)
    bucket.launch(ParallelContext())
    bucket.collect()
    grad: Tensor = parameter.grad
    assert grad.data_ptr() == optimizer.gradient_buffers()[0].data_ptr()
    assert grad.tolist() == [0, 1, 2]
