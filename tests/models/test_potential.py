"""Forces and stress around a model: the seeds of the one backward, strain and volume, in numbers."""

import contextlib

import pytest
import torch

from megagnn.data import keys
from megagnn.data.batch import batch_from_atoms
from megagnn.models.potential import (
    along,
    apply_strain,
    derivatives,
    differentiable,
    frozen,
    per_volume,
    seeds,
)
from tests.models.physics import ethanol, model_config, randomised

POSITIONS = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]
CELLS = [[[2.0, 1.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, -2.0]], [[0.0] * 3] * 3]  # volumes of 8 and of none
# The symmetric part, over 8, is strain': [[1, 2, 0], [2, 0, 3], [0, 3, 0]].
STRESS_BAR = [[[8.0, 32.0, -8.0], [0.0, 0.0, 40.0], [8.0, 8.0, 0.0]]]
FORCES_BAR = [[0.1, 0.2, 0.3], [0.0, 0.0, 0.0], [1.0, 0.0, -1.0]]


def tensor(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def two_structures() -> dict[str, torch.Tensor]:
    """A crystal of two atoms and a molecule of one."""
    return {
        keys.POSITIONS: tensor(POSITIONS),
        keys.CELL: tensor(CELLS),
        keys.BATCH: torch.tensor([0, 0, 1]),
    }


def test_seeds_of_forces_and_stress() -> None:
    """x' = -forces_bar + x strain', cell' = cell strain', strain' = sym(stress_bar)/V."""
    stress_bar = tensor(STRESS_BAR * 2)
    x, cell = seeds(two_structures(), tensor(FORCES_BAR), stress_bar)
    assert cell is not None
    torch.testing.assert_close(x, tensor([[4.9, 10.8, 5.7], [14.0, 26.0, 15.0], [-1.0, 0.0, 1.0]]))
    assert cell.tolist() == [[[4, 4, 3], [4, 0, 6], [0, -6, 0]], [[0] * 3] * 3]
    x, none = seeds(two_structures(), tensor(FORCES_BAR), None)
    assert none is None
    torch.testing.assert_close(x, -tensor(FORCES_BAR))


def test_what_the_seeds_are_seeds_of() -> None:
    moved = along(two_structures(), tensor(FORCES_BAR), None)
    assert moved[keys.POSITIONS].tangent.tolist() == FORCES_BAR
    assert moved[keys.POSITIONS].value.tolist() == POSITIONS
    assert moved[keys.CELL].tangent.abs().max() == 0
    assert moved[keys.CELL].value.tolist() == CELLS
    moved = along(two_structures(), tensor(FORCES_BAR), tensor(STRESS_BAR * 2))
    assert moved[keys.CELL].tangent.tolist() == STRESS_BAR * 2


def test_strain_moves_atoms_and_cells_by_its_symmetric_part() -> None:
    strain = tensor([[[0.0, 0.2, 0.0], [0.0, 0.1, 0.0], [0.0, 0.0, 0.0]], [[0.0] * 3] * 3])
    moved = apply_strain(two_structures(), strain)
    torch.testing.assert_close(
        moved[keys.POSITIONS], tensor([[1.2, 2.3, 3.0], [4.5, 5.9, 6.0], [7.0, 8.0, 9.0]])
    )
    torch.testing.assert_close(
        moved[keys.CELL][0], tensor([[2.1, 1.3, 0.0], [0.2, 2.2, 0.0], [0.0, 0.0, -2.0]])
    )


def test_volumes_and_signs() -> None:
    """Tension is positive; a left-handed cell has a volume, a molecule has none and no stress."""
    batch = two_structures()
    assert per_volume(batch[keys.CELL]).tolist() == [0.125, 0.0]
    gradients = [tensor(FORCES_BAR), tensor(STRESS_BAR * 2)]
    outputs = derivatives(batch, tensor([1.0, 2.0]), gradients)
    assert outputs[keys.FORCES].tolist() == (-tensor(FORCES_BAR)).tolist()
    assert outputs[keys.STRESS].tolist() == [(tensor(STRESS_BAR[0]) / 8).tolist(), [[0.0] * 3] * 3]
    assert list(derivatives(batch, tensor([1.0]), gradients[:1])) == [keys.ENERGY, keys.FORCES]


def test_what_wants_gradients() -> None:
    moved, inputs = differentiable(two_structures(), stress=False)
    assert [i.shape for i in inputs] == [(3, 3)]
    assert moved[keys.POSITIONS].requires_grad
    moved, inputs = differentiable(two_structures(), stress=True)
    assert [i.shape for i in inputs] == [(3, 3), (2, 3, 3)]
    assert moved[keys.POSITIONS].tolist() == POSITIONS
    assert moved[keys.CELL].requires_grad


def test_within_frozen_no_parameter_wants_a_gradient() -> None:
    """Afterwards those do that did before, and no others; also where something goes wrong."""
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    found = []
    with contextlib.suppress(KeyError), frozen(model):
        found = [p.requires_grad for p in model.parameters()]
        raise KeyError
    assert found == [False, False]
    assert model.weight.requires_grad
    assert not model.bias.requires_grad


@pytest.mark.parametrize("forces", ["direct", "none"])
def test_without_derivatives_outputs_are_the_models_own(forces: str) -> None:
    potential = randomised(model_config(forces=forces))
    batch = batch_from_atoms([ethanol()], 4.0, torch.float64)
    outputs, own = potential(batch), potential.model(batch)
    assert outputs.keys() == own.keys()
    assert (keys.FORCES in outputs) == (forces == "direct")
    for key, value in own.items():
        assert torch.equal(outputs[key], value), key
