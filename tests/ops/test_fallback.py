"""Without the extension the operations run on the PyTorch reference, and say so once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from megagnn.ops import extension
from megagnn.ops.allocator import configure_allocator

FALLBACK = """
import sys, warnings
sys.modules["megagnn._C"] = None  # what an import finds where the extension was not built
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from megagnn import ops
    import torch
    s = ops.Segments(torch.tensor([1, 0, 1]), torch.tensor([0, 1, 3]), torch.tensor([1, 0, 2]))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        v = torch.tensor([1.0, 2, 4], dtype=dtype, requires_grad=True)
        out = ops.segment_sum(v, s)
        ops.gather(out * out, s).sum().backward()
        print(ops.backend(), ops.build_info(), out.tolist(), v.grad.tolist(), out.dtype)
messages = [str(w.message) for w in caught if "megagnn.ops" in str(w.message)]
print(len(messages), messages[0])
try:
    ops.segment_sum(torch.ones(2), s)
except ValueError as error:
    print(error)
"""


def run_python(code: str, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_reference_runs_and_warns_once() -> None:
    lines = run_python(FALLBACK)
    for line, dtype in zip(lines, ("float32", "float64", "bfloat16"), strict=False):
        # d/dv of 2 (v0 + v2)^2 + v1^2
        assert line == f"reference {{}} [2.0, 5.0] [20.0, 4.0, 20.0] torch.{dtype}"
    assert lines[3].startswith(
        "1 megagnn.ops: no compiled kernels for any device, the slower PyTorch reference runs."
    )
    assert (
        lines[4] == "segment_sum (reference): values must have one row per entry of index, 3, got shape (2,)"
    )


WHERE = """
import sys, warnings
sys.modules["megagnn._C"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import megagnn.models.egnn.layer
print([(w.filename, w.lineno) for w in caught if "megagnn.ops" in str(w.message)])
"""


def test_the_first_rank_alone_warns_and_names_the_line_of_the_user() -> None:
    assert run_python(WHERE, RANK="0") == ["[('<string>', 6)]"]
    assert run_python(WHERE, RANK="1") == ["[]"]


def test_back_end_is_described() -> None:
    from megagnn import ops

    assert ops.backend() == ("compiled" if extension.module else "reference")
    if extension.module:
        info = ops.build_info()
        assert set(info) == {"version", "compiler", "flags", "torch_version", "cuda_archs", "simd"}
        assert info["simd"] in extension.module.simd_levels()


ALLOCATOR = """
import resource, torch
from megagnn.ops.allocator import configure_allocator
def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(10 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
untouched = faults(2) / 2
done = configure_allocator()
faults(20)  # until the heap has found its size
print(int(done), untouched, faults(4) / 4)
"""


def test_allocator_keeps_memory() -> None:
    """40 MiB freed and taken again are not faulted in anew; without the call they are."""
    done, untouched, kept = map(float, run_python(ALLOCATOR)[-1].split())
    if not done:
        pytest.skip("the C library is not glibc")
    assert untouched > 1000
    assert kept < 0.05 * untouched


def test_allocator_leaves_other_c_libraries_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    assert configure_allocator() is False


@pytest.mark.skipif(extension.module is None, reason="the extension is not built")
def test_device_without_kernels_takes_the_reference_and_warns() -> None:
    from megagnn.ops import Segments, segment_sum

    index = torch.zeros(3, dtype=torch.int64, device="meta")
    values, segments = torch.ones(3, 2, device="meta"), Segments(index, index[:2])
    extension.warn_reference.cache_clear()
    with pytest.warns(RuntimeWarning, match="no compiled kernels for meta"):
        out = segment_sum(values, segments)
    assert out.shape == (1, 2)
