"""The report on CUDA kernels reads what ptxas prints, and fails where a kernel spills."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cuda_report import ROOT, Kernel, ReportError, find_nvcc, parse, short, table

LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN7megagnn4cuda6kernelIfLi4EEEvPKf' for 'sm_90'
ptxas info    : Function properties for _ZN7megagnn4cuda6kernelIfLi4EEEvPKf
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 4096 bytes smem, 392 bytes cmem[0]
ptxas info    : Compile time = 83.494 ms
ptxas info    : Compiling entry function '_ZN7megagnn4cuda6kernelIfLi4EEEvPKf' for 'sm_100'
ptxas info    : Function properties for _ZN7megagnn4cuda6kernelIfLi4EEEvPKf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 392 bytes cmem[0]
ptxas info    : Function properties for helper
    0 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads
"""

# 120 numbers that stay in use, where 1024 threads leave 64 registers to each.
SPILLS = """
__global__ void __launch_bounds__(1024) greedy_kernel(volatile float* x) {
  float a[120];
#pragma unroll
  for (int i = 0; i < 120; ++i) a[i] = x[i * 1024 + threadIdx.x];
#pragma unroll
  for (int i = 0; i < 120; ++i) x[i * 1024 + threadIdx.x] = a[i] * a[119 - i] + a[(7 * i) % 120];
}
"""
MODEST = "__global__ void modest_kernel(float* x) { x[threadIdx.x] = 1; }\n"


def report(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/cuda_report.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_parse() -> None:
    kernels = parse("x.cu", LOG)
    assert [(k.arch, k.registers, k.shared, k.stack, k.spills) for k in kernels] == [
        ("sm_90", 64, 4096, 16, 20),
        ("sm_100", 255, 0, 0, 0),
        ("sm_100", 0, 0, 0, 4),
    ]
    assert kernels[2].name == "helper"


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("void megagnn::cuda::sum<__nv_bfloat16, 8>(__nv_bfloat16 const*, long)", "sum<bf16, 8>"),
        ("void (anonymous namespace)::fill<(int)3, (bool)1>(float*)", "fill<3, 1>"),
        ("void megagnn::cuda::scale<megagnn::cuda::Silu<float> >(float (*)(int))", "scale<Silu<float>>"),
        ("plain", "plain"),
    ],
)
def test_short_names(name: str, want: str) -> None:
    assert short(name) == want


def test_table_has_the_most_of_any_architecture() -> None:
    rows = table([Kernel("x.cu", "k", "sm_100", 40, 0, 8, 4), Kernel("x.cu", "k", "sm_80", 32, 16, 0, 0)])
    assert "| source | kernel | registers sm_80 | registers sm_100 |" in rows
    assert rows.splitlines()[2] == "| x.cu | `k` | 32 | 40 | 16 | 8 | 4 |"


def test_a_kernel_that_spills_fails(tmp_path: Path) -> None:
    try:
        find_nvcc()
    except ReportError as error:
        pytest.skip(str(error))
    (tmp_path / "spills.cu").write_text(SPILLS)
    (tmp_path / "modest.cu").write_text(MODEST)
    done = report(str(tmp_path / "spills.cu"), str(tmp_path / "modest.cu"))
    assert done.returncode == 1, done.stdout
    assert "SPILLS: greedy_kernel (spills.cu) on sm_80" in done.stdout
    assert "SPILLS: modest_kernel" not in done.stdout
    assert report(str(tmp_path / "modest.cu")).returncode == 0


def test_what_does_not_compile_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVCC", "false")
    (tmp_path / "modest.cu").write_text(MODEST)
    done = report(str(tmp_path / "modest.cu"))
    assert done.returncode == 1
    assert "false failed" in done.stderr
