"""Which laws are fitted to which runs, and the sentences about those that are not."""

import numpy as np
import pytest

from megagnn.scaling.laws.analysis import SINGLE, Options, analyse, law_of
from megagnn.scaling.laws.forms import BROKEN, POWER, SATURATING
from tests.scaling.synthetic import study

FAST = Options(replicates=20)


def test_a_law_that_is_asked_for_comes_first() -> None:
    sizes = np.geomspace(1e4, 1e7, 8)
    losses = 3 * sizes**-0.3 * np.exp(0.02 * np.random.default_rng(0).normal(size=8))
    assert law_of("L(N)", SINGLE, sizes, losses, FAST).fit.law is POWER
    asked = law_of("L(N)", SINGLE, sizes, losses, FAST, first=SATURATING)
    assert [choice.fit.law for choice in asked.choices] == [SATURATING, POWER, BROKEN]


def test_sizes_with_too_few_runs_are_passed_over() -> None:
    """The smallest data size has runs of two widths, the next of five."""
    records = [r for r in study(data=(500, 2000), seeds=1) if r.structures > 500 or r.width < 64]
    analysis = analyse(records, FAST)
    assert list(analysis.by_size) == [2000]
    assert analysis.by_data == {}
    assert "No L(D): it takes at least three data sizes at one model size." in analysis.missing


@pytest.mark.parametrize(("num_groups", "said"), [(1, "1 of 1 groups"), (0, "0 of 1 groups")])
def test_too_few_minima_are_told(num_groups: int, said: str) -> None:
    """Runs of one compute whose losses have a minimum, or fall to the largest."""
    rate = {1: 0.1, 0: 0.0}[num_groups]
    records = []
    for k, record in enumerate(study(widths=(16, 32, 64, 128, 256), data=(500,), seeds=1)):
        loss = float(np.exp(rate * (k - 2) ** 2 - 0.02 * k))
        records.append(type(record)(**{**vars(record), "flops": 1e15, "losses": {"x": (loss, "eV")}}))
    analysis = analyse(records, FAST)
    assert analysis.iso_law is None
    assert any(f"No iso-FLOP scaling of N_opt: {said}" in line for line in analysis.missing)
