"""One data set and one run for all tests here."""

from pathlib import Path

import pytest

from tests import runs


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_data(tmp_path_factory.mktemp("data") / "store")


@pytest.fixture(scope="session")
def run_dir(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 60 steps."""
    out_dir = tmp_path_factory.mktemp("runs") / "small"
    assert runs.train(store, out_dir) == 0
    return out_dir


@pytest.fixture(scope="session")
def checkpoint(run_dir: Path) -> Path:
    """One file: the run's best weights."""
    return run_dir / "checkpoints" / "best.safetensors"


@pytest.fixture(scope="session")
def folder(run_dir: Path) -> Path:
    """A sharded checkpoint with all of the run's state."""
    return run_dir / "checkpoints" / "last"
