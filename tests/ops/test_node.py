"""The atoms' products with what lies between them: against plain PyTorch, and what a backward computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megagnn.ops import extension, node
from megagnn.ops.node import norm_linear, norm_linear_reference, silu_linear, silu_linear_reference
from tests.tolerances import RELATIVE, assert_close

compiled = pytest.mark.skipif(extension.module is None, reason="the extension is not built")
REAL = (torch.float32, torch.float64)
# atoms, features, and no width equal to another; 300 rows are three blocks, of 260 features one and a rest
SIZES = [(0, 4), (1, 5), (129, 16), (300, 67), (300, 260)]
HIDDEN, MESSAGE, SIDE = 7, 18, 9


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def leaves(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [t.to(dtype).requires_grad_() for t in made]


def norm_arguments(rows: int, width: int, norm: bool, dtype: torch.dtype = torch.float64) -> Any:
    """h, gain, eps, three weights, two biases and none."""
    shapes = (
        (rows, width),
        (width,),
        (HIDDEN, width),
        (HIDDEN, width),
        (MESSAGE, width),
        (HIDDEN,),
        (MESSAGE,),
    )
    h, gain, *weights, first, last = leaves(dtype, *shapes)
    return h, gain if norm else None, 1e-3, weights, [first, None, last]


def silu_arguments(rows: int, width: int, everything: bool, dtype: torch.dtype = torch.float64) -> Any:
    """u, weight, bias, side, h and scale; or the two tensors that must be there."""
    shapes = (rows, HIDDEN), (width, HIDDEN), (width,), (rows, SIDE), (HIDDEN, SIDE), (rows, width)
    u, weight, bias, s, s_weight, h = leaves(dtype, *shapes)
    return (u, weight, bias, (s, s_weight, 0.3), h, 0.7) if everything else (u, weight, None)


def flat(arguments: Any) -> list[Tensor]:
    """The tensors of nested arguments."""
    if isinstance(arguments, Tensor):
        return [arguments]
    return [t for a in arguments for t in flat(a)] if isinstance(arguments, tuple | list) else []


def results(function: Any, arguments: Any) -> list[Tensor]:
    """Outputs, and the gradients of a function of them."""
    outputs = flat((function(*arguments),))
    return [*outputs, *torch.autograd.grad(sum(t.sin().sum() for t in outputs), flat(arguments))]  # type: ignore[arg-type]


@compiled
@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize(("rows", "width"), SIZES)
@pytest.mark.parametrize("norm", [True, False])
def test_norm_linear(rows: int, width: int, norm: bool, dtype: torch.dtype, threads: int, simd: str) -> None:
    wanted = results(norm_linear_reference, norm_arguments(rows, width, norm))
    got = results(norm_linear, norm_arguments(rows, width, norm, dtype))
    for x, y in zip(got, wanted, strict=True):
        assert_close(x, y, 10 * RELATIVE[dtype])


@compiled
@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize(("rows", "width"), SIZES)
@pytest.mark.parametrize("everything", [True, False])
def test_silu_linear(
    rows: int, width: int, everything: bool, dtype: torch.dtype, threads: int, simd: str
) -> None:
    wanted = results(silu_linear_reference, silu_arguments(rows, width, everything))
    got = results(silu_linear, silu_arguments(rows, width, everything, dtype))
    for x, y in zip(got, wanted, strict=True):
        assert_close(x, y, 10 * RELATIVE[dtype])


@pytest.mark.parametrize("function", [norm_linear, norm_linear_reference])
def test_literal_norm(function: Any) -> None:
    """(3, 4) has mean square 12.5; without eps the norm is (3, 4) / 3.5355."""
    h, gain = torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 10.0])
    weight, bias = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), torch.tensor([0.0, 0.0, 5.0])
    (y,) = function(h, gain, 0.0, [weight], [bias])
    first, second = 3 / 12.5**0.5, 40 / 12.5**0.5
    assert_close(y, torch.tensor([[first, second, first + second + 5]]))


@pytest.mark.parametrize("function", [silu_linear, silu_linear_reference])
def test_literal_silu(function: Any) -> None:
    """u + 2 s U^T = (0, ln 3), whose logistic function is (1/2, 3/4); 10 + 2 (0.75 ln 3 + 1)."""
    log3 = torch.log(torch.tensor(3.0))
    u, side = (
        torch.tensor([[-2.0, 0.0]]),
        (torch.tensor([[1.0]]), torch.stack((log3 * 0 + 1, log3 / 2)).view(2, 1)),
    )
    y = function(u, torch.tensor([[7.0, 1.0]]), torch.ones(1), (*side, 2.0), torch.tensor([[10.0]]), 2.0)
    assert_close(y, (10 + 2 * (0.75 * log3 + 1)).view(1, 1))


@pytest.mark.parametrize("full", [True, False])
def test_numeric_derivatives(full: bool) -> None:
    torch.manual_seed(0)
    cases = ((norm_linear, norm_arguments(4, 3, full)), (silu_linear, silu_arguments(4, 3, full)))
    for function, arguments in cases:
        tensors = flat(arguments)

        def of_tensors(*given: Tensor, function: Any = function, arguments: Any = arguments) -> Any:
            rest = iter(given)

            def filled(a: Any) -> Any:
                if isinstance(a, Tensor):
                    return next(rest)
                return type(a)(map(filled, a)) if isinstance(a, tuple | list) else a

            return function(*filled(arguments))

        assert torch.autograd.gradcheck(of_tensors, tensors)
        assert torch.autograd.gradgradcheck(of_tensors, tensors)


class Recorder:
    """In place of the compiled operations: remembers the last two arguments of their backwards."""

    def __init__(self) -> None:
        self.wanted: list[tuple[bool, bool]] = []

    def __getattr__(self, name: str) -> Any:
        operation = getattr(torch.ops.megagnn, name)

        class Watched:
            @staticmethod
            def default(*arguments: Any) -> Any:
                if name.endswith("_backward"):
                    self.wanted.append(arguments[-2:])
                return operation.default(*arguments)

        return Watched


@compiled
def test_only_the_gradients_that_are_asked_for_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether they require gradients or not: of the features and the gain, of the weights and biases."""
    recorder = Recorder()
    monkeypatch.setattr(node, "_OPS", recorder)
    arguments = norm_arguments(5, 4, True)
    h, gain, _, weights, biases = arguments
    outputs = norm_linear(*arguments)
    everything = results(norm_linear, arguments)
    of_all = dict(zip(map(id, flat(arguments)), everything[3:], strict=True))
    loss = sum(t.sin().sum() for t in outputs)
    for leaves, wanted in (
        ([h], (True, False)),
        ([gain], (True, False)),
        ([weights[1]], (False, True)),
        ([biases[0]], (False, True)),
        ([h, biases[2]], (True, True)),
    ):
        got = torch.autograd.grad(loss, leaves, retain_graph=True)  # type: ignore[arg-type]
        assert recorder.wanted.pop() == wanted
        assert all(torch.equal(t, of_all[id(leaf)]) for t, leaf in zip(got, leaves, strict=True))
    arguments = silu_arguments(5, 4, True)
    u, weight, bias, (s, s_weight, _), h, _ = arguments
    of_all = dict(zip(map(id, flat(arguments)), results(silu_linear, arguments)[1:], strict=True))
    loss = silu_linear(*arguments).sin().sum()
    for leaves, wanted in (
        ([u], (False, False)),
        ([s], (True, False)),
        ([s_weight], (False, True)),
        ([weight], (False, True)),
        ([bias, s, h], (True, True)),
    ):
        got = torch.autograd.grad(loss, leaves, retain_graph=True)
        assert recorder.wanted.pop() == wanted
        assert all(torch.equal(t, of_all[id(leaf)]) for t, leaf in zip(got, leaves, strict=True))


