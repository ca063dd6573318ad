"""The gradient norm, and the clipped step, are those of one process on any layout."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megagnn.ops import square_sum
from megagnn.optim.adamw import FlatAdamW
from megagnn.optim.config import OptimConfig
from megagnn.optim.optimizer import make_optimizer
from megagnn.parallel.context import ParallelContext, grid_context
from megagnn.parallel.parameter import ParameterLayout
from tests.distributed.spawn import spawn

RELATIVE = {torch.float64: 1e-14, torch.float32: 1e-6}
TP = 2
SHAPES: list[tuple[tuple[int, ...], int | None]] = [  # of one stage, and the dimension that tp divides
    ((6, 4), 0),
    ((3, 8), 1),
    ((5, 5), None),  # replicated, and large: counting it twice would show
    ((4,), 0),
    ((7,), None),
]
CELLS = [(kind, dtype) for kind in ("own", "torch") for dtype in (torch.float64, torch.float32)]
CLIP = 0.5
SETTINGS: dict[str, Any] = {"learning_rate": 1.0, "weight_decay": 0.0, "eps": 1.0}
GRIDS: dict[int, list[tuple[int, int, int]]] = {2: [(1, 1, TP)], 4: [(2, 1, TP), (1, 2, TP)]}


def gradient(stage: int, number: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(10 * stage + number)
    scale = 5.0 if SHAPES[number][1] is None else 1.0
    return (scale * torch.randn(SHAPES[number][0], generator=generator, dtype=torch.float64)).to(dtype)


def make_stage(context: ParallelContext, dtype: torch.dtype, told: bool = True) -> nn.ParameterList:
    """This rank's parameters with their gradients; not told which are divided where `told` is false."""
    parameters = nn.ParameterList()
    for number, (shape, dim) in enumerate(SHAPES):
        layout = ParameterLayout(shape, dim, TP, context.tp_rank)
        parameter: Any = nn.Parameter(layout.slice_of(torch.ones(shape, dtype=dtype)).clone())
        parameter.grad = layout.slice_of(gradient(context.pp_rank, number, dtype)).clone()
        if told and dim is not None:
            parameter.sharding = layout
        parameters.append(parameter)
    return parameters


def whole(num_stages: int) -> list[Tensor]:
    return [gradient(s, n, torch.float64) for s in range(num_stages) for n in range(len(SHAPES))]


def true_norm(num_stages: int) -> float:
    return torch.cat([g.flatten() for g in whole(num_stages)]).norm().item()


def norms(context: ParallelContext, told: bool) -> list[Tensor]:
    result = []
    for kind, dtype in CELLS:
        stage = make_stage(context, dtype, told)
        optimizer = make_optimizer(stage, OptimConfig(implementation=kind))  # type: ignore[arg-type]
        result.append(optimizer.gradient_norm(context))
    return result


def clipped(context: ParallelContext) -> list[Tensor]:
    """The first parameter's slice after a clipped step, with every implementation and type."""
    result = []
    for kind, dtype in CELLS:
        stage = make_stage(context, dtype)
        optimizer = make_optimizer(stage, OptimConfig(implementation=kind, **SETTINGS))  # type: ignore[arg-type]
        optimizer.clipped_step(optimizer.gradient_norm(context), CLIP)
        result.append(stage[0].detach().clone())
    return result


def norm_of_nan(context: ParallelContext) -> list[Tensor]:
    """One rank alone has a NaN, in a slice or in a replica."""
    result = []
    for number in (0, 2):
        stage = make_stage(context, torch.float64)
        if context.rank == context.world_size - 1:
            assert stage[number].grad is not None
            stage[number].grad.view(-1)[0] = float("nan")
        result.append(make_optimizer(stage, OptimConfig()).gradient_norm(context))
    return result


