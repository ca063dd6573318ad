"""Vectors along edges and lattice translations: against plain indexing, with derivatives of every kind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from megagnn.ops import Segments, extension
from megagnn.ops.geometry import (
    edge_difference,
    edge_difference_reference,
    lattice_shift,
    lattice_shift_reference,
)
from tests.ops.helpers import random_segments
from tests.tolerances import assert_close

compiled = pytest.mark.skipif(extension.module is None, reason="the extension is not built")
REAL = (torch.float32, torch.float64)


def ends(edges: int = 30) -> tuple[Segments, Segments]:
    """Receivers, 6, sorted; senders, 5, in no order."""
    return random_segments(6, edges, perm=False), random_segments(5, edges, perm=True)


def positions(edges: int = 30, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Of the receivers, of the senders, and the shifts."""
    return tuple(torch.randn(n, 3, dtype=dtype) for n in (6, 5, edges))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("edges", [0, 1, 30, 20_000])
@pytest.mark.parametrize("shifted", [True, False])
def test_difference(edges: int, dtype: torch.dtype, shifted: bool) -> None:
    """The same operations in the same order as plain indexing: the same bits."""
    i, j = ends(edges)
    to, sender, shift = positions(edges, dtype)
    got = edge_difference(to, sender, shift if shifted else None, i, j)
    moved = sender[j.index] + shift if shifted else sender[j.index]
    assert torch.equal(got, moved - to[i.index])
    assert torch.equal(got, edge_difference_reference(to, sender, shift if shifted else None, i, j))


def test_literal_difference() -> None:
    """One edge from atom 1 at (1, 2, 3), shifted by (10, 0, 0), to atom 0 at (0.5, 0, 0)."""
    x = torch.tensor([[0.5, 0, 0], [1, 2, 3]])
    i = Segments(torch.tensor([0]), torch.tensor([0, 1, 1]))
    j = Segments(torch.tensor([1]), torch.tensor([0, 0, 1]))
    assert edge_difference(x, x, torch.tensor([[10.0, 0, 0]]), i, j).tolist() == [[10.5, 2, 3]]


def test_strided_arguments() -> None:
    i, j = ends()
    to, sender, shift = (x.t().contiguous().t() for x in positions())
    both = torch.stack((i.index, j.index), 1).t()
    strided = Segments(both[0], i.ptr), Segments(both[1], j.ptr, j.perm)
    assert torch.equal(edge_difference(to, sender, shift, *strided), edge_difference(to, sender, shift, i, j))


def test_derivatives_of_the_difference() -> None:
    i, j = ends()
    leaves = [x.requires_grad_() for x in positions()]

    def function(to: Tensor, sender: Tensor, shift: Tensor) -> Tensor:
        return edge_difference(to, sender, shift, i, j)

    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda *x: function(*x).sin(), leaves)


def test_tangent_of_one_end() -> None:
    i, j = ends()
    to, sender, shift = positions()
    tangent = torch.randn_like(sender)
    with forward_ad.dual_level():
        out = edge_difference(to, forward_ad.make_dual(sender, tangent), shift, i, j)
        assert torch.equal(forward_ad.unpack_dual(out).tangent, tangent[j.index])


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("edges", [0, 1, 20_000])
def test_translation(edges: int, dtype: torch.dtype) -> None:
    cell = torch.randn(4, 3, 3, dtype=dtype)
    shifts = torch.randint(-2, 3, (edges, 3)).to(dtype)
    structure = torch.randint(0, 4, (edges,))
    got = lattice_shift(cell, shifts, structure)
    assert_close(got, torch.einsum("ek,eka->ea", shifts, cell[structure]))
    assert_close(got, lattice_shift_reference(cell, shifts, structure))


def test_literal_translation() -> None:
    """One a and minus two c of a cell whose rows are its vectors."""
    cell = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [0.5, 0, 3]]])
    got = lattice_shift(cell, torch.tensor([[1.0, 0, -2]]), torch.tensor([0]))
    assert got.tolist() == [[0, 0, -6]]


def test_derivatives_of_the_translation() -> None:
    cell = torch.randn(3, 3, 3, dtype=torch.float64, requires_grad=True)
    shifts = torch.randint(-2, 3, (12, 3)).double()
    structure = torch.randint(0, 3, (12,))
    assert torch.autograd.gradcheck(
        lambda c: lattice_shift(c, shifts, structure), cell, check_forward_ad=True
    )
    assert torch.autograd.gradgradcheck(lambda c: lattice_shift(c, shifts, structure).sin(), cell)
    (got,) = torch.autograd.grad(lattice_shift(cell, shifts.requires_grad_(), structure).sum(), shifts)
    assert_close(got, cell[structure].sum(-1))


def test_compiled_by_dynamo() -> None:
    i, j = ends()
    function = torch.compile(lambda *x: edge_difference(*x, i, j), backend="eager", fullgraph=True)
    arguments = positions()
    assert_close(function(*arguments), edge_difference(*arguments, i, j))


def test_rows_that_do_not_fit() -> None:
    i, j = ends()
    to, sender, shift = positions()
    with pytest.raises(
        ValueError, match=r"from must be a matrix of one row per row .* 5, got shape \(6, 3\)"
    ):
        edge_difference(to, to, shift, i, j)
    with pytest.raises(ValueError, match=r"to must be a matrix of one row per row .* 6, got shape \(5, 3\)"):
        edge_difference(sender, sender, shift, i, j)


@compiled
def test_arguments_that_do_not_fit() -> None:
    i, j = ends()
    to, sender, shift = positions()
    with pytest.raises(RuntimeError, match="shift must have one row per edge, got 29 for 30"):
        edge_difference(to, sender, shift[:29], i, j)
    with pytest.raises(RuntimeError, match="from must be float32 or float64, the same for all"):
        edge_difference(to, sender.float(), shift, i, j)
    with pytest.raises(RuntimeError, match="as long as each other, got 30 and 29"):
        edge_difference(to, sender, None, i, random_segments(5, 29, perm=True))
    wrong = Segments(j.index + 5, j.ptr, j.perm)
    with pytest.raises(RuntimeError, match=r"source in \[0, 5\), got an element outside"):
        edge_difference(to, sender, shift, i, wrong)
    cell, structure = torch.zeros(2, 3, 3, dtype=torch.float64), torch.zeros(30, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="structure must have one element per edge, got 30 for 29"):
        lattice_shift(cell, shift[:29], structure)
    with pytest.raises(RuntimeError, match=r"structure must lie in \[0, 2\)"):
        lattice_shift(cell, shift, structure + 2)
    with pytest.raises(RuntimeError, match="cell must be float32 or float64, the same for all"):
        lattice_shift(cell[:, :2], shift, structure)
