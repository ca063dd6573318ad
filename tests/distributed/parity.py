"""The parity matrix: any layout, plan, method and recomputation against one process doing the plain thing.

A cell says how a model is run, a configuration what is run. `measure` runs a cell on the ranks of its layout
and holds what each rank has against `reference`: energies, forces, stress, loss, every parameter's gradient.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import torch
from ase import Atoms
from torch import Tensor

from megagnn.data import keys
from megagnn.data.batch import build_graph, collate
from megagnn.models.egnn.config import EGNNConfig
from megagnn.models.potential import Potential
from megagnn.objective.config import LossConfig
from megagnn.objective.gradient_methods import GRADIENT_METHODS
from megagnn.objective.loss import Loss, LossCounts, label_counts
from megagnn.optim.bucket_reducer import GradientReducer
from megagnn.parallel.context import ParallelContext, grid_context
from megagnn.parallel.parameter import layout_of
from megagnn.parallel.world import sum_over_dp
from tests.distributed.whole import gather_whole
from tests.models.physics import STATISTICS, crystal, ethanol, model_config, randomised, slab
from tests.tolerances import PARITY, PARITY_FLOOR

CUTOFF = 3.0
SMALL = {"width": 8, "num_radial": 4, "cutoff": CUTOFF}
# Edges of a block: the six structures have some 300 edges, so every pass goes through several blocks.
EDGE_BLOCK = 64
RECOMPUTATION = {"none": ("save", False), "block": ("recompute", False), "layer": ("save", True)}
RECOMPUTATION["both"] = ("recompute", True)

# Structures of each data-parallel rank, by their number: uneven in atoms, edges and labels.
UNEVEN = {1: ((0, 1, 2, 3, 4, 5),), 2: ((0, 1, 2, 3), (4, 5))}
ONE_EMPTY = {1: UNEVEN[1], 2: ((0, 1, 2, 3, 4, 5), ())}


class Cell(NamedTuple):
    """How a model is run. One rank along tp knows no plan, and calls it auto."""

    layout: tuple[int, int]
    """(tp, dp)"""
    plan: str
    method: str
    recomputation: str
    operation: str
    configuration: str

    def __str__(self) -> str:
        return " ".join([f"tp{self.layout[0]}-dp{self.layout[1]}", *self[1:]])

    @property
    def world_size(self) -> int:
        """Ranks of the layout."""
        return self.layout[0] * self.layout[1]


@dataclass(frozen=True)
class Configuration:
    """What is run: a model, a kind of loss, and who has which structures."""

    model: dict[str, Any]
    loss: str
    forces: str = ""
    """Kind of the force loss, where it is another."""
    shares: dict[int, tuple[tuple[int, ...], ...]] = field(default_factory=lambda: UNEVEN)

    def model_config(self, operation: str, recomputation: str) -> EGNNConfig:
        """The small model, run in this way."""
        memory, layers = RECOMPUTATION[recomputation]
        how: dict[str, object] = {"recompute_layers": layers}
        if self.model.get("family", "egnn") == "egnn":
            how |= {"edge_operation": operation, "edge_memory": memory, "edge_block": EDGE_BLOCK}
        return model_config(**SMALL, **self.model, **how)

    def loss_config(self) -> LossConfig:
        """Terms for all that the model predicts."""
        forces, stress = self.model.get("forces") != "none", self.model.get("stress", False)
        return LossConfig(
            energy=self.loss,  # type: ignore[arg-type]
            forces=self.forces or self.loss,  # type: ignore[arg-type]
            stress=self.loss,  # type: ignore[arg-type]
            force_strata=((0.0, 1.0), (1.0, 0.4)),
            element_weights={"C": 0.5},
            energy_weight=0.7,
            final_energy_factor=1.0,
            force_weight=1.0 if forces else 0.0,
            stress_weight=0.3 if stress else 0.0,
        )


CONFIGURATIONS = {
    "stress": Configuration({"stress": True}, "huber"),
    "direct": Configuration({"forces": "direct"}, "mae", "norm"),
    "energies": Configuration({"forces": "none"}, "mse", shares=ONE_EMPTY),
    "fixed-gaussian": Configuration(
        {"stress": True, "update_coordinates": False, "distance_feature": "gaussian"}, "mae"
    ),
    "satorras": Configuration(
        {"preset": "satorras", "stress": True, "num_layers": 2, "coordinate_bias": True}, "mse"
    ),
    "study": Configuration({"preset": "study", "stress": True}, "huber", "stratified_huber", ONE_EMPTY),
}

AXES: dict[str, tuple[Any, ...]] = {
    "layout": ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2)),
    "plan": ("channel", "edge", "auto"),
    "method": ("one_backward", "create_graph"),
    "recomputation": tuple(RECOMPUTATION),
    "operation": ("fused", "unfused"),
    "configuration": tuple(CONFIGURATIONS),
}


def allowed(cell: Cell) -> bool:
    """Not what would repeat another cell: plans of one rank, blocks of an operation without blocks."""
    if cell.layout[0] == 1 and cell.plan != "auto":
        return False
    return cell.operation == "fused" or cell.recomputation in ("none", "layer")


def all_cells() -> list[Cell]:
    """The whole matrix."""
    return [cell for cell in map(Cell._make, product(*AXES.values())) if allowed(cell)]


@cache
def structures() -> tuple[dict[str, Any], ...]:
    """Molecules, a slab, crystals and an atom without neighbours, their labels random and some missing."""
    atoms = [
        ethanol(),
        crystal(),
        slab(),
        ethanol()[:4],
        Atoms("H", [(0.1, 0.2, 0.3)]),
        crystal() * (1, 2, 1),
    ]
    generator = torch.Generator().manual_seed(3)
    result = []
    for index, one in enumerate(atoms):
        graph = build_graph(one.numbers, one.positions, one.cell.array, one.pbc, CUTOFF)
        labels = torch.randn(len(one) + 4, 3, generator=generator, dtype=torch.float64).numpy()
        if index != 3:
            per_element = STATISTICS.references[index % 2]
            known = sum(per_element[STATISTICS.elements.index(z)] for z in one.numbers)
            graph[keys.ENERGY] = known + len(one) * float(labels[0, 0])
        if index != 0:
            graph[keys.FORCES] = labels[4:]
        if index in (1, 5):
            graph[keys.STRESS] = labels[1:4] + labels[1:4].T
        graph[keys.SOURCE] = graph[keys.LEVEL] = index % 2
        graph[keys.WEIGHTS] = (0.5 + index % 3, 2.0 - index % 2, 0.25 * (1 + index))
        result.append(graph)
    return tuple(result)


def batch_of(share: Iterable[int]) -> dict[str, Tensor]:
    """The batch of some of the structures."""
    return collate([structures()[k] for k in share], torch.float64)


class RecordingLoss(Loss):
    """The loss, which remembers what it was given."""

    def __call__(
        self, outputs: dict[str, Tensor], batch: dict[str, Tensor], counts: LossCounts
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See the class."""
        self.outputs = {key: value.detach().clone() for key, value in outputs.items()}
        return super().__call__(outputs, batch, counts)


