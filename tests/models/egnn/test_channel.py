"""The runner of the plan `channel` on one rank, where its collectives send nothing, and what it refuses."""

import pytest
import torch
from torch import Tensor

from megagnn.models.egnn.edge import EdgeSpec, edge_message
from megagnn.models.egnn.edge.plan_channel import ChannelRunner, block_edges
from megagnn.models.egnn.edge.types import EdgeWeights
from megagnn.ops import extension
from megagnn.parallel.context import ParallelContext
from tests.models.egnn.edge_cases import Case, largest_error, present, random_case
from tests.tolerances import RELATIVE

pytestmark = pytest.mark.skipif(not extension.has_cpu, reason="the stages are compiled")


def outputs_and_forces(case: Case, runner: ChannelRunner | None) -> tuple[list[Tensor], Tensor]:
    """sum and vec, and the derivative by r of a function of both, which can be differentiated."""
    call = (*case.inputs, case.weights, case.graph, EdgeSpec(block_edges=16))
    outputs = present(edge_message(*call) if runner is None else edge_message(*call, runner))
    (forces,) = torch.autograd.grad(sum(t.sin().sum() for t in outputs), case.inputs[2], create_graph=True)
    return outputs, forces


@pytest.mark.parametrize("vector", [True, False])
def test_equals_the_fused_operation_to_second_order(vector: bool) -> None:
    results = []
    for runner in (ChannelRunner(ParallelContext()), None):
        case = random_case(vector=vector).leaves()
        outputs, forces = outputs_and_forces(case, runner)
        leaves = [*present(case.inputs), *present(case.weights[1:])]
        second = torch.autograd.grad(forces.square().sum(), leaves, materialize_grads=True)
        results.append([*outputs, forces, *second])
    assert largest_error(results[0], results[1]) < 100 * RELATIVE[torch.float64]


def test_gradients_of_divided_weights_are_not_differentiated() -> None:
    """No loss on forces asks for it; silently it would be wrong."""
    case = random_case().leaves()
    runner = ChannelRunner(ParallelContext())
    outputs = present(edge_message(*case.inputs, case.weights, case.graph, EdgeSpec(), runner))
    w2_MH = case.weights.w2_MH
    (gradient,) = torch.autograd.grad(outputs[0].sin().sum(), w2_MH, create_graph=True)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated; use model\.edge_operation"):
        torch.autograd.grad(gradient.square().sum(), w2_MH)


def test_all_ranks_cut_the_same_blocks() -> None:
    """Their size depends on what all ranks know alike: the message width, of which w2 holds all rows."""
    whole = torch.zeros(2048, 512)
    for tp in (2, 4):
        part = EdgeWeights(None, torch.zeros(512 // tp, 8), whole.chunk(tp, 1)[0], torch.zeros(2048 // tp))
        assert block_edges(part, 1) == 512
    narrow = EdgeWeights(None, torch.zeros(32, 8), torch.zeros(64, 32), torch.zeros(64))
    assert block_edges(narrow, 2) == block_edges(narrow, 1) // 2 == 4096
