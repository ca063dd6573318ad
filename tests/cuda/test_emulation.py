"""The emulation of CUDA threads finds each mistake of wrong_kernels.cu, and none where there is none."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cuda.emulator import CUDA, ORDERS, ROOT, Emulator, LaunchError, build, preloaded

WRONG = [Path(__file__).parent / "wrong_kernels.cu", CUDA / "runtime.cu"]


@pytest.fixture(scope="module", params=["plain", "ucontext"])
def wrong(request: pytest.FixtureRequest, build_folder: Path) -> Emulator:
    """The wrong kernels, with both ways to switch fibers."""
    return Emulator(build("wrong", WRONG, build_folder, request.param))


def numbers(size: int = 64) -> torch.Tensor:
    return torch.arange(float(size))


def test_reverse_with_its_barrier(wrong: Emulator) -> None:
    for order in ORDERS:
        with wrong.order(order):
            values = numbers()
            wrong("reverse", 0, values)
            assert torch.equal(values, numbers().flip(0))


@pytest.mark.parametrize("order", ORDERS)
def test_missing_barrier(wrong: Emulator, order: str) -> None:
    values = numbers()
    with wrong.order(order):
        wrong("reverse", 1, values)
    assert not torch.equal(values, numbers().flip(0))
    assert values.isnan().any(), "what no thread has written yet is NaN"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (2, r"thread \(0, 0, 0\) waits in __syncthreads \(.*cu:\d+\), thread \(32, 0, 0\) waits in __sync"),
        (3, r"thread \(0, 0, 0\) waits in __syncthreads \(.*cu:\d+\), thread \(3, 0, 0\) has returned"),
        (4, r"deadlock: .*waits in __syncthreads .*thread \(40, 0, 0\) waits in __shfl_sync with mask 0xfff"),
    ],
)
def test_divergent_barrier(wrong: Emulator, how: int, message: str) -> None:
    for order in ORDERS:
        where = r"error 719: reverse_kernel<.*> \(tests/cuda/wrong_kernels.cu:\d+\), block \(0, 0, 0\): "
        with wrong.order(order), pytest.raises(LaunchError, match=where):
            wrong("reverse", how, numbers())
    with pytest.raises(LaunchError, match=message):
        wrong("reverse", how, numbers())
    wrong("reverse", 0, numbers())  # a fault is over with its launch


def test_missing_syncwarp(wrong: Emulator) -> None:
    for order in ORDERS:
        with wrong.order(order):
            right, bad = numbers(32), numbers(32)
            wrong("warp_sum", 1, right)
            assert (right == 496).all()
            wrong("warp_sum", 0, bad)
            assert bad.isnan().any()


def test_shuffle_of_a_whole_warp(wrong: Emulator) -> None:
    for order in ORDERS:
        with wrong.order(order):
            values = numbers()
            wrong("shuffle", 0, 64, values)
            assert torch.equal(values, numbers() + numbers().view(2, 2, 16).flip(1).flatten())


@pytest.mark.parametrize(
    ("how", "num_threads", "message"),
    [
        (0, 48, "its mask names lane 16, which is not in the block"),
        (1, 64, r"thread \(1, 0, 0\) in __shfl_xor_sync .*: its mask names lane 0, which has returned"),
        (2, 32, r"thread \(16, 0, 0\) in __shfl_xor_sync .*: its mask does not name the lane that calls"),
        (3, 32, "it reads lane 28, which its mask does not name"),
        (4, 32, r"lanes of one mask meet in different calls: thread \(0.*cu:\d+\), thread \(7.*cu:\d+\)"),
        (5, 32, "its width must be a power of 2 up to 32, got 24"),
        (6, 32, r"waits in __shfl_xor_sync with mask 0xffffffff \(.*\), thread \(31, 0, 0\) has returned"),
    ],
)
def test_wrong_shuffle(wrong: Emulator, how: int, num_threads: int, message: str) -> None:
    with pytest.raises(LaunchError, match=f"^error 719: shuffle_kernel.*{message}"):
        wrong("shuffle", how, num_threads, numbers())
    for order in ORDERS[1:]:
        with wrong.order(order), pytest.raises(LaunchError, match=r"^error 719: shuffle_kernel"):
            wrong("shuffle", how, num_threads, numbers())


def test_blocks_that_need_an_order(wrong: Emulator) -> None:
    results = []
    for order in ORDERS:
        with wrong.order(order):
            values = torch.ones(5)
            wrong("running_sum", 5, values)
            results.append(values.tolist())
    assert results[:2] == [[1, 2, 3, 4, 5], [1, 2, 2, 2, 2]]
    assert results[2] not in results[:2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 65536, 1, 1, 0, 0), r"error 9: nothing_kernel.*got \(1, 65536, 1\)"),
        ((0, 1, 1, 1, 0, 0), r"error 9: .*not empty, got \(0, 1, 1\)"),
        ((1, 1, 1025, 1, 0, 0), r"error 9: .*1 to 1024 threads, at most 64 along z, got \(1025, 1, 1\)"),
        ((1, 1, 1, 65, 0, 0), r"error 9: .*at most 64 along z, got \(1, 1, 65\)"),
        ((1, 1, 1, 1, 49153, 0), r"error 1: .*at most 49152 bytes, got 49153; .*cudaFuncSetAttribute"),
        ((1, 1, 1, 1, 60001, 60000), "error 1: .*at most 60000 bytes, got 60001"),
        ((1, 1, 1, 1, 0, 232449), "error 1: .*at most 232448 bytes, got 232449"),
    ],
)
def test_limits_of_a_launch(build_folder: Path, arguments: tuple[int, ...], message: str) -> None:
    emulator = Emulator(build("wrong", WRONG, build_folder))
    with pytest.raises(LaunchError, match=message):
        emulator("launch", *arguments)


def test_largest_launches(build_folder: Path) -> None:
    emulator = Emulator(build("wrong", WRONG, build_folder))
    emulator("launch", 1, 65535, 1, 1, 0, 0)
    emulator("launch", 2, 2, 16, 64, 49152, 0)
    emulator("launch", 1, 1, 1024, 1, 232448, 232448)


def run_sanitized(library: Path, variant: str, call: str) -> subprocess.CompletedProcess[str]:
    """Calls a launcher on numbers, 64 floats, in a process of its own."""
    program = f"""
