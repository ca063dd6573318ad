"""The model computes the same on every aggregation back end that is installed."""

import copy

import pytest
import torch
from torch import Tensor

from megagnn.data import keys
from megagnn.data.batch import batch_from_atoms
from megagnn.models.potential import Potential
from megagnn.ops.backends import TorchBackend
from megagnn.ops.segment import Segments
from tests.models.physics import ethanol, model_config, randomised
from tests.ops.installed import installed_backends
from tests.tolerances import PARITY, assert_close

OTHERS = [name for name in installed_backends()[0] if name != "own"]


def force_loss_gradients(potential: Potential) -> list[Tensor]:
    """Energy, forces, and every parameter gradient of a loss on the forces."""
    batch = batch_from_atoms([ethanol()], potential.model.config.cutoff)
    outputs = potential(batch, create_graph=True)
    loss = outputs[keys.FORCES].square().sum()
    parameters = [p for p in potential.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True, allow_unused=True)
    return [outputs[keys.ENERGY], outputs[keys.FORCES], *gradients]


@pytest.mark.parametrize("aggregation", ["constant", "mean"])
@pytest.mark.parametrize("name", OTHERS)
def test_outputs_and_force_loss_gradients(name: str, aggregation: str) -> None:
    values = {"message_aggregation": aggregation, "coordinate_aggregation": aggregation}
    own = randomised(model_config(**values))
    other = randomised(model_config(**values, aggregation_backend=name))
    assert all(type(layer.edge_operation.backend).name == name for layer in other.model.layers)
    for got, want in zip(force_loss_gradients(other), force_loss_gradients(own), strict=True):
        if want.abs().max() > 0:
            assert_close(got, want, PARITY)


def test_the_configured_back_end_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A back end that sums twice as much changes the forces, so nothing passes it by."""
    right = force_loss_gradients(randomised(model_config(aggregation_backend="torch")))[1]
    plain = TorchBackend.segment_sum

    def twice(self: TorchBackend, values: Tensor, segments: Segments) -> Tensor:
        return 2 * plain(self, values, segments)

    monkeypatch.setattr(TorchBackend, "segment_sum", twice)
    wrong = force_loss_gradients(randomised(model_config(aggregation_backend="torch")))[1]
    assert (wrong - right).abs().max() > 0.01 * right.abs().max()


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_on_it_can_be_copied(name: str) -> None:
    potential = randomised(model_config(aggregation_backend=name))
    batch = batch_from_atoms([ethanol()], 4.0)
    assert torch.equal(copy.deepcopy(potential)(batch)[keys.ENERGY], potential(batch)[keys.ENERGY])
