"""Depth 64 trains: activations and gradients stay bounded over 200 steps."""

import pytest
import torch
from ase.build import molecule
from torch import Tensor

from megagnn.data import keys
from megagnn.data.batch import batch_from_atoms
from megagnn.models.potential import build_potential
from megagnn.optim.config import OptimConfig
from megagnn.optim.optimizer import make_optimizer
from megagnn.optim.schedule import learning_rate
from tests.models.physics import STATISTICS, model_config, rattled

NUM_STEPS = 200
# Root mean square of the node features after any layer, which begin near one.
ACTIVATION_BOUND = 10.0
# Of the loss below, which is of order one.
GRADIENT_BOUND = 10.0
SCHEDULE = OptimConfig(learning_rate=1e-3, warmup_steps=20, schedule="constant")


def run(num_steps: int, **values: object) -> tuple[list[float], list[float], list[float]]:
    """Largest activation, gradient norm and loss at each step of training on forces of a harmonic kind."""
    torch.manual_seed(0)
    config = model_config(**{"width": 64, "num_layers": 64, **values})
    potential = build_potential(config, STATISTICS)
    atoms = [rattled(molecule(name), seed=k) for k, name in enumerate(("H2O", "CH4", "CH3OH"))]
    batch = batch_from_atoms(atoms, config.cutoff, torch.float32)
    target_NC = torch.randn(len(batch[keys.POSITIONS]), 3)
    largest: list[float] = []

    def watch(_: object, __: object, outputs: tuple[Tensor, ...] | dict[str, Tensor]) -> None:
        h_NF = outputs["h"] if isinstance(outputs, dict) else outputs[0]
        largest[-1] = max(largest[-1], h_NF.detach().square().mean().sqrt().item())

    for layer in potential.model.layers:
        layer.register_forward_hook(watch)
    optimizer = make_optimizer(potential, SCHEDULE)
    norms, losses = [], []
    for _ in range(num_steps):
        largest.append(0.0)
        optimizer.zero_grad()
        outputs = potential(batch, create_graph=True)
        bonding_B = outputs[keys.ENERGY] - potential.model.reference_energy(batch)
        loss = (outputs[keys.FORCES] - target_NC).square().mean() + (
            bonding_B / batch[keys.NUM_ATOMS]
        ).square().mean()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(len(losses), NUM_STEPS, SCHEDULE)
        norms.append(float(torch.nn.utils.clip_grad_norm_(potential.parameters(), 10.0)))
        losses.append(loss.item())
        optimizer.step()
    return largest, norms, losses


def test_depth_64_stays_bounded() -> None:
    activations, norms, losses = run(NUM_STEPS)
    print(f"largest activation {max(activations):.2f}, gradient norm {max(norms):.2f}, loss {losses[-1]:.2f}")
    assert max(activations) < ACTIVATION_BOUND
    assert max(norms) < GRADIENT_BOUND
    assert losses[-1] < 0.8 * losses[0], "it should also learn"


@pytest.mark.parametrize(
    "without",
    [{"normalisation": "none", "message_aggregation": "sum"}, {"depth_scaling": False}],
    ids=["normalisation", "depth_scaling"],
)
def test_bound_can_fail(without: dict[str, object]) -> None:
    """Without normalisation and with plain sums, or without depth scaling, a bound is soon left."""
    activations, norms, _ = run(20, **without)
    # neither a larger number nor NaN is below a bound
    assert not (max(activations) < ACTIVATION_BOUND and max(norms) < GRADIENT_BOUND)
