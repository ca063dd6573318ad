"""Orders of epochs, whole and by windows, and sources mixed by temperature."""

import numpy as np
import pytest

from megagnn.data import order as order_module
from megagnn.data.order import EpochOrder, shares


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 100 structures, of blocks of 8, from 50 structures on."""
    for name, size in (("WHOLE", 50), ("BLOCK", 8), ("WINDOW", 100)):
        monkeypatch.setattr(order_module, name, size)


def drawn(order: EpochOrder, epoch: int, first: int = 0) -> list[int]:
    return [int(k) for window in order.windows(epoch, first) for k in window]


def test_up_to_a_size_it_is_one_permutation() -> None:
    order = EpochOrder(30, seed=4)
    assert drawn(order, 2) == np.random.default_rng((4, 2)).permutation(30).tolist()
    assert drawn(EpochOrder(30, shuffle=False), 2) == list(range(30))


@pytest.mark.usefixtures("small")
def test_windows_hold_every_structure_once_near_its_block() -> None:
    order = EpochOrder(1003, seed=4)
    windows = list(order.windows(1))
    assert sorted(np.concatenate(windows)) == list(range(1003))
    assert len(windows) == 11
    assert max(map(len, windows)) <= 100
    blocks = [len(np.unique(window // 8)) for window in windows]
    assert max(blocks) <= 15, "a window reads from few places"
    assert all((np.diff(window) < 0).any() for window in windows), "and shuffles what it reads"
    assert drawn(order, 1) == drawn(EpochOrder(1003, seed=4), 1)
    assert drawn(order, 1) != drawn(order, 2)
    assert drawn(order, 1) != drawn(EpochOrder(1003, seed=5), 1)
    for first in (0, 1, 91, 92, 500, 1003):
        assert drawn(order, 1, first) == drawn(order, 1)[first:]
    assert drawn(EpochOrder(1003, shuffle=False), 1) == list(range(1003))


@pytest.mark.parametrize("windowed", [False, True])
def test_a_temperature_shares_the_draws(windowed: bool, request: pytest.FixtureRequest) -> None:
    if windowed:
        request.getfixturevalue("small")
    sources = np.repeat([0, 2, 1], [800, 150, 50])  # in the data one after another
    order = EpochOrder(1000, 3, sources=sources, temperature=2.0)
    roots = np.sqrt([800, 50, 150])
    epochs = [drawn(order, epoch) for epoch in range(8)]
    for draws in epochs:
        counts = np.bincount(sources[draws])
        assert np.abs(counts - 1000 * roots / roots.sum()).max() < 1
        assert drawn(order, 0, 700) == epochs[0][700:]
    times = np.bincount(np.concatenate(epochs), minlength=1000)
    for source in range(3):
        own = times[sources == source]
        assert own.max() - own.min() <= 1, "all structures of a source come equally often"
    assert np.bincount(epochs[0]).max() <= 5
    assert times[sources == 1].min() > 3 * times[sources == 0].max()


def test_a_temperature_of_one_mixes_nothing() -> None:
    sources = np.repeat([0, 1], [20, 10])
    assert drawn(EpochOrder(30, 4, sources=sources), 3) == drawn(EpochOrder(30, 4), 3)


def test_shares() -> None:
    assert shares([100, 900], 1.0) == (100, 900)
    assert shares([100, 900], 1e9) == (500, 500)
    assert shares([10, 10, 10, 1], 1e9) == (8, 8, 8, 7)
    assert shares([10**8, 1], 1.0) == (10**8, 1)
    assert shares([10**6, 1], 0.5) == (10**6 + 1, 1), "a source that would get no draw gets one"
    assert shares([0, 5], 3.0) == (0, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0, "sources": np.zeros(3, int)}, "must be positive, got 0.0"),
        ({"temperature": 2.0}, "needs the source of each structure"),
    ],
)
def test_refuses_temperatures(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EpochOrder(3, **options)  # type: ignore[arg-type]
