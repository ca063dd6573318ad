"""The actions of a schedule on a model of any family, and the messages of [Note: executor]."""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megagnn.data import keys
from megagnn.models.family import Field, State
from megagnn.models.potential import Potential, along, derivatives, differentiable, frozen, seeds
from megagnn.objective.loss import Loss, LossCounts
from megagnn.objective.terms import TERMS
from megagnn.ops.dual import Dual
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.point_to_point import Expected
from megagnn.pipeline_parallel.actions import Action, Kind, Message, Schedule
from megagnn.pipeline_parallel.stage import Stage

Tensors = Sequence[Tensor]
Batch = dict[str, Tensor]


class Kept(NamedTuple):
    """Tensors that a forward keeps for its backward."""

    inputs: list[Tensor]
    """Leaves: the fields of the state that came, none at the first stage."""
    sources: list[Tensor]
    """Positions and strain of pass 1."""
    outputs: list[Tensor]
    """The fields that went, or one scalar to be differentiated."""


class Split(NamedTuple):
    """Tensors that a backward to the inputs (I) keeps for that to the weights (W)."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    bars: list[Tensor | None]


class Sharding(NamedTuple):
    """Needs of an optimizer that frees parameters (ZeRO stage 3) in split backwards."""

    inputs_only: Callable[[], AbstractContextManager[None]] = nullcontext
    """Around I: gradients of no parameter are complete after it."""
    through_inputs: bool = False
    """Whether W goes to the inputs, too: there the optimizer sees that a layer's backward is over."""


