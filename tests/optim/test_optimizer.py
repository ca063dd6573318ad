"""Which parameters decay, clipping, the implementations of AdamW, the moving average of the weights."""

import sys
import types
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from megagnn.optim.adamw import FlatAdamW
from megagnn.optim.config import OptimConfig
from megagnn.optim.optimizer import (
    WeightAverage,
    make_optimizer,
    parameter_groups,
    set_learning_rate,
)
from megagnn.optim.parts import FROZEN, check_parts
from megagnn.parallel.context import ParallelContext
from tests.tolerances import assert_close

IMPLEMENTATIONS = ("own", "torch", "apex")


class FusedAdam(torch.optim.AdamW):
    """Stands in for apex's, which needs a GPU: its arguments, its zero_grad, its step count per group."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
    ) -> None:
        assert adam_w_mode
        assert bias_correction
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)

    def zero_grad(self) -> None:  # type: ignore[override]
        super().zero_grad(set_to_none=True)

    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if self.state[p]:
                    self.state[p]["step"] = torch.tensor(float(group["step"]))
        super().step()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                del self.state[p]["step"]


@pytest.fixture
def _fake_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    apex, optimizers = types.ModuleType("apex"), types.ModuleType("apex.optimizers")
    optimizers.FusedAdam = FusedAdam  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex", apex)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)


def run(model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int, clip: float | None) -> None:
    """Steps on gradients that do not depend on the weights."""
    for step in range(num_steps):
        optimizer.zero_grad()
        for p in model.parameters():
            p.grad = torch.linspace(-3, 2 + step, p.numel(), dtype=p.dtype).view_as(p)
        optimizer.clipped_step(optimizer.gradient_norm(ParallelContext()), clip)


def make_model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 3).double()


@pytest.mark.usefixtures("_fake_apex")
@pytest.mark.parametrize("clip", [None, 0.5, 1e3])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_implementations_agree(implementation: Any, clip: float | None) -> None:
    config = OptimConfig(learning_rate=0.1, weight_decay=0.5, implementation=implementation)
    model, want = make_model(), make_model()
    run(model, make_optimizer(model, config), 6, clip)
    optimizer = torch.optim.AdamW(want.parameters(), lr=0.1, betas=config.betas, eps=config.eps)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    optimizer.param_groups[0]["weight_decay"] = 0.5
    bias = optimizer.param_groups[0]["params"].pop()
    optimizer.param_groups[1].update(params=[bias], weight_decay=0.0)
    for step in range(6):
        for p in want.parameters():
            p.grad = torch.linspace(-3, 2 + step, p.numel(), dtype=p.dtype).view_as(p)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(list(want.parameters()), clip)
        optimizer.step()
    for p, q in zip(model.parameters(), want.parameters(), strict=True):
        assert_close(p.detach(), q.detach(), 1e-13)


@pytest.mark.usefixtures("_fake_apex")
@pytest.mark.parametrize("after", IMPLEMENTATIONS)
@pytest.mark.parametrize("before", IMPLEMENTATIONS)
def test_a_state_passes_between_implementations(before: Any, after: Any) -> None:
    """Five steps, then five by another, are ten by one; the same implementation makes the same bits."""
    config = OptimConfig(learning_rate=0.1, weight_decay=0.5)
    model, want = make_model(), make_model()
    first = make_optimizer(model, replace(config, implementation=before))
    run(model, first, 5, 0.5)
    state = [piece.values.clone() for piece in first.pieces(model)]
    second = make_optimizer(model, replace(config, implementation=after))
    for piece, values in zip(second.pieces(model), state, strict=True):
        piece.values.copy_(values)
    second.pieces_loaded(first.num_steps)
    run(model, second, 5, 0.5)
    whole = make_optimizer(want, replace(config, implementation=after))
    run(want, whole, 5, 0.5)
    run(want, whole, 5, 0.5)
    for p, q in zip(model.parameters(), want.parameters(), strict=True):
        assert_close(p.detach(), q.detach(), 0.0 if before == after else 1e-13)
    assert isinstance(second, FlatAdamW) == (after == "own")


def test_apex_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(ValueError, match=r"FusedAdam cannot be imported .*build NVIDIA apex .*or use 'own'"):
        make_optimizer(nn.Linear(2, 2), OptimConfig(implementation="apex"))


@pytest.mark.parametrize("implementation", ["own", "torch"])
def test_a_norm_of_nan_is_not_hidden(implementation: Any) -> None:
    model = make_model()
    optimizer = make_optimizer(model, OptimConfig(implementation=implementation))
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    norm = optimizer.gradient_norm(ParallelContext())
    assert norm.isnan()
    optimizer.clipped_step(norm, 1.0)
    assert all(p.isnan().all() for p in model.parameters())


@pytest.mark.usefixtures("_fake_apex")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_only_matrices_decay(implementation: Any) -> None:
    """With zero gradients AdamW only decays."""
    model = nn.Linear(3, 3)
    nn.init.ones_(model.bias)
    before = model.weight.detach().clone()
    config = OptimConfig(learning_rate=0.1, weight_decay=0.5, implementation=implementation)
    optimizer = make_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), 0.95 * before)
    assert torch.equal(model.bias.detach(), torch.ones(3))


@pytest.mark.usefixtures("_fake_apex")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_step_counts_as_a_change(implementation: Any) -> None:
    """By a parameter's version one knows that what was made of it, as weights gathered ahead, is old."""
    model = make_model()
    optimizer = make_optimizer(model, OptimConfig(implementation=implementation))
    before = [p._version for p in model.parameters()]
    run(model, optimizer, 1, None)
    assert all(p._version > old for p, old in zip(model.parameters(), before, strict=True))


