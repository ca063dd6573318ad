"""Collectives at 2 and 4 ranks: values, adjoints, second derivatives, forward mode, traffic, refusals.

The checks run inside the ranks, all in one spawn per world size; see `CHECKS`.
"""

import traceback
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from megagnn.parallel import collectives as c
from megagnn.parallel import messages
from megagnn.parallel import row_collectives as rc
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.row_collectives import Rows
from tests.distributed.spawn import spawn
from tests.tolerances import assert_close

Collective = Callable[[Tensor], Tensor]
# Rows of each rank, one of four without any.
BOUNDS = {2: (0, 4, 5), 4: (0, 3, 3, 4, 5)}
NUM_ROWS, WIDTH = 5, 8


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def along(context: ParallelContext, dim: int) -> dict[str, tuple[str, str, Collective]]:
    """Name: kinds of argument and result, [Note: four kinds], and the function."""
    return {
        "copy": ("replicated", "shared", lambda x: c.copy(x, context)),
        "reduce": ("partial", "replicated", lambda x: c.reduce(x, context)),
        "gather": ("sharded", "shared", lambda x: c.gather(x, dim, context)),
        "reduce_scatter": ("partial", "sharded", lambda x: c.reduce_scatter(x, dim, context)),
        "split": ("replicated", "sharded", lambda x: c.split(x, dim, context)),
        "join": ("sharded", "replicated", lambda x: c.join(x, dim, context)),
        "unshare": ("shared", "replicated", lambda x: c.unshare(x, context)),
        "single": ("replicated", "partial", lambda x: c.single(x, context)),
    }


def along_rows(context: ParallelContext) -> dict[str, tuple[str, str, Collective]]:
    rows = Rows(BOUNDS[context.tp_size], context)
    return {
        "to_rows": ("sharded", "sharded", lambda x: rc.to_rows(x, rows)),
        "to_channels": ("sharded", "sharded", lambda x: rc.to_channels(x, rows)),
        "join_rows": ("sharded", "replicated", lambda x: rc.join_rows(x, rows)),
        "own_rows": ("replicated", "sharded", lambda x: rc.own_rows(x, rows)),
    }


def argument_shape(name: str, context: ParallelContext, dim: int = -1) -> list[int]:
    """Of the whole (8, 8), or for rows (5, 8)."""
    tp, own = context.tp_size, Rows(BOUNDS[context.tp_size], context).counts[context.tp_rank]
    if name in ("to_rows", "to_channels", "join_rows", "own_rows"):
        return [
            NUM_ROWS if name in ("to_rows", "own_rows") else own,
            WIDTH // (tp if name == "to_rows" else 1),
        ]
    shape = [WIDTH, WIDTH]
    if name in ("gather", "join"):
        shape[dim] //= tp
    return shape


def check_values(context: ParallelContext) -> None:
    """Literal ones: rank r begins with r, or with its slice of 0 ... 7, in every type."""
    tp, r = context.tp_size, context.tp_rank
    ranks = torch.arange(tp)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for dim in (0, -1):
            whole = torch.arange(8.0, dtype=dtype).repeat(2, 1)
            whole = whole if dim == -1 else whole.t().contiguous()
            own = whole.chunk(tp, dim)[r]
            mine = torch.full((2, 2), float(r), dtype=dtype)
            f = {name: function for name, (_, _, function) in along(context, dim).items()}
            total = float(ranks.sum())
            expected = {
                "copy": (whole, whole),
                "reduce": (mine, torch.full((2, 2), total)),
                "gather": (own, whole),
                "reduce_scatter": (whole * (r + 1), own * (total + tp)),
                "split": (whole, own),
                "join": (own, whole),
                "unshare": (whole, whole),
                "single": (whole, whole if r == 0 else torch.zeros_like(whole)),
            }
            assert expected.keys() == f.keys()
            for name, (argument, result) in expected.items():
                before, got = argument.clone(), f[name](argument)
                assert got.dtype == dtype
                assert torch.equal(got, result.to(dtype)), f"{name} of {dtype} along {dim}: {got}"
                assert torch.equal(argument, before), f"{name} changed its argument"
    # Strided arguments, which `messages` would refuse.
    x = random(8, 8, seed=r).t()
    assert_close(c.reduce(x, context), torch.stack([random(8, 8, seed=k).t() for k in range(tp)]).sum(0))
    assert torch.equal(c.gather(x[:, ::2], 0, context)[8 * r : 8 * r + 8], x[:, ::2])


def check_row_values(context: ParallelContext) -> None:
    tp, r = context.tp_size, context.tp_rank
    own = slice(BOUNDS[tp][r], BOUNDS[tp][r + 1])
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        whole = torch.arange(40.0, dtype=dtype).view(NUM_ROWS, WIDTH)
        channels, rows = whole.chunk(tp, 1)[r], whole[own]
        expected = {
            "to_rows": (channels, rows),
            "to_channels": (rows, channels),
            "join_rows": (rows, whole),
            "own_rows": (whole, rows),
        }
        for name, (_, _, function) in along_rows(context).items():
            argument, result = expected[name]
            assert torch.equal(function(argument), result), name


