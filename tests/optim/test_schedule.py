"""Learning-rate schedules at their literal points."""

import pytest

from megagnn.optim.config import OptimConfig
from megagnn.optim.schedule import learning_rate


def rates(**values: object) -> list[float]:
    config = OptimConfig(learning_rate=1.0, warmup_steps=4, final_ratio=0.1, **values)  # type: ignore[arg-type]
    return [learning_rate(step, 24, config) for step in range(24)]


def test_warmup_is_linear_and_reaches_the_peak() -> None:
    assert rates(schedule="constant")[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_cosine() -> None:
    values = rates(schedule="cosine")
    assert values[4] == pytest.approx(1.0)
    assert values[14] == pytest.approx(0.55)  # half way between the peak and a tenth of it
    assert values[-1] == pytest.approx(0.1, abs=0.01)
    assert values[4:] == sorted(values[4:], reverse=True)


def test_warmup_stable_decay() -> None:
    values = rates(schedule="wsd", decay_fraction=0.25)
    assert values[4:19] == pytest.approx([1.0] * 15)
    assert values[18:] == pytest.approx([1.0, 0.85, 0.7, 0.55, 0.4, 0.25])