def on_rank(context: ParallelContext) -> list[dict[str, Any]]:
    result = []
    for dp, pp, tp in GRIDS[context.world_size]:
        grid = grid_context(dp, pp, tp)
        with grid.traffic.measured() as traffic:
            told = norms(grid, told=True)
        result.append(
            {
                "stage": grid.pp_rank,
                "tp_rank": grid.tp_rank,
                "told": told,
                "sent": (float(traffic.total("tp")), float(traffic.total("pp")), float(traffic.total("dp"))),
                "not told": norms(grid, told=False),
                "clipped": clipped(grid),
                "nan": norm_of_nan(grid) if dp == 1 else [],
            }
        )
    return result


@pytest.fixture(scope="module", params=[2, 4])
def grids(request: pytest.FixtureRequest) -> list[tuple[int, list[dict[str, Any]]]]:
    """For each grid the number of stages, and what each rank found."""
    ranks = spawn(request.param, on_rank)
    return [(pp, [rank[i] for rank in ranks]) for i, (_, pp, _) in enumerate(GRIDS[request.param])]


def test_the_norm_is_that_of_the_whole_model(grids: list[tuple[int, list[dict[str, Any]]]]) -> None:
    for num_stages, ranks in grids:
        for index, (_, dtype) in enumerate(CELLS):
            values = [rank["told"][index] for rank in ranks]
            assert values[0].item() == pytest.approx(true_norm(num_stages), rel=RELATIVE[dtype])
            assert all(value.dtype == torch.float64 and torch.equal(value, values[0]) for value in values)


def test_a_norm_that_knows_no_slices_would_fail(grids: list[tuple[int, list[dict[str, Any]]]]) -> None:
    for num_stages, ranks in grids:
        for rank in ranks:
            assert all(abs(value / true_norm(num_stages) - 1) > 1e-3 for value in rank["not told"])


def test_one_number_is_sent(grids: list[tuple[int, list[dict[str, Any]]]]) -> None:
    for num_stages, ranks in grids:
        pipeline = float(len(CELLS)) if num_stages == 2 else 0.0
        assert all(rank["sent"] == (len(CELLS), pipeline, 0.0) for rank in ranks)


def test_clipping_takes_the_step_of_one_process(grids: list[tuple[int, list[dict[str, Any]]]]) -> None:
    for num_stages, ranks in grids:
        for rank in ranks:
            layout = ParameterLayout(*SHAPES[0], TP, rank["tp_rank"])
            parameter = nn.Parameter(torch.ones(SHAPES[0][0], dtype=torch.float64))
            scale = CLIP / (true_norm(num_stages) + 1e-6)
            parameter.grad = scale * gradient(rank["stage"], 0, torch.float64)
            torch.optim.AdamW([parameter], lr=1.0, weight_decay=0.0, eps=1.0).step()
            want = layout.slice_of(parameter.detach())
            for (_, dtype), got in zip(CELLS, rank["clipped"], strict=True):
                torch.testing.assert_close(got.double(), want, rtol=RELATIVE[dtype], atol=0)


def test_a_nan_on_one_rank_is_seen_by_all(grids: list[tuple[int, list[dict[str, Any]]]]) -> None:
    for _, ranks in grids:
        assert all(value.isnan() for rank in ranks for value in rank["nan"])


@pytest.mark.parametrize(("kind", "dtype"), CELLS)
def test_one_process_sends_nothing_and_asks_as_it_did(kind: Any, dtype: torch.dtype) -> None:
    context = ParallelContext()
    stage = make_stage(context, dtype)
    optimizer = make_optimizer(stage, OptimConfig(implementation=kind))
    norm = optimizer.gradient_norm(context)
    if isinstance(optimizer, FlatAdamW):
        squares = torch.stack([square_sum(g) for g in optimizer.gradient_buffers()])
        assert torch.equal(norm, squares.sum().sqrt())
    else:
        assert torch.equal(norm, torch.nn.utils.get_total_norm([p.grad for p in stage if p.grad is not None]))
    assert not context.traffic.elements
