"""The CUDA kernel of AdamW, emulated, against PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megagnn.ops import reference
from tests.cuda.emulator import ORDERS, SCALARS, Emulator, Guarded
from tests.tolerances import RELATIVE, assert_close

LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.99), 1e-8, 0.1
# (weights, gradient, writes rounded parameters)
KINDS = [
    (torch.float64, torch.float64, False),
    (torch.float32, torch.float32, False),
    (torch.float32, torch.bfloat16, False),
    (torch.float32, torch.float32, True),
    (torch.float32, torch.bfloat16, True),
]


class Buffers:
    """Weights, gradient, moments and rounded parameters of a flat group, each inside a larger buffer."""

    def __init__(
        self, size: int, kind: tuple[torch.dtype, torch.dtype, bool], offsets: tuple[int, ...] = (0,) * 5
    ) -> None:
        state, grad, rounded = kind
        dtypes = [state, grad, state, state, torch.bfloat16]
        self.guarded = [
            Guarded((size,), dtype, offset) for dtype, offset in zip(dtypes, offsets, strict=True)
        ]
        self.rounded = rounded
        generator = torch.Generator().manual_seed(size)
        for guarded in self.guarded[:4]:
            guarded.tensor.copy_(torch.randn(size, generator=generator))
        self.guarded[3].tensor.abs_()
        if rounded:
            self.guarded[4].tensor.copy_(self.guarded[0].tensor)

    def tensors(self) -> list[Tensor]:
        return [guarded.tensor for guarded in self.guarded[: 5 if self.rounded else 4]]

    def step(self, cuda: Emulator, step: int, grad_scale: float = 1.0) -> list[Tensor]:
        """One step by the kernel; the state after it."""
        weights, grad, exp_avg, exp_avg_sq = self.tensors()[:4]
        (beta1, beta2), kinds = BETAS, (SCALARS[weights.dtype], SCALARS[grad.dtype])
        constants = [grad_scale, beta1, 1 - beta1, beta2, 1 - beta2, 1 - LR * DECAY]
        constants += [LR / (1 - beta1**step), (1 - beta2**step) ** -0.5, EPS]
        rounded = self.guarded[4].tensor if self.rounded else None
        buffers = (weights, grad, exp_avg, exp_avg_sq, rounded)
        cuda("megagnn_cuda_adamw", *kinds, *buffers, weights.numel(), *constants)
        for guarded in self.guarded:
            guarded.check()
        return [tensor.clone() for tensor in self.tensors()]


def expected(buffers: Buffers, step: int, grad_scale: float = 1.0) -> list[Tensor]:
    weights, grad, exp_avg, exp_avg_sq = (
        tensor.to(torch.float64, copy=True) for tensor in buffers.tensors()[:4]
    )
    reference.adamw_(weights, grad, exp_avg, exp_avg_sq, None, LR, *BETAS, EPS, DECAY, step, grad_scale)
    return [weights, grad, exp_avg, exp_avg_sq]


@pytest.mark.parametrize("size", [1, 2, 3, 127, 512, 4099])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_against_float64(cuda: Emulator, kind: tuple[torch.dtype, torch.dtype, bool], size: int) -> None:
    buffers = Buffers(size, kind)
    want = expected(buffers, step=3, grad_scale=0.5)
    got = buffers.step(cuda, step=3, grad_scale=0.5)
    for tensor, exact in zip(got, want, strict=False):
        assert_close(tensor, exact)
    if buffers.rounded:
        assert torch.equal(got[4], got[0].bfloat16())


def test_a_wrong_constant_would_show() -> None:
    buffers = Buffers(512, KINDS[0])
    want = expected(buffers, step=3, grad_scale=0.5)
    for wrong in (expected(buffers, step=4, grad_scale=0.5), expected(buffers, step=3)):
        assert (wrong[0] - want[0]).abs().max() > 10 * RELATIVE[torch.float32] * want[0].abs().max()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_same_bits_in_every_order_and_at_any_address(
    cuda: Emulator, kind: tuple[torch.dtype, torch.dtype, bool]
) -> None:
    first = Buffers(1003, kind).step(cuda, step=1)
    for order in ORDERS:
        with cuda.order(order, seed=2):
            again = Buffers(1003, kind).step(cuda, step=1)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for i in range(5):
        offsets = tuple(int(i == k) for k in range(5))
        shifted = Buffers(1003, kind, offsets)
        assert shifted.guarded[i].tensor.data_ptr() % 8 != 0 or kind[0] == torch.float64
        again = shifted.step(cuda, step=1)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_more_elements_than_one_round_of_the_grid(cuda: Emulator) -> None:
    """8192 blocks of 128 threads take 4 elements each at a time: the last blocks go round twice."""
    size = 8192 * 128 + 1000
    buffers = Buffers(size, KINDS[0], offsets=(1, 0, 0, 0, 0))
    want = expected(buffers, step=1)
    assert_close(buffers.step(cuda, step=1)[0], want[0])


def test_nan_passes_through(cuda: Emulator) -> None:
    buffers = Buffers(9, KINDS[1])
    buffers.guarded[1].tensor[4] = float("nan")
    weights = buffers.step(cuda, step=1)[0]
    assert weights.isnan().tolist() == [i == 4 for i in range(9)]
