"""Parity with an EGNN written by others: the layers of the PyPI package `egnn-pytorch`, in float64.

Its layer concatenates [h_i, h_j, |r|^2], has its own branch widths, x_i - x_j, sums for messages and
coordinates, a bias in the last Linear of the coordinate branch, and self-edges: all of it
is configuration here.
"""

import pytest
import torch
from ase import Atoms
from torch import Tensor, nn

from megagnn.config import config_from_dict
from megagnn.data import keys
from megagnn.data.batch import batch_from_atoms
from megagnn.models.egnn.config import EGNNConfig
from megagnn.models.egnn.edge.operation import partition_edges
from megagnn.models.egnn.layer import Edges, EGNNLayer, edge_vectors
from megagnn.models.radial import DistanceFeature
from megagnn.parallel.context import ParallelContext

egnn_pytorch = pytest.importorskip("egnn_pytorch", reason="the parity test needs the package egnn-pytorch")

WIDTH, MESSAGE, NUM_LAYERS, NUM_ATOMS = 10, 6, 3, 9
EDGE_INPUT = 2 * WIDTH + 1


def config(**values: object) -> EGNNConfig:
    widths = {
        "preset": "satorras",
        "width": WIDTH,
        "message_hidden": 2 * EDGE_INPUT,
        "message_width": MESSAGE,
        "coordinate_hidden": 4 * MESSAGE,
        "node_hidden": 2 * WIDTH,
        "coordinate_bias": True,
        "coordinate_aggregation": "sum",
        "self_edges": True,
        "cutoff": 50.0,
    }
    return config_from_dict({"model": {**widths, **values}}).model


def peer_layers() -> nn.ModuleList:
    """Theirs, with larger weights: their own initial standard deviation of 1e-3 would hide most terms.

    Not too large: squared distances of sums of coordinates grow from layer to layer, and rounding with them.
    """
    torch.manual_seed(0)
    layers = nn.ModuleList(egnn_pytorch.EGNN(dim=WIDTH, m_dim=MESSAGE) for _ in range(NUM_LAYERS)).double()
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter) / max(parameter.shape[-1], 4) ** 0.5)
    return layers


def our_layers(config: EGNNConfig) -> nn.ModuleList:
    return nn.ModuleList(
        EGNNLayer(
            config,
            DistanceFeature("squared", 1, config.cutoff, torch.float64),
            mean_neighbours=1.0,
            vector_branch="coordinates",
            context=ParallelContext(),
            dtype=torch.float64,
        )
        for _ in range(NUM_LAYERS)
    )


def named_pairs(ours: EGNNLayer, theirs: nn.Module) -> list[tuple[nn.Parameter, str, slice]]:
    """(ours, name of theirs, columns): the split Linears are column blocks of the concatenating ones."""
    everything = slice(None)
    return [
        (ours.message.from_destination.weight, "edge_mlp.0.weight", slice(0, WIDTH)),
        (ours.message.from_source.weight, "edge_mlp.0.weight", slice(WIDTH, 2 * WIDTH)),
        (ours.message.from_distance.weight, "edge_mlp.0.weight", slice(2 * WIDTH, EDGE_INPUT)),
        (ours.message.from_destination.bias, "edge_mlp.0.bias", everything),
        (ours.message.out.weight, "edge_mlp.3.weight", everything),
        (ours.message.out.bias, "edge_mlp.3.bias", everything),
        (ours.node_update.from_node.weight, "node_mlp.0.weight", slice(0, WIDTH)),
        (ours.node_update.from_messages.weight, "node_mlp.0.weight", slice(WIDTH, WIDTH + MESSAGE)),
        (ours.node_update.from_node.bias, "node_mlp.0.bias", everything),
        (ours.node_update.out.weight, "node_mlp.3.weight", everything),
        (ours.node_update.out.bias, "node_mlp.3.bias", everything),
        (ours.vector.hidden.weight, "coors_mlp.0.weight", everything),
        (ours.vector.hidden.bias, "coors_mlp.0.bias", everything),
        (ours.vector.out.weight, "coors_mlp.3.weight", everything),
        (ours.vector.out.bias, "coors_mlp.3.bias", everything),
    ]


def run_ours(layers: nn.ModuleList, config: EGNNConfig, h_NF: Tensor, x_NC: Tensor) -> tuple[Tensor, Tensor]:
    atoms = Atoms("C" * NUM_ATOMS, x_NC.detach().numpy())
    batch = batch_from_atoms([atoms], config.cutoff, torch.float64, config.self_edges)
    partition = partition_edges(batch, ParallelContext(), plan=None)
    degree_N1 = batch[keys.ROW_PTR].diff().unsqueeze(-1)
    edges = Edges(partition, batch[keys.CELL_SHIFTS], degree_N1=degree_N1)
    for layer in layers:
        h_NF, x_NC, _ = layer(h_NF, x_NC, edge_vectors(x_NC, edges), edges)
    return h_NF, x_NC


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    h_NF = torch.randn(NUM_ATOMS, WIDTH, generator=generator, dtype=torch.float64)
    x_NC = torch.randn(NUM_ATOMS, 3, generator=generator, dtype=torch.float64)
    return h_NF.requires_grad_(), x_NC.requires_grad_()


def largest_error(**values: object) -> float:
    """Largest relative error over outputs, input gradients and all parameter gradients of both."""
    cfg, theirs = config(**values), peer_layers()
    ours = our_layers(cfg)
    pairs = [pair for a, b in zip(ours, theirs, strict=True) for pair in ((*p, b) for p in named_pairs(a, b))]
    assert sum(p.numel() for p, *_ in pairs) == sum(p.numel() for p in theirs.parameters())
    assert len({id(p) for p, *_ in pairs}) == len(list(ours.parameters()))
    with torch.no_grad():
        for parameter, name, columns, peer in pairs:
            parameter.copy_(peer.get_parameter(name)[..., columns])

    h, x = inputs()
    our_h, our_x = run_ours(ours, cfg, h, x)
    (our_h.square().sum() + our_x.sin().sum()).backward()

    peer_h_in, peer_x_in = inputs()
    peer_h, peer_x = peer_h_in.unsqueeze(0), peer_x_in.unsqueeze(0)
    for layer in theirs:
        peer_h, peer_x = layer(peer_h, peer_x)
    (peer_h.square().sum() + peer_x.sin().sum()).backward()

    compared = [(our_h, peer_h[0]), (our_x, peer_x[0]), (h.grad, peer_h_in.grad), (x.grad, peer_x_in.grad)]
    for parameter, name, columns, peer in pairs:
        compared.append((parameter.grad, peer.get_parameter(name).grad[..., columns]))
    errors = []
    for mine, other in compared:
        assert mine is not None
        assert other is not None
        assert other.abs().max() > 1e-12
        errors.append(((mine - other).abs().max() / other.abs().max()).item())
    return max(errors)


def test_equals_egnn_pytorch() -> None:
    """Outputs, input gradients and all parameter gradients, 1e-10 in float64."""
    assert largest_error() < 1e-10


@pytest.mark.parametrize(
    "wrong",
    [{"direction_sign": 1}, {"self_edges": False}, {"direction": "unit"}, {"coordinate_aggregation": "mean"}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_parity_sees_each_choice(wrong: dict[str, object]) -> None:
    """Every convention taken over matters: the other choice is far outside the tolerance."""
    assert largest_error(**wrong) > 1e-3