def every(context: ParallelContext) -> list[tuple[str, str, str, Collective, list[int]]]:
    """All collectives, along both dimensions."""
    found = []
    for dim in (0, -1):
        for name, (source, target, function) in along(context, dim).items():
            found.append((name, source, target, function, argument_shape(name, context, dim)))
    for name, (source, target, function) in along_rows(context).items():
        found.append((name, source, target, function, argument_shape(name, context)))
    return found


def sample(kind: str, shape: list[int], context: ParallelContext, seed: int) -> Tensor:
    """The same on all ranks, or each rank its own."""
    return random(
        *shape, seed=seed + (0 if kind in ("replicated", "shared") else 100 * (1 + context.tp_rank))
    )


def pairing(kind: str, x: Tensor, gradient: Tensor, context: ParallelContext) -> float:
    """<x, gradient>: of replicated tensors once, of all others the sum over ranks."""
    product = (x * gradient).sum().detach().clone()
    if kind != "replicated":
        messages.all_reduce(product, context, "tp")
    return product.item()


def check_adjoint(context: ParallelContext) -> None:
    """<A x, y> = <x, A* y>, and the same of A*, whose own adjoint is A again."""
    dual = {"replicated": "replicated", "sharded": "sharded", "shared": "partial", "partial": "shared"}
    for name, source, target, function, shape in every(context):
        x = sample(source, shape, context, 1).requires_grad_()
        ax = function(x)
        y = sample(dual[target], list(ax.shape), context, 2).requires_grad_()
        (a_star_y,) = torch.autograd.grad(ax, x, y, create_graph=True)
        left, right = pairing(target, ax, y, context), pairing(source, x, a_star_y, context)
        assert abs(left - right) < 1e-13 * (1 + abs(left)), f"{name}: {left} is not {right}"
        # The derivative of A* y with respect to y is A.
        z = sample(source, shape, context, 3)
        (az,) = torch.autograd.grad(a_star_y, y, z)
        assert_close(az, function(z))


def check_second_derivatives(context: ParallelContext) -> None:
    """Chains of collectives from replicated to replicated against the same formula on one process."""
    tp, r = context.tp_size, context.tp_rank
    rows = Rows(BOUNDS[tp], context)
    x = (0.4 * random(8, 8, seed=1)).requires_grad_()
    w = random(8, 8, seed=2)
    parts = [(0.5 + k) / tp for k in range(tp)]  # each rank's share in what it does with a shared tensor
    of, total = parts[r], sum(parts)
    half = x[:NUM_ROWS]
    chains: dict[str, tuple[Tensor, Tensor]] = {
        "copy, reduce": (c.reduce(of * c.copy(x, context) ** 3, context), total * x**3),
        "unshare": (c.unshare(c.copy(x, context) ** 2, context) ** 2 * w, x**4 * w),
        "single": (c.reduce(c.single(x**2, context), context) ** 2 * w, x**4 * w),
        "to_rows, to_channels": (
            c.join(rc.to_channels(rc.to_rows(c.split(half**2, -1, context), rows) ** 2, rows), -1, context),
            half**4,
        ),
        "own_rows, join_rows": (
            rc.join_rows(rc.own_rows(half**2, rows) * rc.own_rows(w[:5], rows), rows) ** 2,
            half**4 * w[:5] ** 2,
        ),
    }
    for dim in (0, -1):
        s = c.split(x, dim, context) ** 2
        g = c.reduce_scatter(of * c.gather(s, dim, context) ** 2, dim, context)
        chains[f"gather, reduce_scatter along {dim}"] = (c.join(g**2, dim, context), total**2 * x**8)
        chains[f"split, join along {dim}"] = (c.join(s * c.split(w, dim, context), dim, context), x**2 * w)
    direction = random(8, 8, seed=4)
    for name, (got, dense) in chains.items():
        orders = []
        for y in (got, dense):
            (first,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
            (second,) = torch.autograd.grad((first.tanh() * direction).sum(), x, create_graph=True)
            (third,) = torch.autograd.grad((second.tanh() * direction).sum(), x, retain_graph=True)
            orders.append((y, first, second, third))
        for order, (mine, theirs) in enumerate(zip(*orders, strict=True)):
            error = (mine - theirs).abs().max().item() / theirs.abs().max().item()
            assert error < 1e-12, f"{name}: derivative {order} is off by {error:.3g}"


def check_forward_mode(context: ParallelContext) -> None:
    """The tangent of a collective is the collective of the tangent."""
    for name, source, _, function, shape in every(context):
        x, tangent = sample(source, shape, context, 1), sample(source, shape, context, 2)
        with forward_ad.dual_level():
            value, got = forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent)))
        assert got is not None, name
        assert torch.equal(value, function(x)), name
        assert torch.equal(got, function(tangent)), name


