"""What families say that their layers keep equals what PyTorch's allocator counts."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megagnn.config import config_from_dict
from megagnn.data import keys
from megagnn.models.config import ModelConfig
from megagnn.models.costs import How
from megagnn.models.family import Model
from megagnn.models.potential import Potential, build_potential, differentiable, frozen
from megagnn.models.registry import model_class
from tools.bench.memory.step import held_of
from tools.bench.work import edge as edge_workload

WIDTHS = {"message_hidden": 96, "message_width": 48, "coordinate_hidden": 80, "node_hidden": 112}
BLOCKS, LAYERS = {"edge_memory": "recompute"}, {"recompute_layers": True}
CELLS: list[tuple[str, str, dict[str, Any]]] = [
    *(
        ("egnn", forces, {**WIDTHS, **memory})
        for forces in ("direct", "conservative")
        for memory in ({}, BLOCKS, LAYERS, {**BLOCKS, **LAYERS}, {"edge_operation": "unfused"})
    ),
    *(("cartesian", forces, memory) for forces in ("direct", "conservative") for memory in ({}, LAYERS)),
    *(("painn", forces, memory) for forces in ("direct", "conservative") for memory in ({}, LAYERS)),
]
HOWS: dict[str, tuple[How, ...]] = {"direct": ("plain",), "conservative": ("probe", "pair")}


def forward(potential: Potential, batch: dict[str, Tensor], how: How) -> Any:
    """A forward of this kind, with all that its backward needs."""
    if how == "pair":
        return potential.directional(batch, torch.zeros_like(batch[keys.POSITIONS]))
    if how == "plain":
        return potential.model(batch)
    moved, inputs = differentiable(batch, stress=False)
    with frozen(potential.model):
        return potential.model(moved), inputs


def config_of(
    family: str, forces: str, values: dict[str, Any], num_layers: int, cutoff: float
) -> ModelConfig:
    sizes = {"width": 64, "num_layers": num_layers, "num_radial": 8, "cutoff": cutoff}
    return config_from_dict({"model": {"family": family, "forces": forces, **sizes, **values}}).model


def counted(how: How, num_layers: int, cell: tuple[str, str, dict[str, Any]]) -> tuple[float, int, int]:
    """Numbers that a forward leaves, atoms and edges."""
    batch, cutoff = edge_workload.dense_batch(900, neighbours=15)
    potential = build_potential(config_of(*cell, num_layers, cutoff), edge_workload.statistics())
    forward(potential, batch, how)  # libraries are loaded
    held = held_of(lambda: forward(potential, batch, how))
    return held / 4, len(batch[keys.POSITIONS]), batch[keys.EDGE_INDEX].shape[1]


def stated(how: How, num_layers: int, cell: tuple[str, str, dict[str, Any]], atoms: int, edges: int) -> float:
    config = config_of(*cell, num_layers, 5.0)
    kind: type[Model] = model_class(config)
    found = [kind.kept(config, layer, how, 1, "channel") for layer in range(num_layers + 1)]
    return sum(k.per_atom * atoms + k.per_edge * edges + k.fixed for k in found)


@pytest.mark.parametrize(
    "cell", CELLS, ids=lambda cell: "-".join(map(str, (cell[0], cell[1], *cell[2].values())))
)
def test_layers_keep_what_their_family_says(cell: tuple[str, str, dict[str, Any]]) -> None:
    """A middle layer to half a per cent, the whole to five; of a probe, which pairs outdo, to twenty."""
    for how in HOWS[cell[1]]:
        (five, atoms, edges), (four, _, _) = (counted(how, layers, cell) for layers in (5, 4))
        says = [stated(how, layers, cell, atoms, edges) for layers in (5, 4)]
        assert five - four == pytest.approx(says[0] - says[1], rel=0.005), how
        assert five == pytest.approx(says[0], rel=0.2 if how == "probe" else 0.05), how


def test_a_family_that_says_nothing_is_named() -> None:
    config = config_of("painn", "direct", {}, 2, 5.0)
    with pytest.raises(ValueError, match="the model family 'painn' has no `kept`, without which activations"):
        Model.kept(config, 0, "plain", 1, "channel")
    with pytest.raises(ValueError, match="has no `traffic`, without which parallel\\.tensor above 1"):
        Model.traffic(config, 0, "channel", None)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["cartesian", "painn"])
def test_what_nobody_has_counted_is_refused(family: str) -> None:
    config = config_of(family, "conservative", {}, 2, 5.0)
    with pytest.raises(ValueError, match="'create_graph' is not known"):
        model_class(config).kept(config, 0, "graph", 1, "channel")
