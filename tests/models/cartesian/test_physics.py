"""The physics tests on the Cartesian family: all its sets of paths, conservative and direct forces."""

from megagnn.models.potential import Potential
from tests.models.physics import PhysicsTests, model_config, randomised


class TestFull(PhysicsTests):
    def make_potential(self) -> Potential:
        return randomised(model_config(family="cartesian", stress=True))


class TestLeanWithSplines(PhysicsTests):
    def make_potential(self) -> Potential:
        return randomised(model_config(family="cartesian", preset="lean", num_splines=13, stress=True))


class TestVectors(PhysicsTests):
    def make_potential(self) -> Potential:
        return randomised(model_config(family="cartesian", paths="painn", stress=True))


class TestDirectForces(PhysicsTests):
    def make_potential(self) -> Potential:
        return randomised(model_config(family="cartesian", forces="direct", tensor_width=6))
