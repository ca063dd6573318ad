"""Tolerances of the tests, in one place, by dtype."""

from __future__ import annotations

import torch

# Largest accepted difference relative to the largest magnitude of the reference: a few hundred roundings of
# the type, as sums over some hundred terms in another order make. bfloat16 is rounded once, at the end.
RELATIVE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2**-8}

# Two ways to compute the same gradient (parallel against serial), and, where a gradient vanishes in theory,
# the floor relative to the norm of all gradients.
PARITY = 1e-10
PARITY_FLOOR = 1e-14


def assert_close(got: torch.Tensor, want: torch.Tensor, relative: float | None = None) -> None:
    """max|got - want| <= relative * max|want|; want may have a wider dtype than got."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, wanted {tuple(want.shape)}"
    if want.numel() == 0:
        return
    bound = (RELATIVE[got.dtype] if relative is None else relative) * want.abs().max().item()
    error = (got.to(want.dtype) - want).abs().max().item()
    assert error <= bound, f"difference {error:.3g}, allowed {bound:.3g}"