@compiled
def test_strided_arguments_and_the_same_bits_again() -> None:
    cases: Any = ((norm_linear, norm_arguments(300, 67, True)), (silu_linear, silu_arguments(300, 67, True)))

    def strided(a: Any) -> Any:
        if isinstance(a, Tensor):
            return a.detach().t().contiguous().t().requires_grad_() if a.dim() == 2 else a
        return type(a)(map(strided, a)) if isinstance(a, tuple | list) else a

    for function, arguments in cases:
        first = results(function, arguments)
        for again in (arguments, strided(arguments)):
            assert all(map(torch.equal, first, results(function, again)))


@pytest.mark.parametrize("create_graph", [False, True])
def test_frozen_parts_and_results_nobody_reads(create_graph: bool) -> None:
    """One weight that requires gradients, results that depend on it and others, one of them used or two."""
    wanted: Any = []
    for function in (norm_linear_reference, norm_linear):
        h, _, eps, weights, _ = norm_arguments(6, 5, False)
        h.requires_grad_(False)
        weights[0].requires_grad_(False)
        outputs = function(h, None, eps, weights, [None] * 3)
        for chosen in (outputs[1], outputs[1].sum() + outputs[0].sum()):
            (gradient,) = torch.autograd.grad(
                chosen.sin().sum(), weights[1], create_graph=create_graph, retain_graph=True
            )
            assert gradient.requires_grad == create_graph
            wanted.append(gradient.detach())
    for x, y in zip(wanted[:2], wanted[2:], strict=True):
        assert_close(x, y)
    u, weight, *_ = silu_arguments(6, 5, True)
    u.requires_grad_(False)
    y = silu_linear(u, weight, None)
    (gradient,) = torch.autograd.grad(y.sum(), weight, create_graph=create_graph)
    assert_close(gradient, torch.nn.functional.silu(u).sum(0).expand_as(weight))


