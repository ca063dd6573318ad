"""Shared by all tests: options, warnings that are errors, multi-rank tests last; one data set and one run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megagnn.ops import extension
from tests import runs

# Where a collective has no autograd kernel, PyTorch only warns, and the gradients of a force loss are wrong.
FATAL_WARNINGS = ("error:.*autograd kernel was not registered:UserWarning",)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("megagnn")
    group.addoption("--full", action="store_true", help="parity: the whole matrix, not a cover of all pairs")
    group.addoption("--table", metavar="PATH", help="parity: write the table of errors")


def pytest_configure(config: pytest.Config) -> None:
    for line in FATAL_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "distributed" in item.path.parts)


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


LEVELS = extension.module.simd_levels() if extension.module else ["reference"]


@pytest.fixture(params=LEVELS)
def simd(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each SIMD level this processor has, in turn."""
    if extension.module is None:
        yield request.param
        return
    before = extension.module.simd_level()
    extension.module.set_simd_level(request.param)
    yield request.param
    extension.module.set_simd_level(before)
