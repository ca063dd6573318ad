"""The precision policy, and the model in bfloat16 with float32 geometry against float64.

What is measured: the distance from the float64 model *with the same, rounded weights*, so that it is the
computing that is judged; in the norm of all numbers of a kind. bfloat16 keeps 8 bits, an error of 2^-9 per
rounding, and some tens of roundings follow one another in three layers, forward and back. Seen were 0.2 to
1.1 % for outputs and 0.3 to 5 % for gradients; the tolerances leave room for another order of sums.
"""

from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from torch import Tensor

from megagnn.data import keys
from megagnn.data.batch import batch_from_atoms
from megagnn.models.potential import Potential, build_potential
from megagnn.models.precision import Precision, precision_of
from megagnn.objective.config import LossConfig
from megagnn.objective.gradient_methods import GRADIENT_METHODS
from megagnn.objective.loss import Loss, label_counts
from megagnn.parallel.context import ParallelContext
from tests.models.parameter_bytes import bytes_per_parameter
from tests.models.physics import STATISTICS, crystal, ethanol, model_config, randomised, slab

FLOAT32, FLOAT64, BFLOAT16 = torch.float32, torch.float64, torch.bfloat16
OUTPUTS = 0.03
GRADIENTS = 0.08
COSINE = 0.997
MIXED = Precision(BFLOAT16, FLOAT32)

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "stress": {"stress": True},
    "direct": {"forces": "direct"},
    "recompute": {"stress": True, "edge_memory": "recompute", "recompute_layers": True},
    "unfused": {"stress": True, "edge_operation": "unfused"},
    "satorras": {"preset": "satorras", "num_layers": 2, "coordinate_bias": True},
}


def pair(precision: Precision = MIXED, **values: object) -> tuple[Potential, Potential]:
    """A potential, and the float64 one with the same weights; no branch near zero."""
    config = model_config(**values)
    random, low = randomised(config), build_potential(config, STATISTICS, 0, precision)
    high = build_potential(config, STATISTICS, 0, FLOAT64)
    with torch.no_grad():
        for a, b, c in zip(random.parameters(), low.parameters(), high.parameters(), strict=True):
            b.copy_(a)
            c.copy_(b)
    return low, high


def batch_for(potential: Potential, *atoms: Atoms) -> dict[str, Tensor]:
    """The batch in the potential's geometry, with labels."""
    chosen = atoms or (ethanol(), crystal(), slab())
    batch = batch_from_atoms(chosen, potential.model.config.cutoff, potential.model.precision.geometry)
    generator = torch.Generator().manual_seed(0)
    for key in (keys.ENERGY, keys.FORCES, keys.STRESS):
        batch[key] = torch.randn(batch[key].shape, generator=generator, dtype=FLOAT64).to(batch[key].dtype)
    for key in (keys.HAS_ENERGY, keys.HAS_FORCES, keys.HAS_STRESS):
        batch[key] = torch.ones_like(batch[key])
    return batch


