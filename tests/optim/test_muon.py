"""Muon beside a plain Newton-Schulz iteration and beside PyTorch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megagnn.models.potential import build_potential
from megagnn.optim.config import OptimConfig
from megagnn.optim.optimizer import make_sharded_optimizer, parameter_groups
from megagnn.optim.rules.muon import MUON, orthogonalised, times_own_transpose
from megagnn.parallel.config import ParallelConfig
from megagnn.parallel.context import ParallelContext
from tests.models.physics import STATISTICS, model_config
from tests.tolerances import assert_close

SHAPES = [(6, 6), (6, 12), (12, 6), (6, 6), (1, 9)]


def plain_iteration(matrix: Tensor) -> Tensor:
    """One matrix at a time, as written in Jordan et al.: X <- a X + (b A + c A A) X with A = X X^T."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / max(float(torch.linalg.matrix_norm(x)), 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def gradients(step: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


def twenty_steps(dtype: torch.dtype) -> list[Tensor]:
    """The rule on matrices of zeros, with the rate and decay that the sharded optimizer applies."""
    weights = [torch.full(shape, 0.5, dtype=dtype) for shape in SHAPES]
    states = [{"momentum": torch.zeros(shape, dtype=dtype)} for shape in SHAPES]
    for step in range(20):
        found = MUON.directions(gradients(step, dtype), states, {"momentum": 0.95}, step + 1)
        for w, d in zip(weights, found, strict=True):
            w.mul_(1 - 0.01 * 0.1).sub_(d, alpha=0.01)
    return weights


def torch_muon(dtype: torch.dtype) -> list[Tensor]:
    """torch.optim.Muon with the same settings."""
    params = [nn.Parameter(torch.full(shape, 0.5, dtype=dtype)) for shape in SHAPES]
    optimizer = torch.optim.Muon(params, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(20):
        for p, g in zip(params, gradients(step, dtype), strict=True):
            p.grad = g
        optimizer.step()
    return [p.detach() for p in params]


def test_equals_torch_with_a_plain_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "torch.optim._muon._zeropower_via_newtonschulz", lambda grad, *_: plain_iteration(grad)
    )
    for got, want in zip(twenty_steps(torch.float64), torch_muon(torch.float64), strict=True):
        assert_close(got, want, 1e-12)


def test_is_near_torch_as_it_is() -> None:
    """Its products are bfloat16: 2^-8 relative, of steps that add up to 0.2 sqrt(12) 0.01 20 at most."""
    for got, want in zip(twenty_steps(torch.float32), torch_muon(torch.float32), strict=True):
        assert_close(got, want, 0.01)


def test_singular_values_end_near_one() -> None:
    for shape in ((3, 20, 20), (2, 8, 30), (2, 30, 8)):
        matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        values = torch.linalg.svdvals(orthogonalised(matrices))
        assert values.max() < 1.25
        assert values.median() > 0.7
        assert values.min() > (0.6 if shape[1] != shape[2] else 0.1)  # the smallest take more iterations
    assert torch.equal(orthogonalised(torch.zeros(1, 4, 4)), torch.zeros(1, 4, 4))


def test_which_parameters_are_its() -> None:
    """Linears of features; not embeddings, radial functions, outputs, gains or biases."""
    model = build_potential(model_config(width=8, num_radial=4), STATISTICS).model
    groups = parameter_groups(model, OptimConfig(rule="muon", weight_decay=0.1))
    names = {p: name for name, p in model.named_parameters()}
    matrices = {names[p] for g in groups if g.get("matrices") for p in g["params"]}
    others = {names[p] for g in groups if not g.get("matrices") for p in g["params"]}
    assert all("weight" in name for name in matrices)
    assert not any(word in name for name in matrices for word in ("embedding", "distance", "head.out"))
    assert matrices | others == set(names.values())


def test_its_groups_know_the_momentum_and_the_rate(tmp_path: Any) -> None:
    model = build_potential(model_config(width=8, num_radial=4), STATISTICS).model
    config = OptimConfig(rule="muon", momentum=0.9, learning_rate=0.02)
    optimizer = make_sharded_optimizer(model, config, ParallelConfig(), ParallelContext())
    (group,) = [g for g in optimizer.param_groups if g.get("matrices")]
    assert (group["momentum"], group["lr"]) == (0.9, 0.02)
    kinds = {piece.kind for piece in optimizer.pieces()}
    assert kinds == {"model", "exp_avg", "exp_avg_sq", "momentum"}


@pytest.mark.parametrize("shape", [(2, 130, 130), (1, 130, 150), (1, 150, 131)])
def test_large_matrices_go_as_small_ones(shape: tuple[int, ...]) -> None:
    """Blocks of symmetric products, of which the last is smaller; a block that is not mirrored is far off."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for got, matrix in zip(orthogonalised(matrices, 3.0), matrices, strict=True):
        assert_close(got, 3.0 * plain_iteration(matrix), 1e-12)
    product = times_own_transpose(matrices)
    assert (product.tril() - product).abs().max() > 1
