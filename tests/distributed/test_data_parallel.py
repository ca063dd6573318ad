"""Data-parallel ranks equal one process, the loss and every gradient of a force loss, to 1e-10."""

import pytest
import torch
from ase import Atoms
from torch import Tensor

from megagnn.data import keys
from megagnn.data.batch import build_graph, collate
from megagnn.models.potential import Potential
from megagnn.objective.config import LossConfig
from megagnn.objective.gradient_methods import GRADIENT_METHODS
from megagnn.objective.loss import Loss, label_counts
from megagnn.optim.bucket_reducer import GradientReducer
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.world import sum_over_dp
from tests.distributed.spawn import spawn
from tests.models.physics import crystal, ethanol, model_config, randomised, slab
from tests.tolerances import PARITY, PARITY_FLOOR

# structures of each rank: uneven in atoms and number, and a rank without any
SHARES = {2: [[0, 1, 2, 3], [4]], 4: [[0, 3], [1], [2, 4], []]}


def graphs() -> list[dict]:
    """Five structures with random labels, some of them missing."""
    structures: list[Atoms] = [ethanol(), crystal(), slab(), ethanol()[:4], crystal() * (1, 2, 1)]
    generator = torch.Generator().manual_seed(3)
    result = []
    for index, atoms in enumerate(structures):
        graph = build_graph(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc, 4.0)
        labels = torch.randn(len(atoms) + 4, 3, generator=generator, dtype=torch.float64).numpy()
        if index != 3:
            graph[keys.ENERGY] = float(labels[0, 0])
        if index != 0:
            graph[keys.FORCES] = labels[4:]
        if index == 1:
            graph[keys.STRESS] = labels[1:4] + labels[1:4].T
        graph[keys.SOURCE] = graph[keys.LEVEL] = index % 2
        graph[keys.WEIGHTS] = (0.5 + index % 3, 2.0 - index % 2, 0.25 * (1 + index))
        result.append(graph)
    return result


def make(forces: str) -> Potential:
    return randomised(model_config(forces=forces, stress=forces == "conservative"))


def gradients(
    context: ParallelContext, share: list[int], forces: str, kind: str
) -> tuple[float, dict[str, Tensor]]:
    """Global loss and gradients, as a training step takes them."""
    potential = make(forces)
    stress_weight = 0.3 if forces == "conservative" else 0.0
    loss = Loss(LossConfig(kind, kind, kind, energy_weight=0.7, stress_weight=stress_weight))
    everything = graphs()
    batch = collate([everything[i] for i in share], torch.float64)
    counts = label_counts(batch, context)
    reducer = GradientReducer(potential.parameters(), context, bucket_bytes=1000)
    reducer.start()
    total, _ = GRADIENT_METHODS["create_graph"](potential, batch, loss, counts)
    reducer.finish()
    sum_over_dp(total, context)
    return total.item(), {n: p.grad for n, p in potential.named_parameters() if p.grad is not None}


CASES = [(forces, kind) for forces in ("conservative", "direct") for kind in ("mae", "mse", "huber")]


def on_rank(context: ParallelContext) -> list[tuple[float, dict[str, Tensor]]]:
    share = SHARES[context.dp_size][context.dp_rank]
    return [gradients(context, share, forces, kind) for forces, kind in CASES]


def worst(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest max|g - g_ref| / max|g_ref| over the parameters, with a floor for vanishing gradients."""
    norm = torch.cat([g.flatten() for g in expected.values()]).norm().item()
    assert got.keys() == expected.keys()
    errors = []
    for name, reference in expected.items():
        scale = max(reference.abs().max().item(), PARITY_FLOOR / PARITY * norm)
        errors.append((got[name] - reference).abs().max().item() / scale)
    return max(errors)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_equal_one_process(world_size: int) -> None:
    references = [gradients(ParallelContext(), list(range(5)), forces, kind) for forces, kind in CASES]
    for results in spawn(world_size, on_rank):  # one spawn for all cases: starting ranks is what takes time
        for (loss, grads), (reference_loss, reference_grads) in zip(results, references, strict=True):
            assert loss == pytest.approx(reference_loss, rel=PARITY)
            assert worst(grads, reference_grads) < PARITY


def test_mean_of_rank_means_would_fail() -> None:
    """The bug this guards against, each rank dividing by its own counts, is far outside the tolerance."""
    expected = gradients(ParallelContext(), list(range(5)), "conservative", "mse")[1]
    shares = [gradients(ParallelContext(), share, "conservative", "mse")[1] for share in SHARES[2]]
    mean = {name: sum(share[name] for share in shares) / len(shares) for name in expected}
    assert worst(mean, expected) > 0.1
