"""Every misuse of the operations is an error that names operation, back end, rule and what was got."""

from __future__ import annotations

import pytest
import torch

from megagnn import ops
from megagnn.ops import Segments, extension, gather, segment_sum

INDEX, PTR = torch.tensor([0, 0, 2]), torch.tensor([0, 2, 2, 3])
PERM = torch.arange(3)
GOOD = Segments(INDEX, PTR)
compiled = pytest.mark.skipif(extension.module is None, reason="the extension is not built")


def test_wrong_dtype() -> None:
    for dtype, name in ((torch.float16, "float16"), (torch.int64, "int64"), (torch.complex64, "complex64")):
        with pytest.raises(
            ValueError, match=rf"segment_sum \({ops.backend()}\): values must be float32.* got .*{name}"
        ):
            segment_sum(torch.ones(3, dtype=dtype), GOOD)
        with pytest.raises(
            ValueError, match=rf"gather \({ops.backend()}\): values must be float32.* got .*{name}"
        ):
            gather(torch.ones(3, dtype=dtype), GOOD)


def test_wrong_number_of_rows() -> None:
    with pytest.raises(ValueError, match=r"segment_sum .*one row per entry of index, 3, got shape \(4, 2\)"):
        segment_sum(torch.ones(4, 2), GOOD)
    with pytest.raises(ValueError, match=r"gather .*one row per row of ptr, 3, got shape \(2,\)"):
        gather(torch.ones(2), GOOD)
    with pytest.raises(ValueError, match=r"got shape \(\)"):
        segment_sum(torch.tensor(1.0), GOOD)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((INDEX.int(), PTR), r"index must be a vector of int64, got torch.int32 of shape \(3,\)"),
        ((INDEX, PTR[None]), r"ptr must be a vector of int64, got torch.int64 of shape \(1, 4\)"),
        ((INDEX, PTR, PERM.float()), r"perm must be a vector of int64, got torch.float32"),
        ((INDEX, PTR[:0]), "ptr must have one element more than there are rows, got none"),
        ((INDEX, PTR, PERM[:2]), "perm must have one element per entry, got 2 for 3 entries"),
        ((INDEX, PTR.to("meta")), "ptr must be on the device of index, cpu, got meta"),
    ],
)
def test_segments_that_do_not_fit(arguments: tuple[torch.Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Segments(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((INDEX, PTR + 1), "ptr must rise from 0 to the number of entries, 3, got 1 to 4$"),
        ((INDEX, PTR[:3]), "ptr must rise from 0 to the number of entries, 3, got 0 to 2$"),
        ((INDEX, torch.tensor([0, 5, 2, 3])), "got 0 to 3, falling on the way"),
        ((INDEX, PTR, torch.tensor([0, 0, 2])), "perm must name every entry once"),
        ((torch.tensor([0, 2, 0]), PTR), "index must name the rows that ptr and perm give"),
        ((INDEX, PTR, torch.tensor([0, 2, 1])), "index must name the rows that ptr and perm give"),
    ],
)
def test_validate(arguments: tuple[torch.Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Segments(*arguments).validate()


def test_validate_accepts() -> None:
    GOOD.validate()
    Segments(INDEX, PTR, PERM).validate()
    Segments(INDEX.flip(0), PTR, torch.tensor([1, 2, 0])).validate()


@compiled
@pytest.mark.parametrize(
    ("ptr", "message"),
    [
        (PTR + 1, "ptr must rise from 0 to the number of entries, 3, got 1 to 4$"),
        (torch.tensor([0, 2, 2, 4]), "got 0 to 4$"),
        (torch.tensor([0, 5, 2, 3]), "got 0 to 3, falling on the way"),
        (torch.tensor([0, -5, 2, 3]), "got 0 to 3, falling on the way"),
    ],
)
def test_kernel_refuses_a_pointer_out_of_bounds(ptr: torch.Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=r"segment_sum \(cpu\): .*" + message):
        segment_sum(torch.ones(3, 2), Segments(INDEX, ptr))


@compiled
@pytest.mark.parametrize("width", [1, 3, 64, 300])
@pytest.mark.parametrize("wrong", [-1, 3, 2**62])
def test_kernel_refuses_an_entry_out_of_bounds(wrong: int, width: int) -> None:
    perm, index = PERM.clone(), INDEX.clone()
    perm[1] = index[1] = wrong
    with pytest.raises(
        RuntimeError, match=r"segment_sum \(cpu\): perm must lie in \[0, 3\), got an element outside"
    ):
        segment_sum(torch.ones(3, width), Segments(INDEX, PTR, perm))
    with pytest.raises(
        RuntimeError, match=r"gather \(cpu\): index must lie in \[0, 3\), got an element outside"
    ):
        gather(torch.ones(3, width), Segments(index, PTR))


@compiled
def test_operation_called_without_its_python_face() -> None:
    """torch.ops.megagnn is public as well, and must not read past the end of anything."""
    op = torch.ops.megagnn.segment_sum
    values = torch.ones(3, 2)
    with pytest.raises(
        RuntimeError, match=r"segment_sum \(cpu\): values must be float32, float64 or bfloat16, got Half"
    ):
        op(values.half(), INDEX, PTR, None)
    with pytest.raises(RuntimeError, match="index must be a vector of int64, got 1 dimensions of Int"):
        op(values, INDEX.int(), PTR, None)
    with pytest.raises(RuntimeError, match="ptr must have one element more than there are rows, got none"):
        op(values, INDEX, PTR[:0], None)
    with pytest.raises(RuntimeError, match="perm must have one element per entry, got 2 for 3 entries"):
        op(values, INDEX, PTR, PERM[:2])
    with pytest.raises(RuntimeError, match="values must have one row per entry, got 2 for 3"):
        op(values[:2], INDEX, PTR, None)
    with pytest.raises(
        RuntimeError, match=r"gather \(cpu\): values must have one row per row of ptr, got 2 for 3"
    ):
        torch.ops.megagnn.gather(values[:2], INDEX, PTR, None)
    with pytest.raises(RuntimeError, match="values must have at least one dimension, got none"):
        op(torch.tensor(1.0), INDEX, PTR, None)
