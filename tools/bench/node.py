"""The atoms' products of a layer, compiled with what lies between them, against the chains of PyTorch.

    python -m tools.bench.node --threads 2 --atoms 10 333 1000 --widths 64 256

`norm_linear` is RMSNorm and the three Linears that read it, `silu_linear` the sum with the messages' product,
SiLU, a Linear and the residual; `backward` is forward and backward together, all gradients. The chains are
`ops.node`'s references, which the modules of a layer run, too, and wide features of few atoms in either way.
The ceiling is the vendor's matrix product of so many rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megagnn.ops import node
from tools.bench import harness

EPS, FACTOR, SCALE = 1e-6, 1 / 30, 0.5
# Products (N, F) x (F, F) of a forward; its backward takes two for each.
PRODUCTS = {"norm_linear": 3, "silu_linear": 2}
CHAINS = {"norm_linear": node.norm_linear_reference, "silu_linear": node.silu_linear_reference}


def main() -> None:
    """Runs the cases that the arguments ask for."""
    args = harness.parse_args(
        __doc__,
        ("--atoms", {"nargs": "+", "type": int, "default": (10, 333, 1000, 3333)}),
        ("--widths", {"nargs": "+", "type": int, "default": (64, 128, 256, 512)}),
    )
    records: list[harness.Record] = []
    for num_atoms in args.atoms:
        for width in args.widths:
            for op in PRODUCTS:
                for backward in (False, True):
                    found = harness.compare(case(op, num_atoms, width, backward), args)
                    print(harness.table(found), flush=True)
                    records += found
    harness.report(records, args)


def case(op: str, num_atoms: int, width: int, backward: bool) -> harness.Case:
    """One function on so many atoms, forward or with its backward."""
    arguments = ARGUMENTS[op](num_atoms, width)
    leaves = flat(arguments)
    ours = work(getattr(node, op), arguments, leaves, backward)
    chain = work(CHAINS[op], arguments, leaves, backward)
    return harness.Case(
        f"{op} backward" if backward else op,
        {"N": num_atoms, "F": width},
        "float32",
        {"megagnn": ours, "chain": chain},
        chain(),
        1e-4,
        1.0,
        num_flops=2.0 * PRODUCTS[op] * (3 if backward else 1) * num_atoms * width * width,
        ceilings=[harness.product_ceiling(num_atoms, width)],
    )


def work(function: Callable[..., Any], arguments: Any, leaves: list[Tensor], backward: bool) -> harness.Work:
    """The forward, as in training, or forward and all gradients."""

    def forward() -> list[Tensor]:
        return flat((function(*arguments),))

    def both() -> list[Tensor]:
        for leaf in leaves:
            leaf.grad = None
        outputs = forward()
        torch.autograd.backward(outputs, outputs)
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    return both if backward else forward


def flat(arguments: Any) -> list[Tensor]:
    """The tensors of nested arguments."""
    if isinstance(arguments, Tensor):
        return [arguments]
    return [t for a in arguments for t in flat(a)] if isinstance(arguments, list | tuple) else []


def tensors(*shapes: Sequence[int]) -> list[Tensor]:
    """Random leaves of these shapes, matrices over the root of their columns."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(tuple(shape), generator=generator) for shape in shapes]
    return [(t / t.shape[-1] ** 0.5 if t.dim() == 2 else t).requires_grad_() for t in made]


def norm_arguments(num_atoms: int, width: int) -> Any:
    """h, gain, eps, weights, biases."""
    square = (width, width)
    h, gain, a, b, c, first, last = tensors((num_atoms, width), (width,), *[square] * 3, (width,), (width,))
    return h, gain, EPS, [a, b, c], [first, None, last]


def silu_arguments(num_atoms: int, width: int) -> Any:
    """u, weight, bias, side, h, scale."""
    rows, square = (num_atoms, width), (width, width)
    u, weight, bias, s, s_weight, h = tensors(rows, square, (width,), rows, square, rows)
    return u, weight, bias, (s, s_weight, FACTOR), h, SCALE


ARGUMENTS = {"norm_linear": norm_arguments, "silu_linear": silu_arguments}

if __name__ == "__main__":
    main()
