"""The tests of the kernels once more, with kernels that check every access to memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.cuda.emulator import ROOT, preloaded


def test_kernels_under_sanitizers(build_folder: Path) -> None:
    """An access outside a buffer or array, or a misaligned one, ends the process: see test_emulation.py."""
    here = Path(__file__).parent
    tests = [str(path) for path in sorted(here.glob("test_*.py"))]
    for other in ("test_emulation.py", Path(__file__).name):
        tests.remove(str(here / other))
    assert tests
    options = ["--emulation", "sanitized", "-x", "-q", "-o", f"cache_dir={build_folder / 'sanitized'}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *tests, *options],
        env=preloaded(),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
