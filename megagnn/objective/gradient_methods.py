"""How the parameter gradients of a loss are taken.

[Note: gradient methods] A loss on forces F = -dE/dx needs second derivatives. A gradient method takes a
potential, a batch and the loss, and leaves the gradient of this rank's loss share in the parameters; the
trainer knows no more than that, so a method with another structure than "forward, then one backward" can
stand in its place.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from megagnn.data import keys
from megagnn.models.potential import Potential
from megagnn.objective.loss import Loss, LossCounts


class GradientMethod(Protocol):
    """See [Note: gradient methods]."""

    def __call__(
        self, potential: Potential, batch: dict[str, Tensor], loss: Loss, counts: LossCounts
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Add to the parameters' `.grad`; return this rank's share of the loss and of its terms."""


def create_graph(
    potential: Potential, batch: dict[str, Tensor], loss: Loss, counts: LossCounts
) -> tuple[Tensor, dict[str, Tensor]]:
    """Differentiate through the graph of the forces: simple, and the more memory the less is recomputed.

    In units of a forward pass it costs 6 with plain tensors, 10 or 12 with the blockwise edge operation
    (docs/kernels.md, Arithmetic).
    """
    outputs = potential(batch, create_graph=True)
    total, shares = loss(outputs, batch, counts)
    total.backward()
    return total.detach(), shares


def one_backward(
    potential: Potential, batch: dict[str, Tensor], loss: Loss, counts: LossCounts
) -> tuple[Tensor, dict[str, Tensor]]:
    """One ordinary backward through values and tangents; see docs/forces.md.

    A forward and a backward to the positions give energies, forces and stress, and these the loss's
    cotangents, constants from here on. A forward on (value, tangent) along the direction that they make, and
    its backward, give the gradient. In units of a forward pass: 8, or 11 with blocks or layers made again.
    """
    if potential.forces != "conservative":
        return create_graph(potential, batch, loss, counts)
    outputs = {key: value.requires_grad_() for key, value in potential(batch).items()}
    total, shares = loss(outputs, batch, counts)
    bars = dict(
        zip(
            outputs,
            torch.autograd.grad(total, list(outputs.values()), materialize_grads=True, allow_unused=True),
            strict=True,
        )
    )
    predicted = potential.directional(batch, bars[keys.FORCES], bars.get(keys.STRESS))
    energy_B = predicted[keys.ENERGY]
    objective = (bars[keys.ENERGY] * energy_B.value).sum() + energy_B.tangent.sum()
    for label in potential.model.other_labels:
        objective = objective + (bars[label] * predicted[label].value).sum()
    objective.backward()
    return total.detach(), shares


GRADIENT_METHODS: dict[str, GradientMethod] = {"one_backward": one_backward, "create_graph": create_graph}


class Reducer(Protocol):
    """What sums gradients over ranks; see `optim.bucket_reducer` [Note: buckets]."""

    def start(self) -> None:
        """The backward that follows is the last of the step."""

    def finish(self) -> None:
        """All gradients are sums over the ranks afterwards."""


def accumulate(
    method: GradientMethod,
    potential: Potential,
    batches: Sequence[dict[str, Tensor]],
    loss: Loss,
    counts: LossCounts,
    reducer: Reducer,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The gradient of a step over one or several batches, summed over ranks; returns this rank's share of the
    loss and of its terms.

    With `counts` over all of the batches (`loss.step_counts`) it is the gradient of one batch that holds all
    their structures. Memory is that of one batch, and only the last backward sends.
    """
    total = torch.zeros((), dtype=torch.float64, device=batches[0][keys.POSITIONS].device)
    terms: dict[str, Tensor] = {}
    for number, batch in enumerate(batches):
        if number == len(batches) - 1:
            reducer.start()
        part, shares = method(potential, batch, loss, counts)
        total = total + part
        terms |= {name: terms[name] + share if name in terms else share for name, share in shares.items()}
    reducer.finish()
    return total, terms