import ctypes
library, numbers = ctypes.CDLL({str(library)!r}), (ctypes.c_float * 64)()
raise SystemExit(library.{call})
"""
    return subprocess.run(
        [sys.executable, "-c", program], env=preloaded(variant), capture_output=True, text=True, cwd=ROOT
    )


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (0, None),
        (1, "AddressSanitizer: heap-buffer-overflow.*READ of size 4.* in access_kernel"),
        (2, r"wrong_kernels.cu:\d+:\d+: runtime error: index 32 out of bounds for type 'float \[32\]'"),
        (3, "AddressSanitizer: heap-buffer-overflow.*WRITE of size 4.* in access_kernel"),
        (4, r"wrong_kernels.cu:\d+:\d+: runtime error: member access within misaligned address"),
    ],
)
def test_sanitizers_name_the_line(build_folder: Path, how: int, message: str | None) -> None:
    library = build("wrong", WRONG, build_folder, "sanitized")
    done = run_sanitized(library, "sanitized", f"access({how})")
    assert (done.returncode == 0) == (message is None), done.stderr
    if message:
        assert re.search(message, done.stderr, re.DOTALL), done.stderr
        assert "wrong_kernels.cu:" in done.stderr


@pytest.mark.parametrize(
    ("call", "lines"),
    [
        ("reverse(0, numbers)", None),
        ("warp_sum(1, numbers)", None),
        ("total(0, numbers)", None),
        ("reverse(1, numbers)", ["tile[me] = numbers[me];", "numbers[me] = tile[size - 1 - me];"]),
        (
            "warp_sum(0, numbers)",
            ["tile[me] = numbers[me];", "for (int i = 0; i < warpSize; ++i) sum += tile[i];"],
        ),
        ("total(1, numbers)", ["numbers[0] += numbers[i];"] * 2),
        ("total(2, numbers)", ["numbers[0] += numbers[i];"] * 2),
        (
            "running_sum(3, numbers)",
            ["if (blockIdx.x > 0) numbers[blockIdx.x] += numbers[blockIdx.x - 1];"] * 2,
        ),
    ],
)
def test_races(build_folder: Path, call: str, lines: list[str] | None) -> None:
    done = run_sanitized(build("wrong", WRONG, build_folder, "races"), "races", call)
    assert (done.returncode == 0) == (lines is None), done.stderr
    if lines is None:
        return
    assert "ThreadSanitizer: data race" in done.stderr
    source = WRONG[0].read_text().splitlines()
    numbers = re.findall(r"#0 .*wrong_kernels.cu:(\d+)", done.stderr)[:2]
    assert sorted(source[int(number) - 1].strip() for number in numbers) == sorted(lines), done.stderr
