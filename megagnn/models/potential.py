"""Forces and stress of a model: derivatives of its energy, or its own direct head."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megagnn.data import keys
from megagnn.models.config import ModelConfig
from megagnn.models.family import Model, Part, PlanChoice
from megagnn.models.precision import Precision, precision_of
from megagnn.models.registry import model_class
from megagnn.models.statistics import Statistics
from megagnn.ops import dual
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.parameter import deferred_parameters


class Potential(nn.Module):
    """An energy model with forces and stress around it.

    `forces = "conservative"`: F = -dE/dx, and with `stress` the stress dE/d(strain)/V, (B, 3, 3), eV/Å^3,
    tension positive, where x -> x (1 + strain) and the cell with it, strain symmetric (Knuth et al., Comput.
    Phys. Commun. 190, 33 (2015), eq. 25). Structures without a volume get a stress of zero. `forces =
    "direct"`: the model's own forces.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.forces, self.stress = model.config.forces, model.config.stress

    @property
    def statistics(self) -> Statistics:
        """Elements, sources, references and scales of the training split."""
        return self.model.statistics

    def forward(self, batch: dict[str, Tensor], create_graph: bool = False) -> dict[str, Tensor]:
        """Energy (B,) float64 eV, forces (N, 3) eV/Å, stress (B, 3, 3) eV/Å^3 as configured.

        Forces and stress have the type of the positions. With `model.wants_atomic_energies` also atomic
        energies (N,), see `Model`. Works within `torch.no_grad` and `torch.inference_mode`, too.

        Args:
            create_graph: keep the graph of the derivatives, so that a loss on forces can be differentiated.
        """
        if self.forces != "conservative":
            return dict(self.model(batch))
        with contextlib.ExitStack() as stack:
            if torch.is_inference_mode_enabled():  # in which nothing can be differentiated
                stack.enter_context(torch.inference_mode(False))
                batch = {k: t.clone() if t.is_inference() else t for k, t in batch.items()}
            stack.enter_context(torch.enable_grad())
            if not create_graph:
                stack.enter_context(frozen(self.model))
            return self._conservative(batch, create_graph)

    def predictions(
        self, batches: Iterable[dict[str, Tensor]]
    ) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """(batch, outputs of `forward`) for each batch, in their order."""
        for batch in batches:
            yield batch, self(batch)

    def _conservative(self, batch: dict[str, Tensor], create_graph: bool) -> dict[str, Tensor]:
        moved, inputs = differentiable(batch, self.stress)
        predicted = self.model(moved)
        energy_B = predicted[keys.ENERGY]
        gradients = torch.autograd.grad(
            energy_B.sum(), inputs, create_graph=create_graph, allow_unused=True, materialize_grads=True
        )
        outputs = derivatives(batch, energy_B, gradients)
        outputs |= {key: value for key, value in predicted.items() if key not in outputs}
        if not create_graph:
            outputs = {key: value.detach() for key, value in outputs.items()}
        return outputs

    def directional(
        self, batch: dict[str, Tensor], forces_bar: Tensor, stress_bar: Tensor | None = None
    ) -> dict[str, Any]:
        """What the model predicts, and in the tangents how a loss with these cotangents changes through the
        forces: energies (B,), eV, and other labels, as Dual numbers.

        forces_bar (N, 3), dLoss/dF; stress_bar (B, 3, 3), dLoss/d(stress). The gradient
        of  sum(u E) + sum(E')  with respect to the parameters is that of a loss with cotangents u of E,
        forces_bar and stress_bar: with F = -dE/dx and stress = dE/d(strain)/V, E' is taken along
            strain' = sym(stress_bar)/V,   x' = -forces_bar + x strain',   cell' = cell strain'.
        """
        moved = along(batch, *seeds(batch, forces_bar, stress_bar))
        return dict(self.model(moved))