class ModelWork:
    """One step's actions on this rank's stages; gradients are added to the parameters' `.grad`.

    Args:
        potential: with this rank's part of the model.
        stages: all of the schedule.
        micro_batches: of the step, the same on every pipeline rank.
        loss, counts: counts are global, over micro-batches and data-parallel ranks.
        before_last: called before this rank's last backward to parameters.
        sharding: see there.
    """

    def __init__(
        self,
        potential: Potential,
        stages: Sequence[Stage],
        schedule: Schedule,
        context: ParallelContext,
        micro_batches: Sequence[Batch],
        loss: Loss | None = None,
        counts: LossCounts | None = None,
        before_last: Callable[[], None] = lambda: None,
        sharding: Sharding = Sharding(),  # noqa: B008 (a constant)
    ) -> None:
        self.potential, self.model, self.stages = potential, potential.model, stages
        self.conservative, self.context = potential.forces == "conservative", context
        self.micro_batches, self.loss, self.counts = micro_batches, loss, counts
        self.before_last, self.sharding = before_last, sharding
        backwards = [a for a in schedule.rows[context.pp_rank] if a.kind in "BW"]
        self._last_backward = backwards[-1] if backwards else None
        # Of conservative models: what is no derivative of the energy is judged at the last stage, in pass 2.
        self._other_terms = [term for term in TERMS if term in keys.OTHER_LABELS]
        self.total = torch.zeros(1 + len(TERMS), dtype=torch.float64, device=context.device)
        """This rank's share of the loss and of its terms."""
        self.predictions: dict[int, dict[str, Tensor]] = {}
        """By micro-batch, each on the rank where it is made."""
        self._kept: dict[Action, Kept] = {}
        self._split: dict[Action, Split] = {}
        self._found: dict[int, tuple[Tensor, list[Tensor]]] = {}  # from b to R: energies, dE/dx0, dE/dstrain
        self._seeds: dict[int, list[Tensor]] = {}  # from R to F: x0', cell', dLoss/dE
        self._do: dict[Kind, Callable[[int, int, Tensors], Tensors]] = {
            "f": self._probe,
            "b": self._probe_backward,
            "R": self._forces,
            "F": self._forward,
            "B": self._backward,
            "I": self._input_backward,
            "W": self._weight_backward,
        }

    def run(self, action: Action, received: Tensors) -> Tensors:
        if action == self._last_backward:
            self.before_last()
        with torch.set_grad_enabled(self.loss is not None or self.conservative):
            return self._do[action.kind](action.stage, action.micro_batch, received)

    def kept(self) -> list[str]:
        actions = [*self._kept, *self._split]
        return [f"what {action} keeps" for action in actions] + [
            f"{word} of micro-batch {i}"
            for word, kept in (("forces", self._found), ("seeds", self._seeds))
            for i in kept
        ]

    def expects(self, message: Message) -> list[Expected]:
        batch, kind = self.micro_batches[message.micro_batch], message.kind
        planes = (2,) if self.conservative and kind in "FB" else ()
        num_cells = len(batch[keys.CELL])
        positions = Expected(tuple(batch[keys.POSITIONS].shape), batch[keys.POSITIONS].dtype)
        cells = [Expected((num_cells, 3, 3), batch[keys.CELL].dtype)] if self.potential.stress else []
        fields = self._fields(min(message.source, message.target), batch)
        found = [Expected((*planes, *field.shape), field.dtype) for field in fields.values()]
        if kind == "b" or (kind == "F" and self.conservative):
            found += [positions, *cells, Expected((num_cells,), torch.float64)]
        return found

    def _fields(self, stage: int, batch: dict[str, Any]) -> dict[str, Field]:
        """The fields of the state that travel from a stage to the next."""
        return self.model.fields(self.stages[stage].layers.stop, batch)

    def _through(self, stage: int, batch: dict[str, Any], leaves: list[Tensor]) -> State:
        """The state after a stage's layers, from what came or from the embedding."""
        if self.stages[stage].is_first:
            state = self.model.embed(batch)
        else:
            dual = isinstance(batch[keys.POSITIONS], Dual)
            values = (Dual.of_planes(leaf) if dual else leaf for leaf in leaves)
            state = dict(zip(self._fields(stage - 1, batch), values, strict=True))
        return self.model.run_layers(self.stages[stage].layers, batch, state)

    def _leaves(self, stage: int, i: int, received: Tensors) -> tuple[list[Tensor], Tensors]:
        """The state of a message down, as leaves of a graph, and the rest of it."""
        if self.stages[stage].is_first:
            return [], received
        count = len(self._fields(stage - 1, self.micro_batches[i]))
        return [t.requires_grad_() for t in received[:count]], received[count:]

    def _sent(self, stage: int, batch: dict[str, Any], state: State) -> list[Tensor]:
        values = [state[name] for name in self._fields(stage, batch)]
        return [t.planes if isinstance(t, Dual) else t for t in values]

    # Pass 1 of conservative forces.

    def _probe(self, stage: int, i: int, received: Tensors) -> Tensors:
        """f: energies, with a graph to positions and strain alone."""
        leaves, _ = self._leaves(stage, i, received)
        with frozen(self.model):
            batch, sources = differentiable(self.micro_batches[i], self.potential.stress)
            state = self._through(stage, batch, leaves)
            if self.stages[stage].is_last:
                predicted = self.model.outputs(batch, state)
                outputs = [predicted.pop(keys.ENERGY)]
                if self.loss is None:
                    self.predictions[i] = {key: value.detach() for key, value in predicted.items()}
            else:
                outputs = self._sent(stage, batch, state)
        self._kept[Action(stage, "f", i)] = Kept(leaves, sources, outputs)
        return [t.detach() for t in outputs]

    def _probe_backward(self, stage: int, i: int, received: Tensors) -> Tensors:
        """b: cotangents to the stage before, with dE/dx0, dE/dstrain so far and the energies."""
        leaves, sources, outputs = self._kept.pop(Action(stage, "f", i))
        if self.stages[stage].is_last:
            energy_B, bars, so_far = outputs[0].detach(), [torch.ones_like(outputs[0])], None
        else:
            count = len(outputs)
            energy_B, bars, so_far = received[-1], list(received[:count]), received[count:-1]
        with frozen(self.model):  # recomputed layers run as they did
            found = torch.autograd.grad(
                outputs, [*leaves, *sources], bars, allow_unused=True, materialize_grads=True
            )
        gradients = self._summed(found[len(leaves) :], so_far)
        if not self.stages[stage].is_first:
            return [*found[: len(leaves)], *gradients, energy_B]
        self._found[i] = energy_B, gradients
        return []

    def _summed(self, own: Tensors, so_far: Tensors | None) -> list[Tensor]:
        """dE/dx0 and dE/dstrain of this stage and those after it."""
        return list(own) if so_far is None else [a + b for a, b in zip(own, so_far, strict=True)]

    def _forces(self, _: int, i: int, __: Tensors) -> Tensors:
        """R: the loss, and the direction in which pass 2 differentiates."""
        batch, (energy_B, gradients) = self.micro_batches[i], self._found.pop(i)
        outputs = derivatives(batch, energy_B, gradients)
        if self.loss is None:
            self.predictions.setdefault(i, {}).update(outputs)
            return []
        outputs = {key: value.detach().requires_grad_() for key, value in outputs.items()}
        total = self._take_loss(i, outputs, [term for term in TERMS if term in outputs])
        bars = torch.autograd.grad(total, list(outputs.values()), materialize_grads=True, allow_unused=True)
        bar = dict(zip(outputs, bars, strict=True))
        x_tangent_NC, cell_tangent_B33 = seeds(batch, bar[keys.FORCES], bar.get(keys.STRESS))
        cells = [] if cell_tangent_B33 is None else [cell_tangent_B33]
        self._seeds[i] = [x_tangent_NC, *cells, bar[keys.ENERGY]]
        return []

    def _take_loss(self, i: int, outputs: dict[str, Tensor], terms: Collection[str] = tuple(TERMS)) -> Tensor:
        assert self.loss is not None
        assert self.counts is not None
        total, shares = self.loss(outputs, self.micro_batches[i], self.counts, terms)
        parts = [shares.get(term, torch.zeros_like(total)).detach() for term in TERMS]
        self.total += torch.stack([total.detach(), *parts])
        return total

    # An ordinary step, and pass 2.

    def _forward(self, stage: int, i: int, received: Tensors) -> Tensors:
        """F: on pairs of value and tangent for conservative forces."""
        leaves, rest = self._leaves(stage, i, received)
        batch: dict[str, Any] = self.micro_batches[i]
        if self.conservative:
            rest = self._seeds.pop(i) if self.stages[stage].is_first else rest
            batch = self._seeded(stage, batch, rest)
        state = self._through(stage, batch, leaves)
        if self.stages[stage].is_last:
            predicted = self.model.outputs(batch, state)
            if self.loss is None:
                self.predictions[i] = {key: value.detach() for key, value in predicted.items()}
                return []
            outputs = [self._objective(i, predicted, rest)]
        else:
            outputs = self._sent(stage, batch, state)
        made = [t.detach() for t in outputs]
        if self.loss is not None:
            self._kept[Action(stage, "F", i)] = Kept(leaves, [], outputs)
        return [*made, *rest] if self.conservative else made

    def _seeded(self, stage: int, batch: Batch, rest: Tensors) -> dict[str, Any]:
        """The batch with the tangents of x0 and the cell, which every stage needs."""
        return along(batch, rest[0], rest[1] if self.potential.stress else None)

    def _objective(self, i: int, predicted: dict[str, Any], rest: Tensors) -> Tensor:
        """Its gradient is the loss's: the loss, or sum(u E) + sum(E') and the terms of other labels."""
        if not self.conservative:
            return self._take_loss(i, predicted)
        energy_B = predicted[keys.ENERGY]
        objective: Tensor = (rest[-1] * energy_B.value).sum() + energy_B.tangent.sum()
        if self._other_terms:
            values = {key: value.value for key, value in predicted.items()}
            objective = objective + self._take_loss(i, values, self._other_terms)
        return objective

    def _bars(self, stage: int, received: Tensors) -> list[Tensor | None]:
        return [None] if self.stages[stage].is_last else list(received)

    def _backward(self, stage: int, i: int, received: Tensors) -> Tensors:
        leaves, _, outputs = self._kept.pop(Action(stage, "F", i))
        torch.autograd.backward(outputs, self._bars(stage, received))
        return [_gradient(leaf) for leaf in leaves]

    def _input_backward(self, stage: int, i: int, received: Tensors) -> Tensors:
        """I: to the inputs alone; the graph is kept for W."""
        leaves, _, outputs = self._kept.pop(Action(stage, "F", i))
        bars = self._bars(stage, received)
        self._split[Action(stage, "I", i)] = Split(leaves, outputs, bars)
        if not leaves:
            return []
        with self.sharding.inputs_only():
            return torch.autograd.grad(
                outputs,
                leaves,
                bars,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )

    def _weight_backward(self, stage: int, i: int, _: Tensors) -> Tensors:
        leaves, outputs, bars = self._split.pop(Action(stage, "I", i))
        goals: list[Tensor] = [*self._parameters(stage)]
        if self.sharding.through_inputs:
            goals += leaves
        torch.autograd.backward(outputs, bars, inputs=goals)
        return []

    def _parameters(self, stage: int) -> list[nn.Parameter]:
        """Those of the stage's layers, of the embeddings before the first, of the head behind the last."""
        others = {f"layers.{k}" for k in self.model.part.layers if k not in self.stages[stage].layers}
        if not self.stages[stage].is_first:
            others |= {"element_embedding", "level_embedding"}
        if not self.stages[stage].is_last:
            others.add("energy_head")
        blocks = (module for name, module in self.model.blocks() if name not in others)
        return [p for module in blocks for p in module.parameters()]


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
