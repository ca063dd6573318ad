"""The peers of the whole-step benchmark compute the same function as megagnn's EGNN, derivatives included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megagnn.data import keys
from megagnn.data.batch import batch_from_atoms
from megagnn.models.egnn.model import EGNN
from megagnn.models.potential import Potential
from tests.models.physics import crystal, ethanol, model_config, randomised
from tests.tolerances import PARITY, assert_close
from tools.bench.harness import optional
from tools.bench.peers.model import PeerEGNN, concatenated
from tools.bench.peers.usual import UsualLayer, index_add, torch_scatter_sum

needs_scatter = pytest.mark.skipif(optional("torch_scatter") is None, reason="torch_scatter is not installed")
needs_geometric = pytest.mark.skipif(
    optional("torch_geometric") is None, reason="torch_geometric is not installed"
)
PEERS = [
    pytest.param("index_add", id="usual-index_add"),
    pytest.param("torch_scatter", id="usual-torch_scatter", marks=needs_scatter),
    pytest.param("torch_geometric", id="torch_geometric", marks=needs_geometric),
]


def make_peer(name: str, ours: EGNN) -> PeerEGNN:
    if name == "torch_geometric":
        from tools.bench.peers.geometric import GeometricLayer

        return PeerEGNN(ours, GeometricLayer)
    scatter = index_add if name == "index_add" else torch_scatter_sum
    return PeerEGNN(ours, lambda sizes: UsualLayer(sizes, scatter))


def results(model: torch.nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Energy without references, forces, and the parameter gradients of a loss on both."""
    conservative = model.config.forces == "conservative"
    batch = {**batch, keys.POSITIONS: batch[keys.POSITIONS].clone().requires_grad_(conservative)}
    outputs = model(batch)
    energy = outputs[keys.ENERGY]
    if isinstance(model, EGNN):
        energy = energy - model.reference_energy(batch)
    if conservative:
        (gradient,) = torch.autograd.grad(energy.sum(), batch[keys.POSITIONS], create_graph=True)
        forces = -gradient
    else:
        forces = outputs[keys.FORCES]
    parameters = dict(model.named_parameters())
    loss = energy.square().sum() + forces.square().sum()
    gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
    return energy, forces, dict(zip(parameters, gradients, strict=True))


@pytest.fixture(params=["direct", "conservative"])
def potential(request: pytest.FixtureRequest) -> Potential:
    """Random weights of order one, float64."""
    return randomised(model_config(forces=request.param, level_embedding=False))


@pytest.mark.parametrize("name", PEERS)
def test_the_same_function(potential: Potential, name: str) -> None:
    ours = potential.model
    batch = batch_from_atoms([ethanol(), crystal()], ours.config.cutoff)
    energy, forces, gradients = results(ours, batch)
    peer = results(make_peer(name, ours), batch)
    assert_close(peer[0], energy, PARITY)
    assert_close(peer[1], forces, PARITY)
    wanted = concatenated(gradients)
    assert set(wanted) == set(peer[2])
    largest = max(tensor.abs().max().item() for tensor in wanted.values())
    for key, want in wanted.items():
        error = (peer[2][key] - want).abs().max().item()
        assert error <= PARITY * max(want.abs().max().item(), 1e-4 * largest), key


def test_every_weight_matters(potential: Potential) -> None:
    """The comparison sees a change of any one weight of the peer, so it could fail."""
    ours = potential.model
    batch = batch_from_atoms([ethanol()], ours.config.cutoff)
    wanted = results(ours, batch)[:2]
    for name in dict(make_peer("index_add", ours).named_parameters()):
        peer = make_peer("index_add", ours)
        with torch.no_grad():
            peer.get_parameter(name).mul_(1.001)
        got = results(peer, batch)[:2]
        assert any((g - w).abs().max() > 1e-7 * w.abs().max() for g, w in zip(got, wanted, strict=True)), name


def test_other_parts_are_refused() -> None:
    ours = randomised(model_config(direction="vector")).model
    with pytest.raises(ValueError, match=r"model\.direction must be 'unit', got 'vector'"):
        PeerEGNN(ours, UsualLayer)
