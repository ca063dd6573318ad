"""AdamW on flat buffers: against torch's own, for every type, size, alignment, SIMD level, thread count."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megagnn.ops import adamw_, extension, reference
from tests.conftest import LEVELS
from tests.tolerances import RELATIVE, assert_close

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
NUM_STEPS = 20
SIZES = [1, 7, 16, 64, 1025]  # below and above a vector and a block
FLOAT32, FLOAT64, BFLOAT16 = torch.float32, torch.float64, torch.bfloat16
# param, grad; the state is float32 beside bfloat16
DTYPES = [
    (FLOAT32, FLOAT32),
    (FLOAT64, FLOAT64),
    (FLOAT32, BFLOAT16),
    (BFLOAT16, FLOAT32),
    (BFLOAT16, BFLOAT16),
]


def view(values: Tensor, offset: int = 0) -> Tensor:
    """A copy that begins `offset` elements into its storage."""
    storage = torch.zeros(values.numel() + offset, dtype=values.dtype)
    storage[offset:] = values
    return storage[offset:]


class Buffers:
    """What one call takes, beginning so many elements into their storages."""

    def __init__(self, size: int, param: torch.dtype, grad: torch.dtype, offset: int = 0) -> None:
        generator = torch.Generator().manual_seed(size)
        state = FLOAT32 if param == BFLOAT16 else param
        weights = torch.randn(size, generator=generator, dtype=state)
        self.grads = [
            torch.randn(size, generator=generator, dtype=FLOAT64).mul(10.0 ** (s % 5 - 2)).to(grad)
            for s in range(NUM_STEPS)
        ]
        self.master = view(weights, offset) if param == BFLOAT16 else None
        self.param = view(weights.to(param), offset)
        self.exp_avg, self.exp_avg_sq = view(weights * 0, offset), view(weights * 0, offset)
        self.offset = offset

    @property
    def weights(self) -> Tensor:
        return self.param if self.master is None else self.master

    def tensors(self) -> list[Tensor]:
        found = [self.param, self.exp_avg, self.exp_avg_sq]
        return found if self.master is None else [*found, self.master]

    def run(self, num_steps: int = NUM_STEPS, **changed: Any) -> None:
        for step in range(num_steps):
            grad = view(self.grads[step], self.offset)
            adamw_(
                self.param,
                grad,
                self.exp_avg,
                self.exp_avg_sq,
                self.master,
                step=step + 1,
                **(SETTINGS | changed),
            )


def torch_adamw(start: Tensor, grads: list[Tensor], kind: Any = torch.optim.AdamW) -> Tensor:
    """The weights after torch's optimizer, one tensor at a time (neither fused nor foreach)."""
    weight = start.clone().requires_grad_()
    optimizer = kind([weight], **SETTINGS, foreach=False)
    for grad in grads:
        weight.grad = grad.to(weight.dtype)
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("size", [*SIZES, 70_001])  # the last is shared by threads, too
def test_against_torch_in_float64(size: int, simd: str) -> None:
    buffers = Buffers(size, FLOAT64, FLOAT64)
    want = torch_adamw(buffers.param, buffers.grads)
    buffers.run()
    assert_close(buffers.param, want, 1e-14)


@pytest.mark.parametrize("change", ["decay", "bias", "eps"])
def test_tolerance_is_tight(change: str) -> None:
    """Far outside it: decay coupled to the gradient, a correction one step ahead, eps inside the root."""
    buffers = Buffers(100, FLOAT64, FLOAT64)
    want = torch_adamw(buffers.param, buffers.grads)
    for step, grad in enumerate(buffers.grads, start=1):
        scalars = SETTINGS | {"weight_decay": 0.1 if change != "decay" else 0.0}
        if change == "decay":
            grad = grad + 0.1 * buffers.param
        if change == "eps":
            scalars["eps"] = 1e-8 * math.sqrt(1 - 0.99**step)
        adamw_(
            buffers.param,
            grad,
            buffers.exp_avg,
            buffers.exp_avg_sq,
            step=step + (change == "bias"),
            **scalars,
        )
    assert (buffers.param - want).abs().max() > 1e4 * 1e-14 * want.abs().max()


@pytest.mark.parametrize("offset", [0, 1, 3], ids="offset{}".format)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("param", "grad"), DTYPES, ids=str)
def test_types_sizes_and_alignment(
    param: torch.dtype, grad: torch.dtype, size: int, offset: int, simd: str
) -> None:
    buffers = Buffers(size, param, grad, offset)
    want = torch_adamw(buffers.weights.double(), buffers.grads)
    buffers.run()
    assert_close(buffers.weights, want)
    if buffers.master is not None:
        assert torch.equal(buffers.param, buffers.master.bfloat16()), "rounded to nearest even"


