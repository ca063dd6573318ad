"""64 layers neither blow features and gradients up nor let them vanish, at the start and in first steps."""

import torch
from ase.build import molecule
from torch import Tensor

from megagnn.data import keys
from megagnn.data.batch import batch_from_atoms
from megagnn.models.potential import build_potential
from tests.models.physics import STATISTICS, model_config, rattled
from tests.models.test_depth import run

WIDTH = 32
# Root mean squares of h begin at one and may double for each sixteen layers.
LARGEST = 16.0


def at_the_start(**values: object) -> tuple[list[dict[str, float]], list[float]]:
    """Root mean squares of the fields behind each layer, and norms of each layer's gradients."""
    config = model_config(family="cartesian", width=WIDTH, num_layers=64, **values)
    potential, seen = build_potential(config, STATISTICS), []

    def watch(_: object, __: object, state: dict[str, Tensor]) -> None:
        seen.append({name: x.detach().square().mean().sqrt().item() for name, x in state.items()})

    for layer in potential.model.layers:
        layer.register_forward_hook(watch)
    atoms = [rattled(molecule(name), seed=k) for k, name in enumerate(("H2O", "CH4", "CH3OH"))]
    outputs = potential(batch_from_atoms(atoms, config.cutoff, torch.float32), create_graph=True)
    outputs[keys.FORCES].square().mean().backward()
    gradients = [torch.stack([p.grad.norm() for p in layer.parameters()]) for layer in potential.model.layers]
    return seen, [float(g.norm()) for g in gradients]


def test_depth_64_is_even_at_the_start() -> None:
    seen, gradients = at_the_start()
    assert all(0.5 < fields["h"] < LARGEST for fields in seen)
    assert all(0.05 < x < LARGEST for fields in seen for x in fields.values()), "vectors and tensors"
    print(f"features {seen[0]} to {seen[-2]}, gradients {gradients[0]:.2f} to {gradients[-1]:.2f}")
    assert max(gradients) < 30 * min(gradients)


def test_depth_64_stays_bounded() -> None:
    activations, norms, losses = run(6, family="cartesian", width=WIDTH)
    print(f"largest activation {max(activations):.2f}, gradient norm {max(norms):.2f}, {losses}")
    assert max(activations) < LARGEST
    assert max(norms) < 30
    assert losses[-1] < 0.9 * losses[0], "it should also learn"


def test_the_bound_can_fail() -> None:
    seen, _ = at_the_start(depth_scaling=False)
    assert seen[-1]["h"] > 2 * LARGEST
