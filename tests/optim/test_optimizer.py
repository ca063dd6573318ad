"""Which parameters decay, and the moving average of the weights."""

import torch
from torch import nn

from megagnn.config import OptimConfig
from megagnn.optim.optimizer import WeightAverage, make_optimizer


def test_only_matrices_decay() -> None:
    """With zero gradients AdamW only decays."""
    model = nn.Linear(3, 3)
    nn.init.ones_(model.bias)
    before = model.weight.detach().clone()
    optimizer = make_optimizer(model, OptimConfig(learning_rate=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), 0.95 * before)
    assert torch.equal(model.bias.detach(), torch.ones(3))


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
