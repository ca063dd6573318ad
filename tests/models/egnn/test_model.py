"""What the parts of the model see: level of theory, source, element, seed."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megagnn.data import keys
from megagnn.data.batch import batch_from_atoms
from megagnn.models.potential import Potential, build_potential
from tests.models.physics import STATISTICS, ethanol, model_config, randomised


def outputs(potential: Potential, level: int = 0, source: int = 0) -> dict[str, Tensor]:
    batch = batch_from_atoms([ethanol()], potential.model.config.cutoff)
    batch[keys.LEVEL].fill_(level)
    batch[keys.SOURCE].fill_(source)
    return potential(batch)


def test_the_level_of_theory_changes_energy_and_forces() -> None:
    """Two Hamiltonians label one geometry differently; the embedding lets a model learn both."""
    potential = randomised(model_config())
    one, other = outputs(potential, level=0), outputs(potential, level=1)
    assert (one[keys.ENERGY] - other[keys.ENERGY]).abs() > 1e-3
    assert (one[keys.FORCES] - other[keys.FORCES]).abs().max() > 1e-3


def test_without_the_embedding_levels_are_the_same() -> None:
    potential = randomised(model_config(level_embedding=False))
    assert torch.equal(outputs(potential, level=0)[keys.FORCES], outputs(potential, level=1)[keys.FORCES])


def test_the_source_changes_the_references_only() -> None:
    potential = randomised(model_config())
    one, other = outputs(potential, source=0), outputs(potential, source=1)
    assert torch.equal(one[keys.FORCES], other[keys.FORCES])
    per_element = [torch.tensor(row, dtype=torch.float64) for row in STATISTICS.references]
    counts = torch.tensor([6.0, 2.0, 1.0, 0.0, 0.0], dtype=torch.float64)  # C2H6O
    expected = (counts * (per_element[0] - per_element[1])).sum()
    assert (one[keys.ENERGY] - other[keys.ENERGY]).item() == pytest.approx(expected.item(), rel=1e-12)


def test_weights_depend_on_the_seed_alone() -> None:
    state = torch.get_rng_state()
    a, b, c = (build_potential(model_config(), STATISTICS, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    pairs = list(zip(a.parameters(), b.parameters(), c.parameters(), strict=True))
    assert all(torch.equal(x, y) for x, y, _ in pairs)
    assert any(not torch.equal(x, z) for x, _, z in pairs)


def test_large_totals_keep_their_mev() -> None:
    """In a float32 model the energy is float64: references of 1e5 eV do not swallow what the network says."""
    potential = build_potential(model_config(), STATISTICS)
    batch = batch_from_atoms([ethanol()], 4.0, torch.float32)
    small = potential(batch)[keys.ENERGY] - potential.model.reference_energy(batch)
    potential.model.references.add_(1e5)
    large = potential(batch)[keys.ENERGY] - potential.model.reference_energy(batch)
    assert large.dtype == torch.float64
    assert (large - small).abs() < 1e-9


def test_direct_forces_have_no_largest_value() -> None:
    """The tanh of the `study` preset bounds coordinate updates; a bounded force could not fit close atoms."""
    potential = randomised(model_config(preset="study", forces="direct"))
    before = outputs(potential)[keys.FORCES].abs().max()
    out = potential.model.layers[-1].vector.out  # type: ignore[index]
    with torch.no_grad():
        out.weight.mul_(1e3)
    assert outputs(potential)[keys.FORCES].abs().max() > 100 * before
    assert potential.model.layers[0].edge_operation.spec.bounded  # type: ignore[index]


@pytest.mark.parametrize("forces", ["conservative", "direct", "none"])
def test_atomic_energies_sum_to_the_energy(forces: str) -> None:
    """Of structures of two sources, which have references of their own."""
    potential = randomised(model_config(forces=forces))
    batch = batch_from_atoms([ethanol(), ethanol()[:3], ethanol()[:1]], potential.model.config.cutoff)
    batch[keys.SOURCE] = torch.tensor([0, 1, 1])
    plain = potential(batch)
    assert keys.ATOMIC_ENERGIES not in plain, "only where asked for"
    potential.model.wants_atomic_energies = True
    predicted = potential(batch)
    assert torch.equal(predicted[keys.ENERGY], plain[keys.ENERGY])
    energy_N = predicted[keys.ATOMIC_ENERGIES]
    assert energy_N.shape == (13,)
    sums = torch.stack([part.sum() for part in energy_N.split([9, 3, 1])])
    assert (sums - predicted[keys.ENERGY]).abs().max() < 1e-10
    network_N = energy_N - potential.model.atom_references(batch)
    assert network_N.abs().max() > 1e-3, "more than references"


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("forces", ["conservative", "direct", "none"])
def test_without_gradients_all_around(forces: str, mode: type[torch.no_grad]) -> None:
    """The model, the batch and the call within torch.inference_mode give what they give outside."""

    def predicted() -> dict[str, Tensor]:
        potential = randomised(model_config(forces=forces))
        return potential(batch_from_atoms([ethanol()], potential.model.config.cutoff))

    expected = predicted()
    with mode():
        found = predicted()
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert (value - expected[key]).abs().max() < 1e-12


def test_atomic_energies_hold_the_shift_of_their_source() -> None:
    """Beside references of free atoms, the mean binding energy of a source is shared by its atoms."""
    energies = []
    for shifts in ((), (0.0, -2.5)):
        potential = build_potential(model_config(), replace(STATISTICS, shifts=shifts), 3, torch.float64)
        potential.model.wants_atomic_energies = True
        batch = batch_from_atoms([ethanol(), ethanol()], potential.model.config.cutoff)
        batch[keys.SOURCE] = torch.tensor([0, 1])
        predicted = potential(batch)
        sums = torch.stack([part.sum() for part in predicted[keys.ATOMIC_ENERGIES].split([9, 9])])
        assert (sums - predicted[keys.ENERGY]).abs().max() < 1e-10
        energies.append(predicted[keys.ATOMIC_ENERGIES])
    assert (energies[1] - energies[0])[:9].abs().max() == 0
    assert (energies[1] - energies[0] + 2.5)[9:].abs().max() < 1e-12
