"""Pair potentials in runs: resumed, begun with a checkpoint, and on direct forces first."""

from pathlib import Path

import numpy as np

from megagnn.checkpoint.single_file import load_potential
from megagnn.models.pair_fit import pair_index
from tests import runs

FEW = ("--train.num_steps", "2", "--optim.warmup_steps", "1", "--train.validate_every", "2")
PAIRS = ("--model.pair_splines", "8", "--model.forces", "conservative")


def test_a_run_keeps_what_it_fitted(tmp_path: Path) -> None:
    """On resume, and where another element begins, which has no pair potential yet."""
    store, out = runs.write_data(tmp_path / "store"), tmp_path / "run"
    assert runs.train(store, out, *FEW, *PAIRS) == 0
    trained = load_potential(out / "checkpoints" / "last").statistics
    weights = np.array(trained.pair_weights)
    assert weights.shape == (1, 3, 8)
    assert np.abs(weights[:, [0, 2]]).max() > 0.1, "copper with copper, silver with silver"
    assert not weights[:, 1].any(), "which are never neighbours"
    more = ("--train.num_steps", "4", "--optim.warmup_steps", "1", "--train.validate_every", "2")
    assert runs.train(store, out, *more, *PAIRS, "--resume") == 0
    assert load_potential(out / "checkpoints" / "last").statistics == trained
    gold = runs.write_gold(tmp_path / "gold")
    begun = runs.make_trainer(
        gold, tmp_path / "tuned", *FEW, *PAIRS, "--init_from", str(out / "checkpoints/last")
    )
    found = np.array(begun.statistics.pair_weights)
    assert begun.statistics.elements == (29, 47, 79)
    assert found.shape == (1, 6, 8)
    for first, second in ((0, 0), (0, 1), (1, 1)):
        at = pair_index(first, second)
        np.testing.assert_array_equal(found[:, at], np.broadcast_to(weights[:, at], found[:, at].shape))
    assert not found[:, 3:].any()
    constants = np.array(trained.pair_constants)  # of clusters and of crystals
    assert np.abs(constants[0] - constants[1]).max() > 0.1
    of_gold = np.array(begun.statistics.pair_constants)
    np.testing.assert_allclose(of_gold, [[*constants.mean(0), 0.0]], rtol=0, atol=1e-12)
    assert begun.statistics.output_scale == trained.output_scale


def test_direct_steps_have_the_same_pairs(tmp_path: Path) -> None:
    store, out = runs.write_data(tmp_path / "store"), tmp_path / "run"
    no_stress = ("--model.stress", "false", "--loss.stress_weight", "0")
    settings = (*FEW, *PAIRS, *no_stress, "--train.direct_steps", "3")
    assert runs.train(store, out, *settings) == 0
    direct, last = (load_potential(out / at / "checkpoints" / "last") for at in ("direct", "."))
    assert direct.statistics == last.statistics
    assert np.abs(np.array(last.statistics.pair_weights)).max() > 0.1
