"""The install: what it does without a compiler, and that its metadata agree with each other."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import distribution
from pathlib import Path
from unittest import mock

import pytest
from packaging.requirements import Requirement

import megagnn

ROOT = Path(__file__).parents[1]
SENTENCE = "megagnn is installed without compiled kernels and will run on PyTorch alone: "
LIBRARY = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


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
    library = tmp_path / "lib" / "megagnn" / LIBRARY
    library.parent.mkdir(parents=True)
    library.write_text("old")
    assert build(tmp_path, MEGAGNN_BUILD_OPS="0").returncode == 0
    assert not library.exists()


def copy_repository(target: Path) -> Path:
    """What an install reads, in a folder of its own, with an older build's library in place."""
    for name in (
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "tools",
        "csrc",
        "megagnn/__init__.py",
    ):
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(ROOT / name, copy) if (ROOT / name).is_dir() else shutil.copy2(ROOT / name, copy)
    (target / "megagnn" / "ops").mkdir()
    library = target / "megagnn" / LIBRARY
    library.write_text("kernels")
    newest = max(path.stat().st_mtime for path in target.rglob("*.*"))
    os.utime(library, (newest + 1, newest + 1))
    return library


def editable_wheel(repository: Path, hidden: Path, **environment: str) -> str:
    """The build of `pip install -e .` where torch cannot be imported; returns what it prints."""
    hidden.mkdir()
    (hidden / "torch.py").write_text("raise ModuleNotFoundError('no torch', name='torch')\n")
    code = "import sys; from setuptools import build_meta; build_meta.build_editable(sys.argv[1])"
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MEGAGNN_")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(hidden)],
        cwd=repository,
        env=clean | {"PYTHONPATH": str(hidden)} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_isolated_build_keeps_the_kernels_it_cannot_build(tmp_path: Path) -> None:
    """`pip install -e .[labels]` sees no torch, and must not undo an install that has kernels."""
    library = copy_repository(tmp_path / "repository")
    said = editable_wheel(tmp_path / "repository", tmp_path / "hidden")
    assert "megagnn keeps the compiled kernels it has: torch is not installed where the build runs" in said
    assert library.read_text() == "kernels"
    assert not (library.parent / "ops" / "build_note.txt").exists()


@pytest.mark.parametrize("why", ["older than its sources", "refused"])
def test_an_isolated_build_keeps_no_other_kernels(tmp_path: Path, why: str) -> None:
    library = copy_repository(tmp_path / "repository")
    if why == "refused":
        said = editable_wheel(tmp_path / "repository", tmp_path / "hidden", MEGAGNN_BUILD_OPS="0")
    else:
        os.utime(library, (0, 0))
        said = editable_wheel(tmp_path / "repository", tmp_path / "hidden")
    assert SENTENCE in said
    assert not library.exists()
    assert (library.parent / "ops" / "build_note.txt").read_text().startswith(SENTENCE)


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
    assert "setup: no extra named tests; there are test, formats, labels, mpi, peers" in done.stderr


def test_environment_set_up_needs_bash() -> None:
    done = subprocess.run(
        ["env", "-u", "BASH_VERSION", "bash", "-c", f"unset BASH_VERSION; . '{ROOT}/tools/setup_env.sh'"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "setup: this is for bash; in another shell run 'bash tools/setup_env.sh', then activate .venv"
    ]


@pytest.mark.parametrize("active", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_environment_set_up_does_nothing_twice(tmp_path: Path, active: str) -> None:
    """In the active environment, of either kind, and under a path that a shell would take for a pattern."""
    repository, environment = tmp_path / "a [b] * c", tmp_path / "environment"
    copy_repository(repository)
    (environment / "bin").mkdir(parents=True)
    python = environment / "bin" / "python"  # one that installs nothing, were it asked to
    python.write_text(f'#!/bin/sh\n[ "$2" = pip ] && exit 9\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if k != "VIRTUAL_ENV" and not k.startswith("CONDA")}
    clean[active] = str(environment)

    def set_up() -> subprocess.CompletedProcess[str]:
        command = ["bash", str(repository / "tools" / "setup_env.sh"), "test"]
        return subprocess.run(command, env=clean, capture_output=True, text=True)

    assert set_up().returncode != 0  # nothing is installed there yet, and pip is refused
    script = (repository / "tools" / "setup_env.sh").read_text().replace('\n_megagnn_setup "$@"\n', "\n")
    (tmp_path / "functions.sh").write_text(script)
    stamp = environment / "megagnn-setup-stamp"
    code = f"PATH='{python.parent}':$PATH; . '{tmp_path}/functions.sh'; _megagnn_fingerprint '{repository}'"
    stamp.write_text(subprocess.check_output(["bash", "-c", code], env=clean, text=True) + "test\n")
    assert set_up().stdout == f"setup: {environment} is up to date\n"
    (repository / "megagnn" / LIBRARY).unlink()
    assert set_up().returncode != 0


def test_version_is_said_without_torch() -> None:
    """torch takes seconds to import."""
    code = "import sys, megagnn.cli as c\ntry: c.main(['--version'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"megagnn {megagnn.__version__}", "False"]


@pytest.mark.parametrize("asked", ["auto", "1"])
def test_nvcc_of_another_major_release(
    asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Objects of nvcc 12 and a torch of CUDA 13 do not fit together; the minor release may differ."""
    with mock.patch("setuptools.setup"):
        setup = runpy.run_path(str(ROOT / "setup.py"))
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.93'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("NVCC", str(nvcc))
    monkeypatch.setenv("MEGAGNN_CUDA", asked)
    assert setup["wanted_nvcc"]("12.4") == str(nvcc)
    fault = f"torch was built for CUDA 13.0, and {nvcc} is of CUDA 12.8: set NVCC or CUDA_HOME to a CUDA 13"
    if asked == "1":
        with pytest.raises(setup["CannotBuildError"], match=re.escape(fault)):
            setup["wanted_nvcc"]("13.0")
    else:
        assert setup["wanted_nvcc"]("13.0") is None
        assert fault in capsys.readouterr().out
