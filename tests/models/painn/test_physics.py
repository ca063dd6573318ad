"""The physics tests on PaiNN, with conservative and direct forces."""

from megagnn.models.potential import Potential
from tests.models.physics import PhysicsTests, model_config, randomised


class TestPaiNN(PhysicsTests):
    def make_potential(self) -> Potential:
        return randomised(model_config(family="painn", stress=True))


class TestDirectForces(PhysicsTests):
    def make_potential(self) -> Potential:
        return randomised(model_config(family="painn", forces="direct", radial_basis="gaussian"))