def test_average_follows_its_formula() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = WeightAverage(model, decay=0.5)
    expected = model.weight.item()
    for step in range(8):
        with torch.no_grad():
            model.weight.fill_(float(step))
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert abs(average.average["weight"].item() - expected) < 1e-6


def test_average_is_applied_and_taken_back() -> None:
    model = nn.Linear(2, 2)
    average = WeightAverage(model, decay=0.9)
    with torch.no_grad():
        model.weight.add_(1.0)
    own = model.weight.detach().clone()
    with average.applied():
        assert not torch.equal(model.weight, own)
    assert torch.equal(model.weight, own)


def test_without_decay_the_average_is_the_weights() -> None:
    model = nn.Linear(2, 2)
    average = WeightAverage(model, decay=0.0)
    with torch.no_grad():
        model.weight.add_(1.0)
    average.update()
    assert torch.equal(average.average["weight"], model.weight)


def test_groups_in_numbers() -> None:
    """Rates of parts, of the parametrisation and their product; decay times rate is the part's own."""
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=name == "c") for name in "abc"})
    model["b"].weight.rate = 0.5
    config = OptimConfig(weight_decay=0.2, rates={"a": 3.0, "b": 4.0}, freeze=("c.weight",))
    optimizer = torch.optim.AdamW(parameter_groups(model, config))
    a, b, c = model["a"].weight, model["b"].weight, model["c"]
    found = [
        (group["params"], group["weight_decay"], group["rate"], group.get(FROZEN, False))
        for group in optimizer.param_groups
    ]
    assert [entry for entry in found if entry[0]] == [
        ([b], 0.4, 2.0, False),
        ([c.weight], 0.2, 0.0, True),
        ([a], 0.2, 3.0, False),
        ([c.bias], 0.0, 1.0, False),
    ]
    set_learning_rate(optimizer, 0.1)
    rates = [group["lr"] for group in optimizer.param_groups if group["params"]]
    assert rates == pytest.approx([0.2, 0.0, 0.3, 0.1])


def test_a_model_without_vectors_has_both_usual_groups() -> None:
    """So that states of all models look alike: matrices, which decay, and vectors."""
    groups = parameter_groups(nn.Linear(2, 2, bias=False), OptimConfig(weight_decay=0.2))
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 0.2), (0, 0.0)]


def test_parts_that_a_model_does_not_have() -> None:
    names = ["element_embedding.weight", "layers.0.phi_e.weight", "layers.1.phi_e.weight", "energy_head.bias"]
    parts = "the parts are element_embedding, layers.0, layers.1, energy_head$"
    with pytest.raises(ValueError, match=f"nearest is 'energy_head.bias', {parts}"):
        check_parts(OptimConfig(freeze=("energy_head.bia",)), names)
    with pytest.raises(ValueError, match=f"does not have; {parts}"):
        check_parts(OptimConfig(rates={"xyzzy": 2.0}), names)


def test_another_rule_is_not_taken_for_adamw() -> None:
    with pytest.raises(ValueError, match=r"'muon' runs by make_sharded_optimizer .* or optim.rule = 'adamw'"):
        make_optimizer(nn.Linear(2, 2), OptimConfig(rule="muon"))
