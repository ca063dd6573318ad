"""The interface of a model family: all that the rest of the project knows of it.

A family is a folder under models/ with a configuration (a subclass of `models.config.ModelConfig`), a model
(a subclass of `Model`) and a line in models/registry.py. Pipelines, ZeRO, tensor parallelism, checkpoints,
sweeps and benchmarks read the interface below and nothing else, so a new family trains with all of them at
once (docs/extending.md).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from megagnn.data import keys
from megagnn.models.config import ModelConfig
from megagnn.models.costs import EdgePlan, How, Kept, Pass, Setting
from megagnn.models.pairs import PairPotentials
from megagnn.models.precision import Precision
from megagnn.models.registry import model_class
from megagnn.models.statistics import Statistics
from megagnn.ops import Segments, dual, gather, segment_sum
from megagnn.ops.recompute import recomputed
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.parameter import deferred_parameters, initialise, num_parameters
from megagnn.tensor_parallel.layers import Embedding

NUM_ATOMIC_NUMBERS = 119  # atomic numbers 0..118; 0 stands for none

State = dict[str, Any]
"""Named fields of a batch between two layers: tensors, or `Dual` numbers where the positions are Dual."""
PlanChoice = Literal["auto", "channel", "edge"]
"""`parallel.plan`: how a family may divide its edge work over tensor-parallel ranks."""


class Field(NamedTuple):
    """Shape and type of a field of the state on one rank."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Work(NamedTuple):
    """Multiply-adds of one forward pass: the one count that stages, FLOP counts and sweeps read."""

    per_edge: float
    per_atom: float
    channelwise: float = 0.0
    """Of `per_edge`, what is multiplied channel by channel outside of matrix products, where it counts beside
    them."""


@dataclass(frozen=True)
class Part:
    """The part of a model that a pipeline rank holds, under the names that it has in the whole."""

    layers: tuple[int, ...]
    """Numbers of the layers, rising."""
    embedding: bool = True
    head: bool = True
    """The energy head."""


