"""The install: what it does without a compiler, and that its metadata agree with each other."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import megagnn

ROOT = Path(__file__).parents[1]
SENTENCE = "megagnn is installed without compiled kernels and will run on PyTorch alone: "


def build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """setup.py build_ext into a folder of its own, with these environment variables."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext"]
    command += [f"--build-lib={tmp_path / 'lib'}", f"--build-temp={tmp_path / 'temp'}"]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MEGAGNN_") and k not in ("CXX", "NVCC")}
    return subprocess.run(command, cwd=ROOT, env=clean | environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "/nonexistent/g++"}, "no C++ compiler was found (looked for /nonexistent/g++)."),
        ({"CXX": "false"}, "false failed"),
        ({"MEGAGNN_BUILD_OPS": "0"}, "MEGAGNN_BUILD_OPS=0 leaves them out."),
    ],
    ids=["none", "broken", "refused"],
)
def test_without_a_compiler_the_install_goes_through(
    tmp_path: Path, environment: dict[str, str], reason: str
) -> None:
    done = build(tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("megagnn")]
    assert len(said) == 1
    assert said[0].startswith(SENTENCE + reason)
    assert (tmp_path / "lib" / "megagnn" / "ops" / "build_note.txt").read_text().strip() == said[0]
    assert not list((tmp_path / "lib").rglob("_C*"))


def test_a_later_build_leaves_no_older_library(tmp_path: Path) -> None:
    """Otherwise kernels of an older source would be loaded although the build had failed."""
    suffix = distribution_suffix()
    library = tmp_path / "lib" / "megagnn" / f"_C{suffix}"
    library.parent.mkdir(parents=True)
    library.write_text("old")
    assert build(tmp_path, MEGAGNN_BUILD_OPS="0").returncode == 0
    assert not library.exists()


def distribution_suffix() -> str:
    """What the file name of an extension module ends in."""
    import sysconfig

    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert isinstance(suffix, str)
    return suffix


def test_cuda_that_was_asked_for_and_cannot_be_had_is_an_error(tmp_path: Path) -> None:
    done = build(tmp_path, MEGAGNN_CUDA="1", NVCC="/nonexistent/nvcc")
    assert done.returncode != 0
    assert "MEGAGNN_CUDA=1 asks for the CUDA kernels, but nvcc was found neither" in done.stderr


def test_unknown_value_of_the_override(tmp_path: Path) -> None:
    done = build(tmp_path, MEGAGNN_CUDA="yes")
    assert done.returncode != 0
    assert "MEGAGNN_CUDA must be 0, 1 or auto, got yes" in done.stderr


def test_metadata() -> None:
    installed = distribution("megagnn")
    assert installed.version == megagnn.__version__
    assert [e.value for e in installed.entry_points if e.name == "megagnn"] == ["megagnn.cli:main"]


def test_torch_range_admits_the_pin_and_pins_nothing() -> None:
    """Users with a GPU bring their own torch; only the constraints of CPU machines name one release."""
    requirements = [Requirement(line) for line in distribution("megagnn").requires or []]
    (torch,) = [r for r in requirements if r.name == "torch"]
    assert all(clause.operator == ">=" for clause in torch.specifier)
    lines = (ROOT / "tools" / "constraints-cpu.txt").read_text().splitlines()
    (pin,) = [Requirement(line) for line in lines if line.startswith("torch")]
    (version,) = [clause.version for clause in pin.specifier]
    assert torch.specifier.contains(version)


def test_environment_set_up_knows_its_extras() -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "tools" / "setup_env.sh"), "tests"], capture_output=True, text=True, cwd="/"
    )
    assert done.returncode != 0
    assert "setup: no extra named tests; there are test, labels, mpi" in done.stderr
