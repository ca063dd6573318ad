"""SOAP beside its algorithm written out, one matrix at a time."""

import torch
from torch import Tensor

from megagnn.optim.rules.soap import SOAP
from tests.tolerances import assert_close

SHAPES = [(5, 5), (4, 7), (7, 4), (5, 5)]
SETTINGS = {"betas": (0.9, 0.95), "eps": 1e-8, "refresh_every": 3}


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def plain(matrix: int, q_left: Tensor, q_right: Tensor, num_steps: int) -> Tensor:
    """Vyas et al., Algorithm 3, with the reference code's first step and its order of eigenvalues.

    The eigenvectors of the first step are given: those of the null space of a factor are arbitrary.
    """
    m, n = SHAPES[matrix]
    (beta1, beta2), eps = SETTINGS["betas"], SETTINGS["eps"]  # type: ignore[misc]
    w, mean, square = torch.zeros(m, n).double(), torch.zeros(m, n).double(), torch.zeros(m, n).double()
    for step in range(1, num_steps + 1):
        g = gradients(step)[matrix]
        if step == 1:
            left, right = g @ g.T, g.T @ g
            for factor, q in ((left, q_left), (right, q_right)):
                values = torch.linalg.eigvalsh(factor).flip(0)
                assert_close(q @ torch.diag(values) @ q.T, factor, 1e-12)
            continue
        mean = beta1 * mean + (1 - beta1) * g
        turned = q_left.T @ g @ q_right
        square = beta2 * square + (1 - beta2) * turned**2
        unbiased = (square / (1 - beta2 ** (step - 1))).sqrt() + eps
        w = (
            w
            - 0.1 * q_left @ ((q_left.T @ mean @ q_right) / (1 - beta1 ** (step - 1)) / unbiased) @ q_right.T
        )
        left = beta2 * left + (1 - beta2) * g @ g.T
        right = beta2 * right + (1 - beta2) * g.T @ g
        if step % 3 == 0:
            order = (q_left.T @ left @ q_left).diagonal().argsort(descending=True)
            square, q_left = square[order], torch.linalg.qr(left @ q_left[:, order])[0]
            order = (q_right.T @ right @ q_right).diagonal().argsort(descending=True)
            square, q_right = square[:, order], torch.linalg.qr(right @ q_right[:, order])[0]
    return w


def test_equals_the_algorithm_written_out() -> None:
    weights = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    states = [
        {name: torch.zeros(of, dtype=torch.float64) for name, of in SOAP.state(shape).items()}
        for shape in SHAPES
    ]
    first = []
    for step in range(1, 21):
        found = SOAP.directions(gradients(step), states, SETTINGS, step)
        for w, d in zip(weights, found, strict=True):
            w.sub_(d, alpha=0.1)
        first = first or [(s["left_basis"].clone(), s["right_basis"].clone()) for s in states]
    for index, got in enumerate(weights):
        assert_close(got, plain(index, *first[index], 20), 1e-10)
        assert got.abs().max() > 0.1


def test_begins_where_another_rule_left_off() -> None:
    """State of zeros at a later step: the first step finds the basis, the second moves."""
    states = [{name: torch.zeros(of) for name, of in SOAP.state((3, 4)).items()}]
    grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    (first,) = SOAP.directions([grad], states, SETTINGS, 500)
    assert not first.any()
    (second,) = SOAP.directions([grad.flip(0)], states, SETTINGS, 501)
    assert second.isfinite().all()
    assert second.any()