def outputs(potential: Potential, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Energies without the references, forces, stress of what has a volume."""
    found = {key: value.detach() for key, value in potential(batch).items()}
    found[keys.ENERGY] = found[keys.ENERGY] - potential.model.reference_energy(batch)
    return found


def gradients(potential: Potential, method: str) -> dict[str, Tensor]:
    """Of a loss on everything that the potential predicts."""
    batch = batch_for(potential)
    weight = 1.0 if potential.stress else 0.0
    loss = Loss(LossConfig("mse", "mse", "mse", stress_weight=weight))
    GRADIENT_METHODS[method](potential, batch, loss, label_counts(batch, ParallelContext()))
    return {name: p.grad for name, p in potential.named_parameters() if p.grad is not None}


def distance(got: Tensor, wanted: Tensor) -> float:
    """|got - wanted| / |wanted|, in float64."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_outputs_are_those_of_float64(name: str) -> None:
    low, high = pair(**CONFIGURATIONS[name])
    got, wanted = outputs(low, batch_for(low)), outputs(high, batch_for(high))
    assert got.keys() == wanted.keys()
    for key in wanted:
        assert distance(got[key], wanted[key]) < OUTPUTS, key
    assert distance(got[keys.FORCES], wanted[keys.FORCES]) > 1e-4, "nothing was rounded"


def test_geometry_in_bfloat16_would_be_seen() -> None:
    """The mistake that the policy is there for: positions of 8 bits."""
    low, high = pair()
    batch = batch_for(low)
    rounded = {**batch, keys.POSITIONS: batch[keys.POSITIONS].bfloat16().float()}
    wanted = outputs(high, batch_for(high))
    assert distance(outputs(low, rounded)[keys.FORCES], wanted[keys.FORCES]) > 2 * OUTPUTS


@pytest.mark.parametrize("method", ["one_backward", "create_graph"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_gradients_of_a_force_loss_are_those_of_float64(name: str, method: str) -> None:
    low, high = pair(**CONFIGURATIONS[name])
    got, wanted = gradients(low, method), gradients(high, method)
    assert got.keys() == wanted.keys()
    assert {g.dtype for g in got.values()} == {BFLOAT16}
    all_got = torch.cat([g.double().flatten() for g in got.values()])
    all_wanted = torch.cat([g.flatten() for g in wanted.values()])
    assert float(torch.nn.functional.cosine_similarity(all_got, all_wanted, dim=0)) > COSINE
    assert distance(all_got, all_wanted) < GRADIENTS
    floor = 1e-3 * all_wanted.norm()
    for key, gradient in wanted.items():
        error = (got[key].double() - gradient).norm() / torch.maximum(gradient.norm(), floor)
        assert error < 3 * GRADIENTS, key


@pytest.mark.parametrize(
    ("precision", "features", "edges"),
    [
        (MIXED, BFLOAT16, FLOAT32),
        (Precision(BFLOAT16, FLOAT64), BFLOAT16, FLOAT32),
        (Precision(FLOAT32, FLOAT64), FLOAT32, FLOAT32),
        (Precision(FLOAT64, FLOAT64), FLOAT64, FLOAT64),
    ],
    ids=str,
)
@pytest.mark.parametrize("forces", ["conservative", "direct"])
def test_types(precision: Precision, features: torch.dtype, edges: torch.dtype, forces: str) -> None:
    """Of outputs, parameters, features and coordinates between layers, vectors."""
    low, _ = pair(precision, forces=forces)
    seen: list[tuple[torch.dtype, ...]] = []
    for layer in low.model.layers:
        layer.register_forward_hook(
            lambda _, inputs, results: seen.append((results[0].dtype, results[1].dtype, inputs[2].dtype))
        )
    found = low(batch_for(low))
    assert found[keys.ENERGY].dtype == FLOAT64
    assert found[keys.FORCES].dtype == precision.geometry
    assert {p.dtype for p in low.parameters()} == {precision.parameters}
    assert seen == [(features, precision.geometry, precision.geometry)] * 3
    assert low.model.distance_feature.centres_R is not None
    assert low.model.distance_feature.centres_R.dtype == edges == precision.edge


def test_geometry_is_that_of_float32() -> None:
    """Vectors and envelope that the first layer gets, to the bit: smooth where they were smooth."""
    seen: list[list[Tensor]] = []
    for precision in (MIXED, Precision()):
        low, _ = pair(precision)
        next(iter(low.model.layers)).register_forward_hook(
            lambda _, inputs, results: seen.append([inputs[2].detach(), inputs[3].envelope_E.detach()])
        )
        low(batch_for(low))
    assert all(torch.equal(x, y) for x, y in zip(*seen, strict=True))


def test_float64_geometry_beside_float32_weights_is_exact_to_float32() -> None:
    low, high = pair(Precision(FLOAT32, FLOAT64), stress=True)
    got, wanted = outputs(low, batch_for(low)), outputs(high, batch_for(high))
    assert max(distance(got[key], wanted[key]) for key in wanted) < 2e-5


def moved(atoms: Atoms, by: float) -> Atoms:
    atoms = atoms.copy()
    atoms.positions += [by, -0.3 * by, 0.1 * by]
    return atoms


@pytest.mark.parametrize(
    ("geometry", "change"), [(FLOAT32, 0.02), (FLOAT64, 1e-3)], ids=["float32", "float64"]
)
def test_far_from_the_origin(geometry: torch.dtype, change: float) -> None:
    """1000 Å away: float32 positions lie on a grid of 6e-5 Å, float64 ones of 1e-13 Å.

    Vectors are differences, so with float64 geometry hardly a feature rounds otherwise. Positions in bfloat16
    would be 4 Å apart.
    """
    low, _ = pair(Precision(BFLOAT16, geometry))
    here, far = (outputs(low, batch_for(low, moved(ethanol(), by))) for by in (0.0, 1000.0))
    for key in here:
        assert distance(far[key], here[key]) < change, key


def test_rotated_forces_are_forces_rotated() -> None:
    """Features are invariant whatever their type; distances of float32 change by roundings."""
    low, _ = pair()
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    atoms, turned = ethanol(), ethanol()
    turned.positions = atoms.positions @ rotation
    before, after = outputs(low, batch_for(low, atoms)), outputs(low, batch_for(low, turned))
    matrix = torch.from_numpy(rotation).float()
    assert distance(after[keys.FORCES], before[keys.FORCES] @ matrix) < OUTPUTS
    assert distance(after[keys.ENERGY], before[keys.ENERGY]) < OUTPUTS


def test_batch_of_another_geometry_is_refused() -> None:
    low, high = pair()
    with pytest.raises(ValueError, match=r"positions must be torch\.float32, .* got torch\.float64"):
        low(batch_for(high))
    low(batch_for(low))


def test_bytes_per_parameter() -> None:
    """The table of the docstring; P = 8."""
    single, half = precision_of("float32"), precision_of("bfloat16")
    expected = {0: (16, 18), 1: (8 + 1, 6 + 12 / 8), 2: (4 + 12 / 8, 2 + 2), 3: (16 / 8, 18 / 8)}
    for stage, both in expected.items():
        assert (bytes_per_parameter(single, stage, 8), bytes_per_parameter(half, stage, 8)) == both
    assert bytes_per_parameter(precision_of("float64"), 0, 1) == 32


def test_names() -> None:
    assert precision_of("float32") == Precision()
    assert precision_of("float64") == Precision(FLOAT64, FLOAT64)
    assert precision_of("bfloat16") == precision_of(BFLOAT16) == precision_of(MIXED) == MIXED
    assert precision_of("float32", "float64") == Precision(FLOAT32, FLOAT64)
    assert (MIXED.sums, MIXED.gradients, MIXED.master) == (FLOAT32,) * 3
    assert precision_of("float64").master is None
    assert str(MIXED) == "bfloat16, geometry float32"
    with pytest.raises(ValueError, match=r"parameters must be one of .* got float16"):
        precision_of("float16")
    with pytest.raises(ValueError, match=r"geometry must be one of .* got bfloat16"):
        precision_of("bfloat16", "bfloat16")
    with pytest.raises(ValueError, match="at least as wide as the parameters, got float64, geometry float32"):
        precision_of("float64", "float32")
    with pytest.raises(ValueError, match=r"types are .* got 'single'"):
        precision_of("single")
