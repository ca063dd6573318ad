"""Tasks of the CPU kernels share nothing they write, under ThreadSanitizer; sizes have 64 bits."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
SOURCE = Path(__file__).with_name("race.cpp")
SIZES = r"(?:width|row|entry|num_\w+)"
NARROW = re.compile(rf"\b(?:int|unsigned|u?int32_t) (\w+) = [^;]*\b{SIZES}\b")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """race.cpp, built with ThreadSanitizer."""
    target = tmp_path_factory.mktemp("race") / "race"
    if not shutil.which("g++"):
        pytest.skip("NOT TESTED: races between tasks, g++ was not found")
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=thread", "-ffp-contract=off", f"-I{CSRC}", "-pthread"]
    done = subprocess.run(["g++", *flags, str(SOURCE), "-o", str(target)], capture_output=True, text=True)
    if "cannot find" in done.stderr and "tsan" in done.stderr:
        pytest.skip("NOT TESTED: races between tasks, g++ has no ThreadSanitizer here")
    assert done.returncode == 0, done.stderr
    return target


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("NOT TESTED: races between tasks, ThreadSanitizer cannot run on this kernel")
    return done


def test_tasks_do_not_race(program: Path) -> None:
    done = run(program)
    assert done.stdout == "right\n"
    assert done.returncode == 0, done.stderr


def test_a_race_would_be_seen(program: Path) -> None:
    done = run(program, "same rows")
    assert "WARNING: ThreadSanitizer: data race" in done.stderr
    assert done.returncode != 0


def narrow_sizes(source: str) -> list[str]:
    """Variables of 32 bits that are made of sizes, which may pass 2^31 elements."""
    return [match[1] for match in NARROW.finditer(source)]


def test_sizes_and_offsets_have_64_bits() -> None:
    """Every offset is made of the int64_t that the bindings pass; nothing in between narrows one."""
    names = ("segment", "weighted", "maximum", "scatter", "row_sum", "rows")
    sources = [path for path in CSRC.rglob("*") if path.stem in names and path.is_file()]
    assert len(sources) > 15
    found = {str(path): narrow_sizes(path.read_text()) for path in sources}
    assert not {path: names for path, names in found.items() if names}
    assert narrow_sizes("const int offset = row * width;") == ["offset"]
    assert not narrow_sizes("const int64_t offset = row * width;")
