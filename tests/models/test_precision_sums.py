"""What of a bfloat16 model is summed in float32: each with the mistake that it guards against."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megagnn.models.potential import build_potential
from megagnn.ops import dual, dual_functions
from megagnn.ops.activation import silu_second_derivative
from megagnn.optim.adamw import FlatAdamW
from megagnn.optim.optimizer import WeightAverage
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.parameter import Constant
from megagnn.tensor_parallel.layers import Embedding, LinearLaws, RMSNorm, RowLinear
from tests.models.physics import STATISTICS, model_config
from tests.tolerances import RELATIVE

BFLOAT16 = torch.bfloat16
ALONE = ParallelContext()


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(BFLOAT16)


def close(got: Tensor, want: Tensor, roundings: int = 1) -> bool:
    return bool((got.double() - want).abs().max() <= roundings * RELATIVE[BFLOAT16] * want.abs().max())


def test_gradients_of_an_element_are_added_in_float32() -> None:
    """3000 atoms of one element; torch adds bfloat16 rows in bfloat16, where 256 + 1 is 256."""
    embedding = Embedding(2, 4, ALONE, BFLOAT16)
    index = torch.zeros(3000, dtype=torch.int64)
    embedding(index).sum().backward()
    assert embedding.weight.grad is not None
    assert embedding.weight.grad.dtype == BFLOAT16
    assert torch.equal(embedding.weight.grad[0].float(), torch.full((4,), 3000.0).to(BFLOAT16).float())
    table = nn.Parameter(torch.zeros(2, 4, dtype=BFLOAT16))
    nn.functional.embedding(index, table).sum().backward()
    assert table.grad is not None
    assert float(table.grad[0, 0]) < 0.5 * 3000


@pytest.mark.parametrize("as_dual", [False, True], ids=["tensor", "dual"])
def test_norm(as_dual: bool) -> None:
    """One feature of 16, the others 1: their squares vanish beside the large one in sums of bfloat16."""
    norm = RMSNorm(513, ALONE, BFLOAT16)
    with torch.no_grad():
        norm.gain_F.fill_(1.0)
    h_NF = torch.cat([torch.full((3, 1), 16.0), torch.ones(3, 512)], 1).to(BFLOAT16)
    sums: Any = dual.square_sum(dual.Dual(h_NF, h_NF) if as_dual else h_NF)
    sums = sums.planes if as_dual else sums
    assert sums.dtype == torch.float32
    assert float(sums.flatten()[0]) == 16.0**2 + 512
    running = torch.zeros((), dtype=BFLOAT16)
    for value in h_NF[0]:
        running += value * value
    assert float(running) < 0.5 * (16.0**2 + 512)
    out: Any = norm(dual.Dual(h_NF, h_NF) if as_dual else h_NF)
    out = out.value if as_dual else out
    assert out.dtype == BFLOAT16
    assert close(out, h_NF.double() / ((16.0**2 + 512) / 513) ** 0.5)


@pytest.mark.parametrize(
    "function",
    [
        lambda h, rows, gain: dual_functions.SquareSum.call(h),
        lambda h, rows, gain: dual_functions.ScaleRows.call(h, rows, gain),
        lambda h, rows, gain: dual.silu(dual.Dual.of_planes(h)).planes,
    ],
    ids=["square_sum", "scale_rows", "silu"],
)
def test_functions_of_planes(function: Any) -> None:
    """Values and gradients are those of float64, rounded once or twice, and have their tensor's type."""
    low = [normal(2, 5, 64), normal(2, 5, 1).float(), normal(64)]
    low = [t.requires_grad_() for t in low]
    high = [t.detach().double().requires_grad_() for t in low]
    got, want = function(*low), function(*high)
    assert close(got, want.detach())
    bar = normal(*got.shape)
    got.backward(bar.to(got.dtype))
    want.backward(bar.double())
    for x, y in zip(low, high, strict=True):
        if y.grad is not None:
            assert x.grad is not None
            assert x.grad.dtype == x.dtype
            assert close(x.grad, y.grad, roundings=2)


def test_second_derivative_of_silu_is_made_in_float32() -> None:
    x = torch.linspace(-6, 6, 97).to(BFLOAT16)
    want = silu_second_derivative(x.double())
    assert silu_second_derivative(x).dtype == torch.float32
    assert (silu_second_derivative(x).double() - want).abs().max() < 1e-6
    s = torch.sigmoid(x)
    assert ((s * (1 - s) * (2 + x * (1 - 2 * s))).double() - want).abs().max() > 1e-3


@pytest.mark.parametrize("as_dual", [False, True], ids=["tensor", "dual"])
def test_last_product_of_the_head_is_float32(as_dual: bool) -> None:
    one = Constant(1.0)
    head = RowLinear(300, 1, ALONE, LinearLaws(one, one), BFLOAT16)
    with torch.no_grad():
        head.weight.fill_(1.0)
        head.bias.fill_(1.0)  # type: ignore[union-attr]
    x = torch.ones(2, 300, dtype=BFLOAT16)
    out: Any = head(dual.Dual(x, x) if as_dual else x)
    values = out.value if as_dual else out
    assert values.dtype == torch.float32
    assert torch.equal(values, torch.full((2, 1), 301.0)), "bfloat16 has 300 and 302"
    if as_dual:
        assert torch.equal(out.tangent, torch.full((2, 1), 300.0))


def step_with(potential: Any, optimizer: Any, steps: int) -> None:
    for _ in range(steps):
        for p in potential.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()


def test_small_steps_are_not_lost() -> None:
    """50 steps of 1e-4 on weights of one: a master copy adds them up, weights alone stand still."""
    config = model_config()
    potential, alone = (build_potential(config, STATISTICS, 0, BFLOAT16) for _ in range(2))
    gain = next(iter(potential.model.layers)).norm.gain_F
    step_with(potential, FlatAdamW(potential.parameters(), lr=1e-4, weight_decay=0.0), 50)
    assert torch.equal(gain.float(), torch.full_like(gain, 1 - 50e-4).float())
    step_with(alone, torch.optim.AdamW(alone.parameters(), lr=1e-4, weight_decay=0.0), 50)
    assert (next(iter(alone.model.layers)).norm.gain_F == 1).all()


def test_average_of_bfloat16_weights_is_float32() -> None:
    """Towards weights of 2 from 1, by a hundredth of the way at a time; bfloat16 would stop at the first."""
    model = nn.Linear(2, 2, bias=False).to(BFLOAT16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    average = WeightAverage(model, 0.999)
    average.num_updates = 10**6
    with torch.no_grad():
        model.weight.fill_(2.0)
    for _ in range(100):
        average.update()
    assert average.average["weight"].dtype == torch.float32
    assert torch.allclose(average.average["weight"], torch.full((2, 2), 2 - 0.999**100))
    with average.applied():
        assert model.weight.dtype == BFLOAT16
        assert torch.equal(model.weight.float(), torch.full((2, 2), 2 - 0.999**100).to(BFLOAT16).float())
    assert (model.weight == 2).all()
    alone = torch.ones(2, dtype=BFLOAT16)
    for _ in range(100):
        alone.lerp_(torch.full((2,), 2.0, dtype=BFLOAT16), 1e-3)
    assert (alone == 1).all()
