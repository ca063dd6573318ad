"""The tests of the kernels once more, with every access of the kernels checked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.cuda.emulator import ROOT, preloaded

HERE = Path(__file__).parent


def run_again(build_folder: Path, variant: str, tests: list[Path], *options: str) -> None:
    """Runs test files on another build of the kernels, in a process of its own."""
    command = [sys.executable, "-m", "pytest", *map(str, tests), "--emulation", variant, "-x", "-q"]
    cache = ["-o", f"cache_dir={build_folder / variant}"]
    done = subprocess.run(
        [*command, *cache, *options], env=preloaded(variant), capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout


def test_accesses(build_folder: Path) -> None:
    """One outside a buffer or array, or misaligned, ends the process: see test_emulation.py."""
    others = (HERE / "test_emulation.py", Path(__file__))
    run_again(build_folder, "sanitized", [path for path in HERE.glob("test_*.py") if path not in others])


def test_races(build_folder: Path) -> None:
    """A race between two CUDA threads ends the process. Slow, so only the tests of a few blocks are run."""
    tests = [HERE / "test_segment.py", HERE / "test_cartesian_edge.py"]
    run_again(build_folder, "races", tests, "-k", "few_blocks")