class Result(NamedTuple):
    """Of one rank: outputs for its own structures; the loss and the gradients are of the whole."""

    outputs: dict[str, Tensor]
    """`energy` without the elements' references, which would hide errors behind large totals."""
    loss: float
    gradients: dict[str, Tensor]


def run(
    potential: Potential,
    method: str,
    configuration: Configuration,
    context: ParallelContext,
    reducer: GradientReducer | None = None,
) -> Result:
    """Loss and gradients as a training step takes them; a reducer of one step where none is given."""
    batch = batch_of(configuration.shares[context.dp_size][context.dp_rank])
    loss = RecordingLoss(configuration.loss_config())
    counts = label_counts(batch, context)
    reducer = reducer or GradientReducer(potential.parameters(), context, bucket_bytes=1000)
    reducer.start()
    total, _ = GRADIENT_METHODS[method](potential, batch, loss, counts)
    reducer.finish()
    sum_over_dp(total, context)
    loss.outputs[keys.ENERGY] -= potential.model.reference_energy(batch)
    return Result(loss.outputs, total.item(), whole_gradients(potential, context))


def whole_gradients(potential: Potential, context: ParallelContext) -> dict[str, Tensor]:
    """The gradients of the whole parameters, by name, on every rank."""
    return {
        name: gather_whole(p.grad, layout_of(p), context)
        for name, p in potential.named_parameters()
        if p.grad is not None
    }


