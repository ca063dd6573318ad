"""Processor time, and the number of epochs in it."""

import time
from types import SimpleNamespace

import pytest

from tools.peers.clock import Clock, EpochClock, epochs_within


def work(seconds: float) -> str:
    start = time.process_time()
    while time.process_time() - start < seconds:
        pass
    time.sleep(0.1)
    return "done"


def test_only_calls_and_only_processor_time_count() -> None:
    clock = Clock()
    timed = clock.timed(work)
    assert [timed(0.05), work(0.3), timed(seconds=0.01)] == ["done"] * 3
    assert len(clock.seconds) == 2
    assert 0.05 <= clock.seconds[0] < 0.1
    assert 0.01 <= clock.seconds[1] < 0.05


def test_a_call_that_fails_counts_too() -> None:
    def fail() -> None:
        raise RuntimeError("diverged")

    clock = Clock()
    with pytest.raises(RuntimeError, match="diverged"):
        clock.timed(fail)()
    assert len(clock.seconds) == 1


def test_an_epoch_of_lightning_counts_without_its_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EpochClock, "seconds", [])
    clock, trainer = EpochClock(), SimpleNamespace(sanity_checking=True)
    clock.on_validation_start(trainer)
    clock.on_validation_end(trainer)
    trainer.sanity_checking = False
    for _ in range(2):
        clock.on_train_epoch_start(trainer)
        work(0.02)
        clock.on_validation_start(trainer)
        work(0.3)
        clock.on_validation_end(trainer)
        work(0.02)
        clock.on_train_epoch_end(trainer)
    assert len(clock.seconds) == 2
    assert all(0.04 <= seconds < 0.1 for seconds in clock.seconds)


@pytest.mark.parametrize(
    ("budget", "seconds", "epochs"),
    [(100, [10, 10, 10], 10), (100, [30, 10, 10], 8), (99, [5, 10, 12, 10], 9), (20, [10, 10], 2)],
)
def test_epochs_fill_the_budget(budget: float, seconds: list[float], epochs: int) -> None:
    assert epochs_within(budget, seconds) == epochs


def test_too_little_is_refused() -> None:
    with pytest.raises(ValueError, match=r"hold 1 epoch\(s\) of 10.0 s; give 2 or more"):
        epochs_within(19, [10, 10])
    with pytest.raises(ValueError, match=r"hold 0 epoch\(s\)"):
        epochs_within(19, [40, 10])
    with pytest.raises(ValueError, match="try 2 or more"):
        epochs_within(19, [1])