def test_decay_is_decoupled() -> None:
    """Where gradients differ in size the two decays do: L2 shrinks weights with large gradients less."""
    buffers = Buffers(100, FLOAT64, FLOAT64)
    start = buffers.param.clone()
    buffers.run()
    assert_close(buffers.param, torch_adamw(start, buffers.grads), 1e-14)
    coupled = torch_adamw(start, buffers.grads, torch.optim.Adam)
    assert (buffers.param - coupled).abs().max() > 1e-3


def test_decay_alone_shrinks_by_a_factor() -> None:
    buffers = Buffers(9, FLOAT64, FLOAT64)
    start, buffers.grads = buffers.param.clone(), [torch.zeros(9, dtype=FLOAT64)] * NUM_STEPS
    buffers.run()
    assert_close(buffers.param, start * (1 - 1e-2 * 0.1) ** NUM_STEPS, 1e-14)


def test_gradient_scale_is_a_scaled_gradient(simd: str) -> None:
    for param, grad in DTYPES:
        scaled, plain = Buffers(70, param, grad), Buffers(70, param, grad)
        plain.grads = [g * 0.25 for g in plain.grads]  # exact in every type
        scaled.run(grad_scale=0.25)
        plain.run()
        for got, want in zip(scaled.tensors(), plain.tensors(), strict=True):
            assert torch.equal(got, want)


def test_nan_and_infinity_pass_through(simd: str) -> None:
    for param, grad in DTYPES:
        for position, wrong in ((3, math.nan), (65, math.nan), (66, math.inf), (20, -math.inf)):
            buffers = Buffers(67, param, grad)
            buffers.grads[1][position] = wrong
            clean = Buffers(67, param, grad)
            buffers.run(3)
            clean.run(3)
            assert buffers.param[position].isnan()
            assert not buffers.exp_avg[position].isfinite()
            others = torch.arange(67) != position
            assert torch.equal(buffers.param[others], clean.param[others])


def same_bits(runs: list[list[Tensor]]) -> None:
    for tensors in runs[1:]:
        for got, want in zip(tensors, runs[0], strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize(("param", "grad"), DTYPES, ids=str)
def test_same_bits_at_any_number_of_threads(param: torch.dtype, grad: torch.dtype) -> None:
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5, 1):
            torch.set_num_threads(threads)
            buffers = Buffers(200_003, param, grad, offset=1)
            buffers.run(3)
            runs.append(buffers.tensors())
    finally:
        torch.set_num_threads(before)
    same_bits(runs)


@pytest.mark.parametrize(("param", "grad"), DTYPES, ids=str)
def test_same_bits_at_every_simd_level_and_alignment(param: torch.dtype, grad: torch.dtype) -> None:
    if extension.module is None:
        pytest.skip("the extension is not built")
    runs, before = [], extension.module.simd_level()
    for level in LEVELS:
        for offset in (0, 1):
            extension.module.set_simd_level(level)
            buffers = Buffers(1003, param, grad, offset)
            buffers.run()
            runs.append(buffers.tensors())
    extension.module.set_simd_level(before)
    same_bits(runs)


@pytest.mark.parametrize(("param", "grad"), DTYPES, ids=str)
def test_reference(param: torch.dtype, grad: torch.dtype) -> None:
    """Eight or so roundings a step, in another order than the kernel's."""
    fast, plain = Buffers(301, param, grad), Buffers(301, param, grad)
    fast.run()
    beta1, beta2 = SETTINGS["betas"]
    for step, gradient in enumerate(plain.grads, start=1):
        reference.adamw_(
            *(plain.param, gradient, plain.exp_avg, plain.exp_avg_sq, plain.master),
            *(SETTINGS["lr"], beta1, beta2, SETTINGS["eps"], SETTINGS["weight_decay"], step, 1.0),
        )
    for got, want in zip(fast.tensors(), plain.tensors(), strict=True):
        assert_close(got, want, RELATIVE[got.dtype])


def test_nothing_to_update() -> None:
    buffers = Buffers(0, FLOAT32, FLOAT32)
    buffers.run()
    assert buffers.param.shape == (0,)


def test_leaves_neighbours_alone(simd: str) -> None:
    """A view between other elements, as the shard of a larger buffer is."""
    whole = torch.full((4, 101), 5.0)
    param, exp_avg, exp_avg_sq = (whole[i, 7:90] for i in (0, 1, 2))
    exp_avg.zero_(), exp_avg_sq.zero_()
    adamw_(param, torch.ones(83), exp_avg, exp_avg_sq, step=1, **SETTINGS)
    assert (whole[:, :7] == 5).all()
    assert (whole[:, 90:] == 5).all()
    assert (param != 5).all()


