"""The flat optimizer takes the steps of torch's, saves and loads its states, notices what it cannot do."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megagnn.optim.adamw import FlatAdamW
from megagnn.parallel.context import ParallelContext
from tests.tolerances import assert_close

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8}
TARGET = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)


def make_model(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


def flat(model: nn.Module) -> FlatAdamW:
    return FlatAdamW(groups(model), **SETTINGS)


def loss_of(model: nn.Module) -> Tensor:
    dtype = next(model.parameters()).dtype
    return (model(TARGET.to(dtype)) - TARGET.flip(0).to(dtype)).square().sum()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int = 20) -> None:
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_same(model: nn.Module, other: nn.Module) -> None:
    for got, want in zip(weights(model), weights(other), strict=True):
        assert torch.equal(got, want)


def test_takes_the_steps_of_torch() -> None:
    own, theirs = make_model(), make_model()
    train(own, flat(own))
    train(theirs, torch.optim.AdamW(groups(theirs), **SETTINGS, foreach=False))
    for got, want in zip(weights(own), weights(theirs), strict=True):
        assert_close(got, want, 1e-13)


def test_parameters_and_gradients_are_views_of_one_buffer() -> None:
    model = make_model()
    before = weights(model)
    optimizer = flat(model)
    assert [torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True)] == [True] * 4
    optimizer.zero_grad()
    loss_of(model).backward()
    for kinds in optimizer.buffers:
        (buffers,) = kinds
        for p in buffers.params:
            assert p.grad is not None
            assert p.untyped_storage().data_ptr() == buffers.param.untyped_storage().data_ptr()
            assert p.grad.untyped_storage().data_ptr() == buffers.grad.untyped_storage().data_ptr()
            assert p.data_ptr() % 64 == 0
    optimizer.step()
    padding = optimizer.buffers[0][0].param.clone()
    for view in optimizer.buffers[0][0].layout.views(padding):
        view.zero_()
    assert not padding.any(), "padding stays zero"


def test_gradients_put_elsewhere_count() -> None:
    """As they do when .grad is assigned, set to None, or accumulated over two backward passes."""
    own, theirs = make_model(), make_model()
    optimizer, other = flat(own), torch.optim.AdamW(groups(theirs), **SETTINGS, foreach=False)
    for model, kind in ((own, optimizer), (theirs, other)):
        train(model, kind, 2)
        for p in model.parameters():
            p.grad = None
        loss_of(model).backward()
        loss_of(model).backward()
        kind.step()
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.5)
        kind.step()
    for got, want in zip(weights(own), weights(theirs), strict=True):
        assert_close(got, want, 1e-13)
    for p in own.parameters():
        p.grad = None
    optimizer.step()  # counts as zero
    assert all(p.grad is not None and not p.grad.any() for p in own.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_resumes_to_the_same_bits(dtype: torch.dtype) -> None:
    whole, parted = make_model(dtype), make_model(dtype)
    train(whole, flat(whole), 9)
    optimizer = flat(parted)
    train(parted, optimizer, 4)
    fresh = make_model(dtype)
    other = flat(fresh)
    train(fresh, other, 2)  # what is loaded replaces everything
    pieces = zip(other.pieces(fresh), optimizer.pieces(parted), strict=True)
    for piece, saved in pieces:
        assert (piece.name, piece.kind) == (saved.name, saved.kind)
        assert piece.values.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
        piece.values.copy_(saved.values)
    other.pieces_loaded(4)
    train(fresh, other, 5)
    assert_same(fresh, whole)


def test_bfloat16_follows_its_master_copy() -> None:
    """Steps below bfloat16's resolution add up; bfloat16 alone would stand still."""
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = FlatAdamW([parameter], lr=1e-4, weight_decay=0.0)
    for _ in range(100):
        parameter.grad = torch.ones(3, dtype=torch.bfloat16)
        optimizer.step()
    assert torch.equal(parameter.float(), torch.full((3,), 0.99).bfloat16().float())
    alone = torch.ones(3, dtype=torch.bfloat16)
    for _ in range(100):
        alone -= 1e-4
    assert (alone == 1).all()


def test_weights_set_from_outside() -> None:
    """float32 and float64 are read from the parameters; bfloat16 needs take_weights."""
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = FlatAdamW([parameter], lr=1e-4, weight_decay=0.0)
    with torch.no_grad():
        parameter.fill_(7.0)
    optimizer.take_weights()
    optimizer.step()
    assert (parameter == 7).all()


def test_gradient_norm_and_scale() -> None:
    model, other = make_model(), make_model()
    optimizer, plain = flat(model), flat(other)
    for kind, m in ((optimizer, model), (plain, other)):
        kind.zero_grad()
        loss_of(m).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert abs(optimizer.gradient_norm(ParallelContext()) - norm) <= 1e-14 * norm
    optimizer.scaled_step(0.5)
    for p in other.parameters():
        assert p.grad is not None
        p.grad.mul_(0.5)
    plain.step()
    assert_same(model, other)


def test_types_of_a_group_have_their_own_buffers() -> None:
    params = [nn.Parameter(torch.ones(2, dtype=d)) for d in (torch.float32, torch.float64, torch.float32)]
    optimizer = FlatAdamW(params)
    assert [[p.shape[0] for p in b.params] for b in optimizer.buffers[0]] == [[2, 2], [2]]
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.5})
    optimizer.step(lambda: None)
    assert [len(kinds) for kinds in optimizer.buffers] == [2, 1]
    assert FlatAdamW([{"params": []}, {"params": params[:1]}]).buffers[0] == []


def test_a_step_between_forward_and_backward_is_noticed() -> None:
    model = make_model()
    optimizer = flat(model)
    loss = loss_of(model)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_errors() -> None:
    with pytest.raises(
        ValueError, match=r"parameters must be float32, float64 or bfloat16, got torch\.float16"
    ):
        FlatAdamW([nn.Parameter(torch.ones(2).half())])
    model = make_model()
    optimizer = flat(model)
    with pytest.raises(NotImplementedError, match=r"save and load its pieces\(\) instead"):
        optimizer.load_state_dict({})
    model.float()
    with pytest.raises(
        RuntimeError, match="no longer lies in its flat buffer; move or convert the model before"
    ):
        optimizer.step()
