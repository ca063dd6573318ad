"""The kernels of csrc/cuda, compiled for the processor once a session and kept while they are unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cuda.emulator import CUDA, Emulator, build, find_compiler


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--emulation", default="plain", help="build of the CUDA kernels: see VARIANTS")


@pytest.fixture(scope="session")
def build_folder(request: pytest.FixtureRequest) -> Path:
    """Where built libraries are kept."""
    if find_compiler() is None:
        pytest.skip("the emulation of CUDA needs g++ on Linux")
    return request.config.cache.mkdir("cuda-emulation")


@pytest.fixture(scope="session")
def cuda(request: pytest.FixtureRequest, build_folder: Path) -> Emulator:
    """The launchers of all kernels."""
    variant = request.config.getoption("--emulation", default="plain")
    return Emulator(build("kernels", sorted(CUDA.glob("*.cu")), build_folder, variant))