@compiled
def test_cotangents_that_are_not_contiguous() -> None:
    cases: Any = ((norm_linear, norm_arguments(300, 67, True)), (silu_linear, silu_arguments(300, 67, True)))
    for function, arguments in cases:
        outputs, leaves = flat((function(*arguments),)), flat(arguments)
        bars = [torch.randn(1, y.shape[1], dtype=y.dtype).expand_as(y) for y in outputs]
        wanted = torch.autograd.grad(outputs, leaves, [b.contiguous() for b in bars], retain_graph=True)
        for changed in (bars, [b.t().contiguous().t() for b in bars]):
            got = torch.autograd.grad(outputs, leaves, changed, retain_graph=True)
            assert all(map(torch.equal, got, wanted))


def test_which_features_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 is not; wide features are where each thread has a block of them."""
    there = extension.has_cpu
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    for shape, served in (((10, 128), True), ((1023, 256), False), ((1024, 256), True)):
        assert node.has_kernels(torch.empty(shape)) == (there and served)
    assert not node.has_kernels(torch.empty(10, 4, dtype=torch.bfloat16))


@compiled
def test_clear_errors() -> None:
    h, gain, eps, weights, biases = norm_arguments(5, 4, True)
    with pytest.raises(
        ValueError, match="norm_linear: there must be a bias, or None, for each weight, got 1 for 3"
    ):
        norm_linear(h, gain, eps, weights, biases[:1])
    with pytest.raises(RuntimeError, match=r"norm_linear \(cpu\): gain must be a vector of 4 elements"):
        norm_linear(h, gain[:3], eps, weights, biases)
    with pytest.raises(
        RuntimeError, match=r"weight must be a matrix of 4 columns and type Double, got 7 x 3"
    ):
        norm_linear(h, gain, eps, [weights[0][:, :3]], [None])
    with pytest.raises(
        RuntimeError, match=r"bias must be a vector of 7 elements and type Double, got .*Float"
    ):
        norm_linear(h, gain, eps, weights[:1], [biases[0].float()])
    u, weight, bias, (s, s_weight, factor), h, scale = silu_arguments(5, 4, True)
    with pytest.raises(RuntimeError, match=r"silu_linear \(cpu\): s must be a matrix of 9 columns, 5 rows"):
        silu_linear(u, weight, bias, (s[:4], s_weight, factor), h, scale)