class Model(nn.Module, ABC):
    """Energy and, with `forces = "direct"`, forces of every structure of a batch; base class of all families.

    Calling it on a batch (megagnn/data/keys.py) returns a dict with `energy` (B,) float64, total energies in
    eV, and with direct forces `forces` (N, 3) in eV/Å, in the type of the positions, the same on all
    tensor-parallel ranks. Conservative forces and stress are derivatives: see `models.potential`. With
    positions and cell as `ops.dual.Dual` numbers the results are Dual ones.

    A family says what is abstract here.

    Attributes:
        wants_atomic_energies: also return `atomic_energies` (N,) float64, eV, which add up to `energy`: the
            network's share of each atom and the constants of its element. Not with Dual numbers.

    Args:
        config: sizes and parts.
        statistics: elements, references and scales of the training split.
        precision: types of parameters and activations, and of the geometry: that of the batch's positions.
        context: ranks that divide the parameters and the work.
        plan: how the edge work is divided over tensor-parallel ranks, for families that have a choice.
        part: what of the model is on this pipeline rank, the whole by default.
    """

    element_index: Tensor
    references: Tensor
    other_labels: tuple[str, ...] = ()
    """Labels (`data.keys.LABELS`) that it predicts beside energy and forces, by its `heads`."""

    def __init__(
        self,
        config: ModelConfig,
        statistics: Statistics,
        precision: Precision = Precision(),  # noqa: B008 (frozen)
        context: ParallelContext | None = None,
        plan: PlanChoice = "auto",
        part: Part | None = None,
    ) -> None:
        super().__init__()
        self.part = part = part or Part(tuple(range(config.num_layers)))
        self.config: Any = config
        self.statistics, self.precision, self.plan = statistics, precision, plan
        self.context = context = context or ParallelContext()
        self.wants_atomic_energies = False
        elements, levels, dtype = len(statistics.elements), len(statistics.levels), precision.parameters
        self.element_embedding = Embedding(elements, config.width, context, dtype) if part.embedding else None
        has_levels = part.embedding and config.level_embedding and levels > 1
        self.level_embedding = Embedding(levels, config.width, context, dtype) if has_levels else None
        self.layers = nn.ModuleList()
        self.energy_head: nn.Module | None = None
        self.heads = nn.ModuleDict()
        element_index = torch.full((NUM_ATOMIC_NUMBERS,), -1)
        element_index[list(statistics.elements)] = torch.arange(len(statistics.elements))
        self.register_buffer("element_index", element_index, persistent=False)
        references = torch.tensor(statistics.baseline(), dtype=torch.float64)
        self.register_buffer("references", references, persistent=False)
        has_pairs = part.head and bool(statistics.pair_weights)
        self.pairs = PairPotentials(statistics, config.cutoff, element_index) if has_pairs else None
        self.build()

    # What a family says.

    @abstractmethod
    def build(self) -> None:
        """Adds the modules of `part`: its layers to `layers`, under their numbers in the whole model, and
        `energy_head`, and beside this the `heads` of other labels, which take the features (N, F/tp) of the
        last state. All arguments of the model are attributes by now."""

    @abstractmethod
    def fields(self, num_layers: int, batch: dict[str, Any]) -> dict[str, Field]:
        """The state of a batch behind so many layers, on this rank: what pipeline stages send each other."""

    @abstractmethod
    def graph(self, batch: dict[str, Any]) -> Any:
        """Edges of a batch as the layers share them; made once for layers that follow one another."""

    @staticmethod
    @abstractmethod
    def work(config: Any, layer: int) -> Work:
        """Multiply-adds of a layer, from its number; of the energy head for `layer = num_layers`."""

    @staticmethod
    def traffic(config: Any, layer: int, plan: EdgePlan, setting: Setting) -> Pass:
        """Elements that a tensor-parallel rank sends in a layer, exactly as `context.Traffic` counts them; of
        the energy head for `layer = num_layers`. Raises ValueError for a family that does not say it."""
        raise ValueError(_unsaid(config, "traffic", "parallel.tensor above 1"))

    @staticmethod
    def kept(config: Any, layer: int, how: How, ranks: int, plan: EdgePlan) -> Kept:
        """What a layer keeps on one of so many tensor-parallel ranks; of embedding, edges and energy head
        for `layer = num_layers`. Raises ValueError for a family that does not say it."""
        raise ValueError(_unsaid(config, "kept", "activations"))

    @staticmethod
    def edge_plan(config: Any, choice: PlanChoice, ranks: int, num_atoms: int, num_edges: int) -> EdgePlan:
        """The plan for a batch of so many atoms and edges."""
        return "channel"

    def planner(self) -> Callable[[dict[str, Tensor]], dict[str, Tensor]] | None:
        """What makes further entries of a batch on the host that save `graph` work in the step, for processes
        that make batches ahead; it can be pickled. None where there is nothing to save."""
        return None

    def direct_forces(self, batch: dict[str, Any], state: State) -> Any:
        """Direct forces (N, 3) in units of the output scale, from the last state; None without them."""
        return state.get("forces")

    def read_ahead(self, prepare: Callable[[int], None]) -> None:
        """`prepare(k)` must be called before the parameters of the k-th layer here are read ahead of its
        turn, for families that do so: under ZeRO stage 3 they may not be there."""

    # What all families share.

    def layer(self, number: int) -> nn.Module:
        return self.get_submodule(f"layers.{number}")

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        return self.outputs(batch, self.run_layers(self.part.layers, batch, self.embed(batch)))

    def run_layers(self, numbers: Sequence[int], batch: dict[str, Any], state: State) -> State:
        """The state behind some layers that follow one another, from the state before them."""
        self.check_geometry(batch[keys.POSITIONS])
        graph = self.graph(batch)
        for number in numbers:
            state = self.run_layer(self.layer(number), state, graph)
        return state

    def run_layer(self, layer: nn.Module, *arguments: Any) -> Any:
        """A layer's results, recomputed in the backward where the configuration says so."""
        if self.config.recompute_layers and torch.is_grad_enabled():
            return recomputed(layer, *arguments)
        return layer(*arguments)

    def reset_parameters(self, seed: int = 0) -> None:
        """Initial weights that pass on variances of order one, last Linears small (docs/model.md).

        They depend on the seed and the parameters' names only, not on the layout (parallel/parameter.py).
        """
        initialise(self, seed)

    def blocks(self) -> list[tuple[str, nn.Module]]:
        """The modules that hold the parameters, with their names, in the order in which they run: the units
        of ZeRO."""
        layers = [(f"layers.{k}", self.layer(k)) for k in self.part.layers]
        first = [("element_embedding", self.element_embedding), ("level_embedding", self.level_embedding)]
        heads = [(f"heads.{name}", head) for name, head in self.heads.items()]
        found = [*first, *layers, ("energy_head", self.energy_head), *heads]
        return [(name, module) for name, module in found if module is not None]

    def num_parameters(self) -> int:
        return num_parameters(self)

    def outputs(self, batch: dict[str, Any], state: State) -> dict[str, Any]:
        """The model's predictions, from the state behind the last layer and the pair potentials beneath."""
        assert self.energy_head is not None
        atoms = Segments(batch[keys.BATCH], batch[keys.GRAPH_PTR])
        energy_N = self.energy_head(state["h"]).double() * self.statistics.output_scale
        if self.pairs is not None:
            energy_N = energy_N + self.pairs.energies(batch)
        outputs = {keys.ENERGY: dual.segment_sum(energy_N, atoms) + self.reference_energy(batch)}
        if self.wants_atomic_energies:
            outputs[keys.ATOMIC_ENERGIES] = energy_N + self.atom_references(batch)
        forces_NC = self.direct_forces(batch, state)
        if forces_NC is not None:
            forces_NC = forces_NC * self.statistics.output_scale
            outputs[keys.FORCES] = forces_NC if self.pairs is None else forces_NC + self.pairs.forces(batch)
        geometry = self.precision.geometry
        return outputs | {name: head(state["h"]).to(geometry) for name, head in self.heads.items()}

    def check_geometry(self, x_NC: Any) -> None:
        """Raises ValueError for positions of another type than the model's geometry."""
        if x_NC.dtype != self.precision.geometry:
            raise ValueError(
                f"the batch's positions must be {self.precision.geometry}, as the model's geometry, got "
                f"{x_NC.dtype}; make the batch with dtype = model.precision.geometry"
            )

    def embed(self, batch: dict[str, Any]) -> State:
        """The first state: `h`, of the element and the level of theory, (N, F/tp); a Dual with Dual
        positions, its tangent zero."""
        assert self.element_embedding is not None
        h_NF: Tensor = self.element_embedding(self.element_index[batch[keys.ATOMIC_NUMBERS]])
        if self.level_embedding is not None:
            atoms = Segments(batch[keys.BATCH], batch[keys.GRAPH_PTR])
            h_NF = h_NF + gather(self.level_embedding(batch[keys.LEVEL]), atoms)
        if isinstance(batch[keys.POSITIONS], dual.Dual):
            return {"h": dual.Dual(h_NF, torch.zeros_like(h_NF))}
        return {"h": h_NF}

    def reference_energy(self, batch: dict[str, Any]) -> Tensor:
        """Sum of the elements' references and the source's shifts of each structure, eV, (B,) float64: the
        "per-element" baseline."""
        return segment_sum(self.atom_references(batch), Segments(batch[keys.BATCH], batch[keys.GRAPH_PTR]))

    def atom_references(self, batch: dict[str, Any]) -> Tensor:
        """The constant part of each atom's energy, eV, (N,) float64: the reference of its element, and the
        shift of its source."""
        element_N = self.element_index[batch[keys.ATOMIC_NUMBERS]]
        return self.references[batch[keys.SOURCE][batch[keys.BATCH]], element_N]


