"""Loss kinds against formulas written out, weights, and how they change over a run."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megagnn.config import config_from_dict
from megagnn.data import keys
from megagnn.data.batch import collate
from megagnn.objective.config import LossConfig
from megagnn.objective.loss import Loss, LossCounts, check_labels, label_counts, weight_at
from megagnn.objective.terms import pointwise
from megagnn.parallel.context import ParallelContext
from tests.data.conftest import make_crystal


def batch_and_outputs(weights: list[tuple[float, float, float]] | None = None) -> tuple[Any, Any]:
    """Three crystals with labels, and predictions that are off by numbers of every size."""
    graphs = []
    for seed, size in enumerate((2, 5, 3)):
        s = make_crystal(size, seed)
        graph = {
            keys.ATOMIC_NUMBERS: s.atomic_numbers,
            keys.POSITIONS: s.positions,
            keys.CELL: s.cell,
            keys.PBC: s.pbc,
            keys.EDGE_INDEX: torch.zeros(2, 0, dtype=torch.int64).numpy(),
            keys.CELL_SHIFTS: torch.zeros(0, 3).numpy(),
            keys.ENERGY: s.energy,
            keys.FORCES: s.forces * (1, 60, 180)[seed],
            keys.STRESS: s.stress,
        }
        graphs.append(graph | ({keys.WEIGHTS: weights[seed]} if weights else {}))
    batch = collate(graphs, torch.float64)
    generator = torch.Generator().manual_seed(1)
    outputs = {}
    for key in (keys.ENERGY, keys.FORCES, keys.STRESS):
        noise = torch.randn(batch[key].shape, generator=generator, dtype=torch.float64)
        outputs[key] = batch[key] + 0.05 * noise * torch.exp(2 * noise.abs())
    return batch, outputs


def total(values: dict[str, Any], batch: Any, outputs: Any) -> float:
    constant = {} if "preset" in values else {"final_energy_factor": 1.0}
    config = config_from_dict({"model": {"stress": True}, "loss": {**constant, **values}}).loss
    loss, _ = Loss(config)(outputs, batch, label_counts(batch, ParallelContext()))
    return float(loss)


def errors(batch: Any, outputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    energy = (outputs[keys.ENERGY] - batch[keys.ENERGY]) / batch[keys.NUM_ATOMS]
    return energy, outputs[keys.FORCES] - batch[keys.FORCES], outputs[keys.STRESS] - batch[keys.STRESS]


def huber(error: Tensor, delta: float) -> Tensor:
    return torch.nn.functional.huber_loss(error, torch.zeros_like(error), delta=delta, reduction="none")


class TestNamedLosses:
    """Each as its own program computes it (MACE's modules/loss.py, NequIP's train/metrics.py)."""

    def test_mace_weighted(self) -> None:
        batch, outputs = batch_and_outputs()
        e, f, _ = errors(batch, outputs)
        expected = e.square().mean() + 100 * f.square().mean()
        assert total({"preset": "mace-weighted"}, batch, outputs) == pytest.approx(float(expected), rel=1e-12)

    def test_mace_stress(self) -> None:
        batch, outputs = batch_and_outputs()
        e, f, s = errors(batch, outputs)
        expected = e.square().mean() + 100 * f.square().mean() + s.square().mean()
        assert total({"preset": "mace-stress"}, batch, outputs) == pytest.approx(float(expected), rel=1e-12)

    def test_mace_huber_is_theirs_over_delta(self) -> None:
        batch, outputs = batch_and_outputs()
        e, f, _ = errors(batch, outputs)
        expected = (huber(e, 0.01).mean() + 100 * huber(f, 0.01).mean()) / 0.01
        assert total({"preset": "mace-huber"}, batch, outputs) == pytest.approx(float(expected), rel=1e-12)

    def test_mace_universal_has_smaller_deltas_for_larger_forces(self) -> None:
        batch, outputs = batch_and_outputs()
        e, f, _ = errors(batch, outputs)
        sizes = batch[keys.FORCES].norm(dim=1)
        assert sizes.min() < 100 < sizes.max()
        assert ((sizes > 200) & (sizes < 300)).any()
        parts = []
        for error, size in zip(f, sizes.tolist(), strict=True):
            factor = 1.0 if size < 100 else 0.7 if size < 200 else 0.4 if size < 300 else 0.1
            parts.append(huber(error, 0.01 * factor))
        expected = (huber(e, 0.01).mean() + 100 * torch.stack(parts).mean()) / 0.01
        value = total({"preset": "mace-universal"}, batch, outputs)
        assert value == pytest.approx(float(expected), rel=1e-12)
        assert value < total({"preset": "mace-huber"}, batch, outputs)

    def test_mace_l1l2(self) -> None:
        batch, outputs = batch_and_outputs()
        e, f, _ = errors(batch, outputs)
        expected = e.abs().mean() + 100 * f.norm(dim=1).mean()
        assert total({"preset": "mace-l1l2"}, batch, outputs) == pytest.approx(float(expected), rel=1e-12)

    def test_nequip(self) -> None:
        batch, outputs = batch_and_outputs()
        e, f, _ = errors(batch, outputs)
        expected = e.square().mean() + f.square().mean()
        assert total({"preset": "nequip"}, batch, outputs) == pytest.approx(float(expected), rel=1e-12)

    def test_what_is_set_comes_before_the_preset(self) -> None:
        config = config_from_dict({"loss": {"preset": "mace-universal", "force_weight": 3.0}}).loss
        assert (config.forces, config.huber_delta, config.force_weight) == ("stratified_huber", 0.01, 3.0)


class TestWeights:
    def test_of_structures_multiply_their_terms(self) -> None:
        weights = [(2.0, 1.0, 0.0), (0.5, 3.0, 1.0), (1.0, 0.0, 4.0)]
        batch, outputs = batch_and_outputs(weights)
        e, f, s = errors(batch, outputs)
        w = torch.tensor(weights, dtype=torch.float64)
        expected = (
            (w[:, 0] * e.square()).mean()
            + 7 * (w[batch[keys.BATCH], 1, None] * f.square()).mean()
            + 5 * (w[:, 2, None, None] * s.square()).mean()
        )
        kinds = {"energy": "mse", "forces": "mse", "stress": "mse"}
        values = {**kinds, "energy_weight": 1.0, "force_weight": 7.0, "stress_weight": 5.0}
        assert total(values, batch, outputs) == pytest.approx(float(expected), rel=1e-12)

    @pytest.mark.parametrize("kind", ["mae", "mse", "huber", "norm", "stratified_huber"])
    def test_of_elements_multiply_their_atoms_forces(self, kind: str) -> None:
        batch, outputs = batch_and_outputs()
        only = {"energy_weight": 0.0, "forces": kind}
        parts = []
        for name in ("H", "C", "O"):
            others = {other: 0.0 for other in ("H", "C", "O") if other != name}
            parts.append(total({**only, "element_weights": others}, batch, outputs))
        assert min(parts) > 0
        assert sum(parts) == pytest.approx(total(only, batch, outputs), rel=1e-12)
        weighted = total({**only, "element_weights": {"H": 2.0, "O": 0.5}}, batch, outputs)
        assert weighted == pytest.approx(2 * parts[0] + parts[1] + 0.5 * parts[2], rel=1e-12)

    def test_an_unknown_element_is_refused(self) -> None:
        with pytest.raises(ValueError, match="names 'Xx', which is no element"):
            LossConfig(element_weights={"Xx": 1.0})


class TestWeightsOverTheRun:
    def test_a_switch(self) -> None:
        config = LossConfig(energy_weight=2.0, final_energy_factor=50.0, change=(0.75, 0.75))
        assert [weight_at(config, "energy", p) for p in (0.0, 0.74, 0.75, 1.0)] == [2, 2, 100, 100]
        assert weight_at(config, "forces", 1.0) == config.force_weight

    def test_a_straight_line(self) -> None:
        config = LossConfig(force_weight=10.0, final_force_factor=0.0, change=(0.5, 0.9))
        found = [weight_at(config, "forces", p) for p in (0.2, 0.5, 0.6, 0.7, 0.9, 1.0)]
        assert found == pytest.approx([10, 10, 7.5, 5, 0, 0])

    def test_validations_judge_by_the_final_ones(self) -> None:
        config = LossConfig(energy_weight=1.0, final_energy_factor=100.0)
        assert Loss(config).weights["energy"] == 100
        assert Loss(config, 0.0).weights["energy"] == 1

    @pytest.mark.parametrize("change", [(0.8, 0.2), (-0.1, 0.5), (0.5, 1.5)])
    def test_shares_that_make_no_sense_are_refused(self, change: tuple[float, float]) -> None:
        with pytest.raises(ValueError, match=r"two rising shares of the run"):
            LossConfig(change=change)

    def test_no_weight_stays_none(self) -> None:
        config = LossConfig(energy_weight=0.0)
        assert config.final_energy_factor == 10
        assert Loss(config).weights["energy"] == 0
        with pytest.raises(ValueError, match="no training structure has a label 'forces'"):
            check_labels({"energy": 0, "forces": 0, "stress": 0}, config)
        check_labels({"energy": 0, "forces": 5, "stress": 0}, config)

    def test_forces_of_fixed_atoms_alone_are_none(self) -> None:
        counts = {"energy": 5, "forces": 5, "stress": 0}
        message = "force_weight is 2 but all atoms of the 5 training structures with forces are held fixed"
        with pytest.raises(ValueError, match=message):
            check_labels(counts, LossConfig(force_weight=2.0), free_forces=False)
        check_labels(counts, LossConfig(force_weight=0.0), free_forces=False)
        check_labels(counts, LossConfig(force_weight=2.0))


def test_strata_must_rise() -> None:
    with pytest.raises(ValueError, match="must have rising sizes"):
        LossConfig(force_strata=((0.0, 1.0), (5.0, 2.0), (1.0, 3.0)))


def test_the_length_of_no_error_has_a_gradient_of_zero() -> None:
    batch, _ = batch_and_outputs()
    outputs = {key: batch[key].clone().requires_grad_() for key in (keys.ENERGY, keys.FORCES)}
    config = LossConfig(forces="norm")
    loss, _ = Loss(config)(outputs, batch, label_counts(batch, ParallelContext()))
    loss.backward()
    gradient = outputs[keys.FORCES].grad
    assert gradient is not None
    assert gradient.abs().max() == 0


def test_huber_in_numbers() -> None:
    """A threshold of 4: 2^2/2 = 2 below it, 4 (10 - 2) = 32 above, divided by the threshold or the unit."""
    error = torch.tensor([0.0, 2.0, -2.0, 4.0, 10.0, -10.0], dtype=torch.float64)
    assert pointwise("huber", error, 4.0).tolist() == [0, 0.5, 0.5, 2, 8, 8]
    assert pointwise("huber", error, 4.0, unit=2.0).tolist() == [0, 1, 1, 4, 16, 16]
    assert pointwise("mse", error, 4.0).tolist() == [0, 4, 4, 16, 100, 100]
    assert pointwise("mae", error, 4.0).tolist() == [0, 2, 2, 4, 10, 10]


def test_only_free_atoms_of_labelled_structures_count() -> None:
    """Errors of 1, 2, 3, ... eV/Å, one an atom: the mean of squares is over the atoms that are left."""
    batch, outputs = batch_and_outputs()  # of 2, 5 and 3 atoms
    batch[keys.FIXED][[1, 3, 4]] = True
    batch[keys.HAS_FORCES][2] = False
    outputs[keys.FORCES] = batch[keys.FORCES] + torch.arange(1.0, 11).double().unsqueeze(1)
    counts = label_counts(batch, ParallelContext())
    assert counts == LossCounts({"energy": 3, "forces": 12, "stress": 27}, atoms=10, edges=0)
    free = [1, 3, 6, 7]
    expected = sum(e * e for e in free) / 4
    only = {"energy_weight": 0.0, "force_weight": 1.0, "forces": "mse"}
    assert total(only, batch, outputs) == pytest.approx(expected, rel=1e-12)
    assert total({**only, "forces": "mae"}, batch, outputs) == pytest.approx(sum(free) / 4, rel=1e-12)


def test_a_term_of_what_the_model_does_not_predict_is_refused() -> None:
    batch, outputs = batch_and_outputs()
    del outputs[keys.STRESS]
    counts = label_counts(batch, ParallelContext())
    with pytest.raises(
        ValueError, match=r"stress_weight is 1 but the model predicts no stress, only energy, "
    ):
        Loss(LossConfig(stress_weight=1.0))(outputs, batch, counts)
    _, shares = Loss(LossConfig(stress_weight=1.0))(outputs, batch, counts, ("energy",))
    assert list(shares) == ["energy"]