def differentiable(batch: dict[str, Tensor], stress: bool) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The batch with positions, and with `stress` a strain of zero, that require grad; and these."""
    positions_NC = batch[keys.POSITIONS].detach().requires_grad_()
    moved = {**batch, keys.POSITIONS: positions_NC}
    if not stress:
        return moved, [positions_NC]
    strain_B33 = torch.zeros_like(batch[keys.CELL]).requires_grad_()
    return apply_strain(moved, strain_B33), [positions_NC, strain_B33]


def derivatives(batch: dict[str, Tensor], energy_B: Tensor, gradients: Sequence[Tensor]) -> dict[str, Tensor]:
    """Energy, forces and, where there is a second gradient, stress, from dE/dx and dE/d(strain)."""
    outputs = {keys.ENERGY: energy_B, keys.FORCES: -gradients[0]}
    if len(gradients) > 1:
        outputs[keys.STRESS] = gradients[1] * per_volume(batch[keys.CELL])[:, None, None]
    return outputs


def seeds(
    batch: dict[str, Tensor], forces_bar: Tensor, stress_bar: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """x' (N, 3) and cell' (B, 3, 3) of `Potential.directional`; no cell' without cotangents of the stress."""
    x_tangent_NC = -forces_bar
    if stress_bar is None:
        return x_tangent_NC, None
    positions_NC, cell_B33 = batch[keys.POSITIONS], batch[keys.CELL]
    per_volume_B = per_volume(cell_B33)[:, None, None]
    strain_B33 = 0.5 * (stress_bar + stress_bar.transpose(1, 2)) * per_volume_B
    x_tangent_NC = x_tangent_NC + (positions_NC.unsqueeze(-1) * strain_B33[batch[keys.BATCH]]).sum(1)
    return x_tangent_NC, cell_B33 @ strain_B33


def along(batch: dict[str, Tensor], x_tangent_NC: Tensor, cell_tangent_B33: Tensor | None) -> dict[str, Any]:
    """The batch with positions and cells as Dual numbers of these tangents."""
    positions_NC, cell_B33 = batch[keys.POSITIONS], batch[keys.CELL]
    if cell_tangent_B33 is None:
        cell_tangent_B33 = torch.zeros_like(cell_B33)
    return {
        **batch,
        keys.POSITIONS: dual.Dual(positions_NC, x_tangent_NC),
        keys.CELL: dual.Dual(cell_B33, cell_tangent_B33),
    }


def per_volume(cell_B33: Tensor) -> Tensor:
    """1/V of each cell, 1/Å^3, (B,); zero for a structure without a volume."""
    volume_B = torch.linalg.det(cell_B33.detach()).abs()
    has_volume_B = volume_B > 0
    return torch.where(has_volume_B, 1.0 / torch.where(has_volume_B, volume_B, 1.0), 0.0)


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within the context no parameter requires grad, so that nothing is kept for one."""
    wanting = [p for p in module.parameters() if p.requires_grad]
    for p in wanting:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in wanting:
            p.requires_grad_(True)


def apply_strain(batch: dict[str, Tensor], strain_B33: Tensor) -> dict[str, Tensor]:
    """The batch with positions and cells deformed by the symmetric part of a strain, (B, 3, 3)."""
    symmetric_B33 = 0.5 * (strain_B33 + strain_B33.transpose(1, 2))
    strain_N33 = symmetric_B33[batch[keys.BATCH]]
    positions_NC = batch[keys.POSITIONS]
    moved_NC = positions_NC + (positions_NC.unsqueeze(-1) * strain_N33).sum(1)
    cell_B33 = batch[keys.CELL] + batch[keys.CELL] @ symmetric_B33
    return {**batch, keys.POSITIONS: moved_NC, keys.CELL: cell_B33}


def build_potential(
    config: ModelConfig,
    statistics: Statistics,
    seed: int = 0,
    precision: Precision | torch.dtype = torch.float32,
    context: ParallelContext | None = None,
    plan: PlanChoice = "auto",
    deferred: bool = False,
    part: Part | None = None,
) -> Potential:
    """A potential, or the part of one, whose initial weights depend on the seed only, on any layout of ranks.

    precision: a type alone stands for the precision that `precision_of` gives. With `deferred` its parameters
    take no memory yet (parallel/parameter.py).
    """
    # parameters made in inference mode could never be part of a derivative
    with torch.inference_mode(False), deferred_parameters() if deferred else contextlib.nullcontext():
        model = model_class(config)(config, statistics, precision_of(precision), context, plan, part)
    if not deferred:
        model.reset_parameters(seed)
    return Potential(model)
