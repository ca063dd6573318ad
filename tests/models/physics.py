"""Physics that any potential must obey, as a mixin: inherit `PhysicsTests`, give it `make_potential`.

All in float64, at 1e-10 of the largest value unless said otherwise. The weights of the potentials under test
are random and of order one, for freshly initialised branches are near zero and would pass anything.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from scipy.spatial.transform import Rotation
from torch import Tensor

from megagnn.config import config_from_dict
from megagnn.data import keys
from megagnn.data.batch import batch_from_atoms
from megagnn.models.egnn.config import EGNNConfig
from megagnn.models.family import PlanChoice
from megagnn.models.potential import Potential, build_potential
from megagnn.models.statistics import Statistics
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.parameter import layout_of

TOLERANCE = 1e-10
STATISTICS = Statistics(
    elements=(1, 6, 8, 13, 29),
    sources=("molecules", "metals"),
    levels=("xtb", "emt"),
    source_elements=((1, 6, 8, 13, 29),) * 2,
    source_levels=((0,), (1,)),
    references=((-13.0, -56.0, -110.0, -20.0, -50.0), (0.1, 0.2, 0.3, 0.4, 0.5)),
    mean_energy=(-40.0, 0.3),
    mean_neighbours=12.0,
    output_scale=1.5,
)


def model_config(**values: object) -> EGNNConfig:
    """A small model configuration."""
    small = {"width": 16, "num_layers": 3, "num_radial": 8, "cutoff": 4.0}
    return config_from_dict({"model": {**small, **values}, "loss": {"force_weight": 0}}).model


def statistics_of(config: EGNNConfig) -> Statistics:
    """Those above, with pair potentials of random weights where the configuration has some."""
    if not config.pair_splines:
        return STATISTICS
    rng = np.random.default_rng(5)
    levels = 2 if config.level_embedding else 1
    weights = rng.normal(0, 0.3, (levels, 15, config.pair_splines)).tolist()
    return replace(
        STATISTICS,
        pair_weights=tuple(tuple(map(tuple, rows)) for rows in weights),
        pair_constants=tuple(map(tuple, rng.normal(0, 0.3, (2, 5)).tolist())),
    )


def randomised(
    config: EGNNConfig, seed: int = 0, context: ParallelContext | None = None, plan: PlanChoice = "auto"
) -> Potential:
    """A float64 potential with every parameter moved by noise, so that no branch is near zero."""
    potential = build_potential(config, statistics_of(config), seed, torch.float64, context, plan)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in potential.parameters():
            layout = layout_of(parameter)
            noise = torch.randn(layout.full_shape, generator=generator, dtype=torch.float64)
            noise = noise / layout.full_shape[-1] ** 0.5 if parameter.ndim > 1 else 0.1 * noise
            parameter.add_(layout.slice_of(noise))
    return potential


def rattled(atoms: Atoms, seed: int = 1, size: float = 0.08) -> Atoms:
    """Atoms moved off their symmetric places."""
    atoms = atoms.copy()
    atoms.rattle(size, seed=seed)
    return atoms


def ethanol() -> Atoms:
    return rattled(molecule("CH3CH2OH"))


def crystal() -> Atoms:
    """A small, skewed, alloyed cell: neighbours include several images of the same atom."""
    atoms = bulk("Cu", "fcc", a=3.6)
    atoms = atoms * (2, 1, 1)
    atoms.symbols[1] = "Al"
    return rattled(atoms)


def slab() -> Atoms:
    """Periodic in two directions, an adsorbate on top."""
    atoms = fcc111("Cu", (2, 2, 2), a=3.6, vacuum=6.0)
    atoms.pbc = (True, True, False)
    co = molecule("CO")
    co.translate(atoms.positions[-1] + (0, 0, 1.9) - co.positions[1])
    return rattled(atoms + co)


STRUCTURES = {"molecule": ethanol, "crystal": crystal, "slab": slab}


def close(got: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """max|got - expected| <= tolerance * max|expected|."""
    assert got.shape == expected.shape
    scale = expected.abs().max().item()
    assert scale > 0, "the expected value vanishes, so the comparison would show nothing"
    error = (got - expected).abs().max().item()
    assert error <= tolerance * scale, f"error {error:.3g} at scale {scale:.3g}"


def central_difference(energy_4: Tensor, h: float) -> float:
    """Derivative from energies at -2h, -h, h, 2h; error O(h^4)."""
    e = energy_4.tolist()
    return (e[0] - 8 * e[1] + 8 * e[2] - e[3]) / (12 * h)


class PhysicsTests:
    """Invariance, derivatives, locality and finiteness. Subclasses define `make_potential`."""

    def make_potential(self) -> Potential:
        raise NotImplementedError

    @pytest.fixture
    def potential(self) -> Potential:
        return self.make_potential()

    def compute(self, potential: Potential, *atoms: Atoms) -> dict[str, Tensor]:
        config = potential.model.config
        return potential(batch_from_atoms(atoms, config.cutoff, torch.float64, config.has_self_edges))

    def bonding(self, potential: Potential, *atoms: Atoms) -> Tensor:
        """Energies without the references, which would hide small errors behind large totals."""
        config = potential.model.config
        batch = batch_from_atoms(atoms, config.cutoff, torch.float64, config.has_self_edges)
        return potential(batch)[keys.ENERGY] - potential.model.reference_energy(batch)

    @pytest.mark.parametrize("improper", [False, True], ids=["rotation", "reflection"])
    @pytest.mark.parametrize("name", STRUCTURES)
    def test_rotation_and_reflection(self, potential: Potential, name: str, improper: bool) -> None:
        atoms = STRUCTURES[name]()
        matrix = Rotation.from_rotvec([0.4, -1.1, 0.7]).as_matrix() * (-1 if improper else 1)
        moved = atoms.copy()
        moved.set_cell(atoms.cell.array @ matrix)
        moved.positions = atoms.positions @ matrix
        before, after, q = (
            self.compute(potential, atoms),
            self.compute(potential, moved),
            torch.from_numpy(matrix),
        )
        close(after[keys.ENERGY], before[keys.ENERGY])
        if keys.FORCES in before:
            close(after[keys.FORCES], before[keys.FORCES] @ q)
        if keys.STRESS in before and atoms.pbc.all():
            close(after[keys.STRESS], q.T @ before[keys.STRESS] @ q)

    @pytest.mark.parametrize("name", STRUCTURES)
    def test_translation_and_wrapping(self, potential: Potential, name: str) -> None:
        atoms = STRUCTURES[name]()
        moved = atoms.copy()
        moved.positions += [1.3, -2.2, 0.9]
        moved.wrap()
        before, after = self.compute(potential, atoms), self.compute(potential, moved)
        close(after[keys.ENERGY], before[keys.ENERGY])
        if keys.FORCES in before:
            close(after[keys.FORCES], before[keys.FORCES])

    @pytest.mark.parametrize("name", STRUCTURES)
    def test_permutation(self, potential: Potential, name: str) -> None:
        atoms = STRUCTURES[name]()
        order = np.random.default_rng(0).permutation(len(atoms))
        before, after = self.compute(potential, atoms), self.compute(potential, atoms[order])
        close(after[keys.ENERGY], before[keys.ENERGY])
        if keys.FORCES in before:
            close(after[keys.FORCES], before[keys.FORCES][order])

    @pytest.mark.parametrize("name", STRUCTURES)
    def test_forces_are_the_numerical_gradient(self, potential: Potential, name: str) -> None:
        """Central difference of fourth order: O(h^4) + rounding/h, both near 1e-9 at h = 3e-4 Å."""
        if potential.forces != "conservative":
            pytest.skip("direct forces are no derivative")
        atoms = STRUCTURES[name]()
        forces = self.compute(potential, atoms)[keys.FORCES]
        h = 3e-4
        for atom, axis in [(0, 0), (1, 2), (len(atoms) - 1, 1)]:
            images = []
            for step in (-2, -1, 1, 2):
                image = atoms.copy()
                image.positions[atom, axis] += step * h
                images.append(image)
            numerical = -central_difference(self.bonding(potential, *images), h)
            assert numerical == pytest.approx(forces[atom, axis].item(), abs=1e-8 * forces.abs().max().item())

    def test_stress_is_the_numerical_strain_derivative(self, potential: Potential) -> None:
        if not potential.stress:
            pytest.skip("no stress")
        atoms = crystal()
        stress = self.compute(potential, atoms)[keys.STRESS][0]
        h = 3e-4
        for i, j in [(0, 0), (2, 2), (0, 1), (1, 2)]:
            images = []
            for step in (-2, -1, 1, 2):
                strain = np.zeros((3, 3))
                strain[i, j] += 0.5 * step * h
                strain[j, i] += 0.5 * step * h
                image = atoms.copy()
                image.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
                images.append(image)
            numerical = central_difference(self.bonding(potential, *images), h) / atoms.get_volume()
            assert numerical == pytest.approx(stress[i, j].item(), abs=1e-7 * stress.abs().max().item())

    def largest_jump(self, potential: Potential) -> tuple[float, float]:
        """Largest change of energy and forces over 1e-5 Å as an atom crosses another's cutoff, relative."""
        cutoff = potential.model.config.cutoff
        images = []
        for offset in (-5e-6, 5e-6):
            atoms = ethanol()
            # a far atom whose only neighbour within the cutoff is about to leave
            farthest = atoms.positions[:, 0].argmax()
            atoms.append("C")
            atoms.positions[-1] = atoms.positions[farthest] + [cutoff + offset, 0, 0]
            images.append(atoms)
        energy = self.bonding(potential, *images)
        forces = self.compute(potential, *images)[keys.FORCES].chunk(2)
        energy_jump = (energy[1] - energy[0]).abs() / energy.abs().max()
        return energy_jump.item(), ((forces[1] - forces[0]).abs().max() / forces[0].abs().max()).item()

    def test_smooth_at_the_cutoff(self, potential: Potential) -> None:
        """Over 1e-5 Å a continuous derivative changes by some 1e-5 of its size; a jump would not shrink."""
        if not getattr(potential.model.config, "envelope", True):
            pytest.skip(
                "configurations without an envelope are not smooth, see test_without_envelope_it_jumps"
            )
        energy_jump, force_jump = self.largest_jump(potential)
        assert energy_jump < 1e-9
        assert force_jump < 1e-8

    def test_supercell_has_n_times_the_energy(self, potential: Potential) -> None:
        atoms = crystal()
        one, six = self.bonding(potential, atoms), self.bonding(potential, atoms * (1, 2, 3))
        close(six, 6 * one)

    def test_batch_independence(self, potential: Potential) -> None:
        structures = [make() for make in STRUCTURES.values()]
        together = self.compute(potential, *structures)
        alone = [self.compute(potential, atoms) for atoms in structures]
        for key in together:
            close(together[key], torch.cat([outputs[key] for outputs in alone]))

    def test_isolated_atom(self, potential: Potential) -> None:
        """No neighbours: finite energy, no force."""
        outputs = self.compute(potential, Atoms("C", [[0.0, 0.0, 0.0]]))
        assert torch.isfinite(outputs[keys.ENERGY]).all()
        if keys.FORCES in outputs:
            assert outputs[keys.FORCES].abs().max() == 0

    def test_far_atoms_do_not_interact(self, potential: Potential) -> None:
        one, two = ethanol(), ethanol()
        two.positions += [100.0, 0, 0]
        close(self.bonding(potential, one + two), 2 * self.bonding(potential, one))

    def test_coincident_atoms_stay_finite(self, potential: Potential) -> None:
        """Energy, forces and every parameter gradient of a force loss."""
        config = potential.model.config
        atoms = Atoms("CCO", [[0, 0, 0], [0, 0, 0], [0, 0, 1.1]])
        batch = batch_from_atoms([atoms], config.cutoff, torch.float64, config.has_self_edges)
        outputs = potential(batch, create_graph=True)
        loss = sum(value.square().sum() for value in outputs.values())
        loss.backward()
        assert all(torch.isfinite(value).all() for value in outputs.values())
        assert all(torch.isfinite(p.grad).all() for p in potential.parameters() if p.grad is not None)

    def test_empty_batch(self, potential: Potential) -> None:
        """A rank without a structure takes part with zeros."""
        outputs = potential(batch_from_atoms([], 4.0, torch.float64), create_graph=True)
        assert outputs[keys.ENERGY].shape == (0,)