@cache
def reference(configuration: str) -> Result:
    """One process, every intermediate a tensor, derivatives of derivatives, nothing computed again."""
    what = CONFIGURATIONS[configuration]
    potential = randomised(what.model_config("unfused", "none"))
    return run(potential, "create_graph", what, ParallelContext())


def measure(cell: Cell, context: ParallelContext) -> dict[str, float]:
    """Errors of this rank, relative to the largest element of the reference: see `errors`."""
    what = CONFIGURATIONS[cell.configuration]
    config = what.model_config(cell.operation, cell.recomputation)
    potential = randomised(config, context=context, plan=cell.plan)  # type: ignore[arg-type]
    result = run(potential, cell.method, what, context)
    return errors(result, reference(cell.configuration), what.shares[context.dp_size][context.dp_rank])


def errors(got: Result, expected: Result, share: tuple[int, ...]) -> dict[str, float]:
    """max|x - x_ref| / max|x_ref| of every output, of the loss and, by name, of every parameter's gradient.

    Gradients that vanish in theory are measured against a small part of the norm of all.
    """
    assert got.outputs.keys() == expected.outputs.keys()
    assert got.gradients.keys() == expected.gradients.keys()
    found = {"loss": abs(got.loss / expected.loss - 1)}
    for name, whole in expected.outputs.items():
        found[name] = _largest(got.outputs[name] - _of_structures(name, whole, share)) / _largest(whole)
    norm = torch.cat([g.flatten() for g in expected.gradients.values()]).norm().item()
    for name, whole in expected.gradients.items():
        scale = max(_largest(whole), PARITY_FLOOR / PARITY * norm)
        found[f"gradient of {name}"] = _largest(got.gradients[name] - whole) / scale
    # A NaN would pass every comparison.
    return {name: error if error == error else float("inf") for name, error in found.items()}


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _of_structures(name: str, whole: Tensor, share: tuple[int, ...]) -> Tensor:
    """Of the reference's outputs those of some structures."""
    if name == keys.FORCES:
        parts = whole.split([len(s[keys.ATOMIC_NUMBERS]) for s in structures()])
        return torch.cat([whole[:0], *(parts[k] for k in share)])
    return whole[list(share)]


@dataclass(frozen=True)
class Outcome:
    """The worst over the ranks of a cell."""

    cell: Cell
    errors: dict[str, float]

    @property
    def outputs(self) -> float:
        """Worst error of energies, forces, stress and loss."""
        return max(e for name, e in self.errors.items() if not name.startswith("gradient"))

    @property
    def gradients(self) -> float:
        """Worst error of a gradient."""
        return max(e for name, e in self.errors.items() if name.startswith("gradient"))

    @property
    def passes(self) -> bool:
        """Within the tolerance."""
        return max(self.errors.values()) <= PARITY

    def __str__(self) -> str:
        name = max(self.errors, key=self.errors.__getitem__)
        return f"{self.cell}: {name} is off by {self.errors[name]:.3g}, allowed {PARITY:g}"


def on_rank(context: ParallelContext, cells: list[Cell]) -> list[dict[str, float]]:
    """Errors of this rank in each cell; the cells' layouts are all of this number of ranks."""
    contexts = {
        layout: grid_context(layout[1], 1, layout[0]) for layout in dict.fromkeys(c[0] for c in cells)
    }
    found = []
    for cell in cells:
        try:
            found.append(measure(cell, contexts[cell.layout]))
        except Exception as error:
            raise RuntimeError(f"in the cell {cell}") from error
    return found


def merged(cells: list[Cell], per_rank: list[list[dict[str, float]]]) -> list[Outcome]:
    """The worst over the ranks."""
    return [
        Outcome(cell, {name: max(rank[k][name] for rank in per_rank) for name in per_rank[0][k]})
        for k, cell in enumerate(cells)
    ]
