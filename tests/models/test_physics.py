"""The physics tests on the named configurations, and proof that they can fail."""

import pytest
import torch
from torch import Tensor

from megagnn.data import keys
from megagnn.models.potential import Potential
from tests.models.physics import PhysicsTests, model_config, randomised


class TestDefault(PhysicsTests):
    def make_potential(self) -> Potential:
        return randomised(model_config(stress=True))


class TestFixedCoordinates(PhysicsTests):
    def make_potential(self) -> Potential:
        return randomised(model_config(stress=True, update_coordinates=False, distance_feature="gaussian"))


class TestDirectForces(PhysicsTests):
    def make_potential(self) -> Potential:
        return randomised(model_config(forces="direct"))


class TestEnergyOnly(PhysicsTests):
    def make_potential(self) -> Potential:
        return randomised(model_config(forces="none"))

    def largest_jump(self, potential: Potential) -> tuple[float, float]:
        pytest.skip("no forces")


class TestSatorras(PhysicsTests):
    def make_potential(self) -> Potential:
        # squared distances of a random network grow from layer to layer, so it is a shallow one
        return randomised(model_config(preset="satorras", stress=True, num_layers=2))


class TestStudy(PhysicsTests):
    def make_potential(self) -> Potential:
        return randomised(model_config(preset="study", stress=True))

    @pytest.mark.parametrize("name", ["any"])
    def test_forces_are_the_numerical_gradient(self, potential: Potential, name: str) -> None:
        pytest.skip("ReLU has kinks, which a difference quotient of finite step may straddle")

    def test_stress_is_the_numerical_strain_derivative(self, potential: Potential) -> None:
        pytest.skip("ReLU has kinks, which a difference quotient of finite step may straddle")


def test_without_envelope_it_jumps() -> None:
    """The smoothness test sees a missing envelope by orders of magnitude: biases do not vanish."""
    energy_jump, force_jump = TestDefault().largest_jump(randomised(model_config(envelope=False)))
    assert energy_jump > 1e-4
    assert force_jump > 1e-4


class _Leaky(Potential):
    """A potential whose energy also depends on where the atoms are (`place`) or on their order (`order`)."""

    def __init__(self, fault: str) -> None:
        super().__init__(randomised(model_config()).model)
        self.fault = fault

    def _conservative(self, batch: dict[str, Tensor], create_graph: bool) -> dict[str, Tensor]:
        outputs = super()._conservative(batch, create_graph)
        if self.fault == "place":
            leak_N = batch[keys.POSITIONS].square().sum(-1)
        else:
            leak_N = batch[keys.ATOMIC_NUMBERS].double() * torch.arange(len(batch[keys.BATCH]))
        outputs[keys.ENERGY] = outputs[keys.ENERGY].index_add(0, batch[keys.BATCH], 1e-6 * leak_N)
        return outputs


def test_physics_tests_can_fail() -> None:
    """A fault of 1e-6 in the energy is found by each test that should find it."""
    physics, place = PhysicsTests(), _Leaky("place")
    with pytest.raises(AssertionError, match="error"):
        physics.test_translation_and_wrapping(place, "molecule")
    with pytest.raises(AssertionError, match="error"):
        physics.test_supercell_has_n_times_the_energy(place)
    with pytest.raises(AssertionError, match="error"):
        physics.test_far_atoms_do_not_interact(place)
    with pytest.raises(AssertionError):
        physics.test_forces_are_the_numerical_gradient(_Leaky("place"), "molecule")
    with pytest.raises(AssertionError, match="error"):
        physics.test_permutation(_Leaky("order"), "molecule")
    with pytest.raises(AssertionError, match="error"):
        physics.test_batch_independence(_Leaky("order"))