def test_a_parameter_that_a_graph_still_needs() -> None:
    """Updated in place without a gradient of its own, and noticed by the backward pass."""
    weight = torch.ones(4, requires_grad=True)
    loss = (weight**2).sum()
    adamw_(weight, torch.ones(4), torch.zeros(4), torch.zeros(4), step=1, **SETTINGS)
    assert weight.requires_grad
    assert weight.is_leaf
    assert (weight < 1).all()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


STATE = (torch.zeros(4), torch.zeros(4))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ((torch.zeros(4).half(), torch.zeros(4), *STATE), "param must be float32, .* got torch.float16"),
        (
            (torch.zeros(4), torch.zeros(4).double(), *STATE),
            "grad must be torch.float32 or torch.bfloat16 .* got",
        ),
        ((torch.zeros(4).double(), torch.zeros(4).double(), *STATE), "exp_avg must be torch.float64 where"),
        ((torch.zeros(4), torch.zeros(4), STATE[0], STATE[1].bfloat16()), "exp_avg_sq must be torch.float32"),
        (
            (torch.zeros(4).bfloat16(), torch.zeros(4), *STATE),
            "must have a float32 master .*bfloat16 without one",
        ),
        ((torch.zeros(4), torch.zeros(4), *STATE, STATE[0]), "must have a float32 master .*float32 with one"),
        (
            (torch.zeros(4).bfloat16(), torch.zeros(4), *STATE, STATE[0].bfloat16()),
            "master must be torch.float32",
        ),
        ((torch.zeros(4), torch.zeros(5), *STATE), "grad must have as many elements as param, 4, got 5"),
        ((torch.zeros(8)[::2], torch.zeros(4), *STATE), r"param must be contiguous, got strides \(2,\) for"),
        ((torch.zeros(4), torch.zeros(8)[::2], *STATE), r"grad must be contiguous, got strides \(2,\) for"),
        (
            (torch.zeros(4), torch.zeros(4, device="meta"), *STATE),
            "grad must be on the device of param, cpu, got",
        ),
    ],
)
def test_errors(tensors: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^adamw_ \({'compiled' if extension.module else 'reference'}\): .*{message}"
    ):
        adamw_(*tensors, step=1, **SETTINGS)


def test_step_counts_from_one() -> None:
    with pytest.raises(ValueError, match="step must count from 1, got 0"):
        adamw_(torch.zeros(4), torch.zeros(4), *STATE, step=0, **SETTINGS)


compiled = pytest.mark.skipif(extension.module is None, reason="the extension is not built")
SCALARS = (1e-2, 0.9, 0.99, 1e-8, 0.1, 1, 1.0)


@compiled
def test_operation_called_without_its_python_face() -> None:
    """torch.ops.megagnn is public as well, and must not write past the end of anything."""
    op, good = torch.ops.megagnn.adamw_, torch.zeros(4)
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((good.half(), good, good, good, None), "values must be float32, float64 or bfloat16, got Half"),
        ((good, good[:3], good, good, None), "grad must have as many elements as param, 4, got 3"),
        ((good, good, torch.zeros(8)[::2], good, None), "exp_avg must be contiguous, got a strided view"),
        ((good, good, good, good.double(), None), "exp_avg_sq must be Float beside this param, got Double"),
        ((good, good.half(), good, good, None), "grad must have the type of the moments, .* got Half"),
        (
            (good.bfloat16(), good, good, good, None),
            "must have a float32 master copy, got BFloat16 without one",
        ),
        ((good, good, good, good, good), "must have a float32 master copy, got Float with one"),
        (
            (good.bfloat16(), good, good, good, good.double()),
            "master must be Float beside this param, got Double",
        ),
    ]
    for tensors, message in cases:
        with pytest.raises(RuntimeError, match=rf"adamw_ \(cpu\): .*{message}"):
            op(*tensors, *SCALARS)
    with pytest.raises(RuntimeError, match=r"adamw_ \(cpu\): step must count from 1, got 0"):
        op(good, good, good, good, None, *SCALARS[:5], 0, 1.0)


@compiled
@pytest.mark.parametrize(("param", "grad"), DTYPES, ids=str)
def test_opcheck(param: torch.dtype, grad: torch.dtype) -> None:
    b = Buffers(10, param, grad)
    arguments = (b.param, b.grads[0], b.exp_avg, b.exp_avg_sq, b.master, *SCALARS)
    torch.library.opcheck(torch.ops.megagnn.adamw_.default, arguments)


def test_device_without_kernels_takes_the_reference() -> None:
    extension.warn_reference.cache_clear()
    tensors = [torch.zeros(4, device="meta") for _ in range(4)]
    if extension.module is None:
        adamw_(*tensors, step=1, **SETTINGS)
        return
    with pytest.warns(RuntimeWarning, match="no compiled kernels for meta"):
        adamw_(*tensors, step=1, **SETTINGS)