def check_traffic(context: ParallelContext) -> None:
    """Elements that the forward, then the backward sends, of 64 elements in all."""
    tp, counts = context.tp_size, Rows(BOUNDS[context.tp_size], context).counts
    own = counts[context.tp_rank]
    part = Fraction(64 * (tp - 1), tp)
    to_rows = ("all_to_all", Fraction((NUM_ROWS - own) * WIDTH, tp))
    to_channels = ("all_to_all", Fraction(own * WIDTH * (tp - 1), tp))
    join_rows, nothing = ("all_to_all", Fraction(own * WIDTH * (tp - 1))), ("", Fraction(0))
    reduce, gather, scatter = ("all_reduce", 2 * part), ("all_gather", part), ("reduce_scatter", part)
    expected = {
        "copy": (nothing, reduce),
        "reduce": (reduce, nothing),
        "gather": (gather, scatter),
        "reduce_scatter": (scatter, gather),
        "split": (nothing, gather),
        "join": (gather, nothing),
        "unshare": (nothing, nothing),
        "single": (nothing, nothing),
        "to_rows": (to_rows, to_channels),
        "to_channels": (to_channels, to_rows),
        "join_rows": (join_rows, nothing),
        "own_rows": (nothing, join_rows),
    }
    for name, _, _, function, shape in every(context):
        x = torch.ones(shape, dtype=torch.float64, requires_grad=True)
        with context.traffic.measured() as forward:
            y = function(x)
        with context.traffic.measured() as backward:
            torch.autograd.grad(y, x, torch.ones_like(y))
        for found, (kind, elements) in zip((forward, backward), expected[name], strict=True):
            assert found.total("tp") == elements, f"{name}: {dict(found.elements)}"
            assert found.bytes == ({("tp", kind): 8 * elements} if elements else {}), name


def check_sizes(context: ParallelContext) -> None:
    """What the ranks do not divide is refused by all, before a message is sent."""
    tp = context.tp_size
    for dim, size in ((0, 5), (-1, 7)):
        x = torch.zeros((5, 8) if dim == 0 else (8, 7))
        for function in (c.split, c.reduce_scatter):
            with pytest.raises(ValueError, match=rf"{tp} ranks do not divide dimension -\d of size {size}"):
                function(x, dim, context)
        assert c.split(torch.zeros(tp, 7), 0, context).shape == (1, 7)


def check_empty(context: ParallelContext) -> None:
    """No rows: no message, and a gradient of the right shape."""
    for name, (_, _, function) in along(context, -1).items():
        x = torch.zeros(0, 8, requires_grad=True)
        with context.traffic.measured() as sent:
            y = function(x)
            (gradient,) = torch.autograd.grad(y.sum(), x)
        assert y.shape[0] == 0, name
        assert gradient.shape == x.shape, name
        assert sent.total("tp") == 0, name
    rows = Rows((0,) * (context.tp_size + 1), context)
    x = torch.zeros(0, 8 // context.tp_size)
    assert rc.to_rows(x, rows).shape == (0, 8)
    assert rc.to_channels(torch.zeros(0, 8), rows).shape == x.shape
    assert rc.join_rows(torch.zeros(0, 3), rows).shape == (0, 3)


CHECKS = [
    check_values,
    check_row_values,
    check_adjoint,
    check_second_derivatives,
    check_forward_mode,
    check_traffic,
    check_sizes,
    check_empty,
]


def on_rank(context: ParallelContext) -> dict[str, str]:
    """The traceback of each check that failed."""
    failed = {}
    for check in CHECKS:
        try:
            check(context)
        except AssertionError:
            failed[check.__name__] = traceback.format_exc()
    return failed


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def failures(request: pytest.FixtureRequest) -> list[dict[str, str]]:
    return spawn(request.param, on_rank, tp=request.param)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_collectives(failures: list[dict[str, str]], check: Callable[[ParallelContext], None]) -> None:
    for rank, failed in enumerate(failures):
        assert check.__name__ not in failed, f"rank {rank}: {failed[check.__name__]}"


def test_one_rank_does_nothing() -> None:
    """The very tensor comes back, and nothing is sent."""
    context = ParallelContext()
    x = torch.ones(3, 4, requires_grad=True)
    for _, _, function in along(context, -1).values():
        assert function(x) is x
    rows = Rows((0, 3), context)
    for function in (rc.to_rows, rc.to_channels, rc.join_rows, rc.own_rows):
        assert torch.equal(function(x, rows), x)
    assert context.traffic.total("tp") == 0


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("all_reduce", messages.start_all_reduce),
        ("all_gather", messages.start_all_gather),
        ("reduce_scatter", messages.start_reduce_scatter),
        ("all_to_all", lambda x, context, axis: messages.start_all_to_all(x, [3], [3], context, axis)),
    ],
)
def test_strided_messages_are_refused(name: str, call: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match=rf"{name} needs a contiguous tensor, got strides \(1, 4\)"):
        call(torch.zeros(3, 4).t(), ParallelContext(), "tp")
    call(torch.zeros(1, 3), ParallelContext(), "tp")


def test_reduce_scatter_needs_a_part_for_each_rank() -> None:
    context = ParallelContext(tp_size=4)
    with pytest.raises(ValueError, match="reduce_scatter needs one part per rank, 4, got 3"):
        messages.start_reduce_scatter(torch.zeros(3, 2), context, "tp")