def parameter_names(config: ModelConfig, statistics: Statistics) -> list[str]:
    """Names of the parameters of the whole model, for which no memory is taken."""
    with deferred_parameters():
        return [name for name, _ in model_class(config)(config, statistics).named_parameters()]


def layer_works(config: ModelConfig) -> list[Work]:
    """(L + 1,) work of each layer and of the energy head."""
    work = model_class(config).work
    return [work(config, layer) for layer in range(config.num_layers + 1)]


# Products of a training step in units of one forward: forward, backward with respect to inputs and weights;
# for conservative forces by one backward, see docs/forces.md.
STEP_UNITS = {"none": 3, "direct": 3, "conservative": 8}


def pass_elements(
    config: ModelConfig,
    plan: EdgePlan,
    setting: Setting,
    positions: int = 0,
    layers: Sequence[int] | None = None,
    head: bool = True,
) -> Pass:
    """Elements that a tensor-parallel rank sends, once forward and once backward.

    positions: elements of positions, and of cells under stress, that require grad: 3N (+ 9B), or 0.
    layers, head: what of the model is on the rank's stage, all of it by default.
    """
    numbers = [*(range(config.num_layers) if layers is None else layers), *[config.num_layers] * head]
    parts = [model_class(config).traffic(config, number, plan, setting) for number in numbers]
    backward = sum((part.backward for part in parts), 2 * setting.u * positions)
    return Pass(sum((part.forward for part in parts), Fraction(0)), backward)


def _unsaid(config: ModelConfig, method: str, what: str) -> str:
    return (
        f"the model family '{config.family}' has no `{method}`, without which {what} cannot be planned; add "
        "it to its model (docs/extending.md)"
    )


def step_flops(config: ModelConfig, num_atoms: float, num_edges: float) -> float:
    """Floating-point operations of a training step on graphs of so many atoms and directed edges in all.

    Matrix products only, multiply-adds counted as 2; gathers, sums, activations are of lower order in the
    width. What is recomputed to save memory, and padding, does not count: a run's compute does not depend on
    how its memory was saved.
    """
    works = layer_works(config)
    products = sum(w.per_edge for w in works) * num_edges + sum(w.per_atom for w in works) * num_atoms
    return 2.0 * STEP_UNITS[config.forces] * products
