"""Pair potentials beneath a network: their fit, and their energies and forces in models of every family."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.cluster import Octahedron
from torch import Tensor

from megagnn.config import config_from_dict
from megagnn.data import keys
from megagnn.data.dataset import StructureDataset
from megagnn.data.neighbours import neighbour_list
from megagnn.data.record import Structure
from megagnn.data.store import write_store
from megagnn.models.pair_fit import System, fit_pairs, pair_index, pair_splines
from megagnn.models.pairs import PairPotentials
from megagnn.models.potential import Potential, build_potential
from megagnn.models.statistics import Statistics, compute_statistics
from megagnn.objective.gradient_methods import GRADIENT_METHODS
from megagnn.objective.loss import Loss, label_counts
from megagnn.optim.bucket_reducer import GradientReducer
from megagnn.parallel.context import ParallelContext
from tests.distributed.parity import CONFIGURATIONS, batch_of
from tests.models.physics import PhysicsTests, model_config, randomised, statistics_of

PAIRS = {"family": "cartesian", "pair_splines": 8}


class TestConservative(PhysicsTests):
    def make_potential(self) -> Potential:
        return randomised(model_config(**PAIRS, stress=True))


def potentials(config: Any, elements: tuple[int, ...] = (1, 6, 8, 13, 29)) -> PairPotentials:
    index = torch.full((119,), -1)
    index[list(elements)] = torch.arange(len(elements))
    return PairPotentials(statistics_of(config), config.cutoff, index)


def test_forces_are_minus_the_derivative_of_the_energies() -> None:
    found, batch = potentials(model_config(**PAIRS)), batch_of((0, 1, 2, 5))
    batch |= {keys.POSITIONS: batch[keys.POSITIONS].requires_grad_()}
    (slope_NC,) = torch.autograd.grad(found.energies(batch).sum(), batch[keys.POSITIONS])
    forces_NC = found.forces(batch).detach()
    assert forces_NC.abs().max() > 0.1
    torch.testing.assert_close(forces_NC, -slope_NC, rtol=0, atol=1e-12)
    with torch.inference_mode():
        assert torch.equal(found.forces({k: v.detach().clone() for k, v in batch.items()}), forces_NC)


@pytest.mark.parametrize("family", ["egnn", "painn", "cartesian"])
def test_direct_forces_have_theirs_added(family: str) -> None:
    config = model_config(family=family, forces="direct", pair_splines=8)
    batch, potential = batch_of((0, 1, 2)), randomised(config)
    plain = randomised(replace(config, pair_splines=0))(batch)
    pairs = potential.model.pairs
    assert pairs is not None
    torch.testing.assert_close(
        potential(batch)[keys.FORCES] - plain[keys.FORCES], pairs.forces(batch), rtol=0, atol=1e-12
    )
    added_B = torch.zeros(3, dtype=torch.float64).index_add(0, batch[keys.BATCH], pairs.energies(batch))
    found = potential(batch)[keys.ENERGY] - plain[keys.ENERGY]
    torch.testing.assert_close(found, added_B, rtol=0, atol=1e-9)
    assert found.abs().min() > 1e-3


def test_levels_of_theory_have_their_own() -> None:
    """And elements theirs: another number changes the energy; one table is for all levels."""
    found, batch = potentials(model_config(**PAIRS)), batch_of((0,))
    first, other = (found.energies({**batch, keys.LEVEL: torch.tensor([k])}).sum() for k in (0, 1))
    assert (first - other).abs() > 0.1
    found.weights = found.weights[:1]
    for level in (0, 1):
        assert found.energies({**batch, keys.LEVEL: torch.tensor([level])}).sum() == first


def gradients(method: str, config: Any) -> list[Tensor]:
    what = CONFIGURATIONS["stress"]
    potential, batch, context = randomised(config), batch_of((0, 1, 2, 5)), ParallelContext()
    reducer = GradientReducer(potential.parameters(), context, bucket_bytes=1000)
    reducer.start()
    GRADIENT_METHODS[method](potential, batch, Loss(what.loss_config()), label_counts(batch, context))
    reducer.finish()
    return [p.grad for p in potential.parameters() if p.grad is not None]


def test_both_gradient_methods_agree() -> None:
    config = model_config(**PAIRS, stress=True)
    once, twice = (gradients(method, config) for method in ("one_backward", "create_graph"))
    without = gradients("one_backward", replace(config, pair_splines=0))
    scale = max(g.abs().max() for g in twice)
    assert max((a - b).abs().max() for a, b in zip(once, twice, strict=True)) <= 1e-10 * scale
    assert max((a - b).abs().max() for a, b in zip(once, without, strict=True)) > 1e-3 * scale


def test_pairs_are_numbered_once() -> None:
    first, second = np.tril_indices(5)
    assert pair_index(first, second).tolist() == list(range(15))
    assert (
        pair_index(torch.tensor([0, 3]), torch.tensor([2, 1])).tolist()
        == pair_index(np.array([2, 1]), np.array([0, 3])).tolist()
    )


# ---- the fit

REFERENCES = {13: -20.0, 29: -50.0}


def morse(a: Any, b: Any, d: Any) -> tuple[Any, Any]:
    """A smooth potential that ends at 4 Å, and its slope."""
    depth, place = 0.2 + 0.01 * (a / 2 + b / 2), 2.2 + 0.01 * np.abs(a - 1.0 * b)
    x, end = np.exp(-1.5 * (d - place)), (1 - d / 4.0) ** 3
    value, slope = depth * (x * x - 2 * x), depth * -1.5 * (2 * x * x - 2 * x)
    return value * end, slope * end - value * 0.75 * (1 - d / 4.0) ** 2


def labelled(atoms: Atoms, level: str, factor: float) -> Structure:
    """A structure with labels of the potential times a factor; positions as float32 holds them."""
    atoms.positions = atoms.positions.astype(np.float32)
    edges, shifts = neighbour_list(atoms.positions, atoms.cell.array, atoms.pbc, 4.0)
    r = atoms.positions[edges[1]] + shifts @ atoms.cell.array - atoms.positions[edges[0]]
    d = np.linalg.norm(r, axis=1)
    value, slope = (factor * x for x in morse(*atoms.numbers[edges], d))
    forces = np.zeros((len(atoms), 3))
    np.add.at(forces, edges[0], (slope / d)[:, None] * r)
    return Structure(
        atomic_numbers=atoms.numbers.astype(np.uint8),
        positions=atoms.positions,
        cell=atoms.cell.array,
        pbc=atoms.pbc,
        energy=0.5 * value.sum() + sum(REFERENCES[z] for z in atoms.numbers),
        forces=forces,
        source="cells" if atoms.pbc.all() else "clusters",
        level=level,
        group=f"{level} {len(atoms)} {value.sum()}",
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cells and clusters of aluminium and copper; forces of the second level are half those of the first."""
    rng, found = np.random.default_rng(0), []
    for k in range(60):
        atoms = bulk("Cu", cubic=True) if k % 2 else Octahedron("Cu", 3, 1)
        atoms.symbols[: rng.integers(len(atoms) + 1)] = "Al"
        atoms.rattle(0.2, rng=rng)
        found.append(labelled(atoms, ("one", "half")[k // 2 % 2], (1.0, 0.5)[k // 2 % 2]))
    path = tmp_path_factory.mktemp("pairs") / "store"
    write_store(path, found, splits=np.array([0] * 48 + [2] * 12, dtype=np.uint8))
    return path


def left(store: Path, split: str = "test", **settings: Any) -> tuple[float, float, Statistics]:
    """Errors of forces and energies of the pair potentials alone, in shares of the labels' size."""
    train, test = (StructureDataset([store], name, 4.0) for name in ("train", split))
    statistics = compute_statistics(train, **settings)
    index = torch.full((119,), -1)
    index[list(statistics.elements)] = torch.arange(len(statistics.elements))
    found, batch = PairPotentials(statistics, 4.0, index), test.batch(range(len(test)), torch.float64)
    forces_NC = batch[keys.FORCES].double()
    energy_B = torch.zeros(len(test), dtype=torch.float64).index_add(
        0, batch[keys.BATCH], found.energies(batch)
    )
    model = build_potential(model_config(width=4, num_layers=1), statistics).model
    bonds_B = batch[keys.ENERGY] - model.reference_energy(batch)
    errors = (found.forces(batch) - forces_NC, energy_B - bonds_B)
    return *(
        (x.std() / y.std()).item() for x, y in zip(errors, (forces_NC, bonds_B), strict=True)
    ), statistics


def test_a_pair_potential_is_found(store: Path) -> None:
    forces, energies, statistics = left(store, pair_splines=20)
    assert forces < 0.03
    assert energies < 0.03
    plain = compute_statistics(StructureDataset([store], "train", 4.0))
    assert statistics.references == plain.references, "pairs take nothing that the references hold"
    assert statistics.output_scale < 0.03 * plain.output_scale
    assert Statistics.from_dict(statistics.to_dict()) == statistics
    # one for all levels lies between the two
    assert left(store, pair_splines=20, by_level=False)[0] > 0.2


def test_the_number_of_edges_is_bounded(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megagnn.models.pair_fit.MOST_EDGES", 1)
    monkeypatch.setattr("megagnn.models.pair_fit.FEWEST_STRUCTURES", 0)
    assert left(store, pair_splines=20)[0] > 0.05, "of one structure of each level"


@pytest.mark.parametrize("by_level", [True, False])
def test_a_rare_source_is_in_the_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_level: bool) -> None:
    """Its pairs' energies are off by what goes with the composition where no structure of it is drawn."""
    rng, found = np.random.default_rng(0), []
    rare = np.random.default_rng(0).permutation(40)[-3:].tolist()  # the last to be drawn
    for k in range(40):
        atoms = Octahedron("Cu", 3, 1) if k in rare else bulk("Cu", cubic=True)
        atoms.symbols[: rng.integers(1, 4)] = "Al"
        atoms.rattle(0.2, rng=rng)
        found.append(labelled(atoms, "two" if k == rare[0] else "one", 1.0))
    write_store(tmp_path / "store", found, splits=np.zeros(40, dtype=np.uint8))
    train = StructureDataset([tmp_path / "store"], "train", 4.0)
    elements, references = np.array([13, 29]), np.zeros((2, 119))
    references[:, [13, 29]] = REFERENCES[13], REFERENCES[29]
    monkeypatch.setattr("megagnn.models.pair_fit.MOST_EDGES", int(train.num_edges[:10].sum()))
    clusters = train.sources.index("clusters")
    fit = fit_pairs(train, elements, references, 20, by_level)
    graphs = [dict(train[k]) for k in rare]
    system = System.of(graphs, elements, references, pair_splines(20, 4.0))
    weights = fit.weights[[g[keys.LEVEL] if by_level else 0 for g in graphs]].reshape(3, -1)
    energies = (system.of_energies.toarray() * weights).sum(1)
    constant = system.compositions @ fit.constants[clusters]
    assert np.abs(energies - constant).max() < 0.1 * np.abs(energies).max()
    monkeypatch.setattr("megagnn.models.pair_fit.FEWEST_STRUCTURES", 0)
    drawn = fit_pairs(train, elements, references, 20, False)
    assert not drawn.constants[clusters].any(), "the draw alone has none of it"
    record = train.record
    read: list[int] = []
    monkeypatch.setattr(train, "record", lambda index: (read.append(index), record(index))[1])
    fit_pairs(train, elements, references, 20, by_level)
    assert len(read) < 20, "what is left out is not read"


def test_labels_that_do_not_count_change_nothing(store: Path) -> None:
    train = StructureDataset([store], "train", 4.0)
    elements, references = np.array([13, 29]), train.baseline().references
    graphs = [dict(train[k]) for k in range(10)]
    expected = System.of(graphs, elements, references, pair_splines(12, 4.0)).solve(3)[0]
    for spoilt, label in ((10, keys.FORCES), (11, keys.ENERGY)):
        extra = dict(train[spoilt])
        extra[label] = 100.0 + np.zeros_like(extra[label])
        other = keys.ENERGY if label == keys.FORCES else keys.FORCES
        extra.pop(other)
        extra[keys.WEIGHTS] = np.zeros(3)
        system = System.of([*graphs, extra], elements, references, pair_splines(12, 4.0))
        np.testing.assert_allclose(system.solve(3)[0], expected, rtol=0, atol=1e-9)
        extra[keys.WEIGHTS] = np.ones(3)
        system = System.of([*graphs, extra], elements, references, pair_splines(12, 4.0))
        assert np.abs(system.solve(3)[0] - expected).max() > 0.01


@pytest.mark.parametrize("label", [keys.ENERGY, keys.FORCES])
def test_one_kind_of_label_suffices(store: Path, label: str) -> None:
    train = StructureDataset([store], "train", 4.0)
    graphs = [{k: v for k, v in train[n].items() if k != label} for n in range(48) if n // 2 % 2 == 0]
    system = System.of(graphs, np.array([13, 29]), train.baseline().references, pair_splines(20, 4.0))
    _, *errors = system.solve(3)
    labels = system.forces if label == keys.ENERGY else system.energies
    error = errors[0] if label == keys.ENERGY else errors[1]
    assert len(labels)
    assert error.std() < 0.05 * labels.std()


def test_too_few_splines_are_refused() -> None:
    with pytest.raises(ValueError, match="pair_splines must be 0 or at least 4, got 3; take 16"):
        model_config(pair_splines=3)
    assert config_from_dict({"model": {"pair_splines": 4}}).model.pair_splines == 4
