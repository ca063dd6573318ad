"""bfloat16 on two tensor-parallel ranks: as far from float64 as one process is, and less sent.

Two ranks round other partial sums than one process does, so nothing is equal to the bit. Each is held against
float64 with the same weights: what the ranks add is a rounding of each partial product of atoms (2^-9 of it,
where one process rounds the sum), of the size of those that are there anyway. So the error must stay below
three times that of one process, and below the tolerances of tests/models/test_precision.py.
"""

from itertools import product
from typing import Any, NamedTuple

import pytest
import torch

from megagnn.data import keys
from megagnn.data.batch import collate
from megagnn.models.potential import build_potential
from megagnn.models.precision import Precision, precision_of
from megagnn.objective.config import LossConfig
from megagnn.objective.gradient_methods import GRADIENT_METHODS
from megagnn.objective.loss import label_counts
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.parameter import layout_of
from tests.distributed import mistakes
from tests.distributed.parity import CUTOFF, RecordingLoss, structures, whole_gradients
from tests.distributed.spawn import spawn
from tests.models.physics import STATISTICS, model_config, randomised
from tests.models.test_precision import GRADIENTS, OUTPUTS, distance

HALF, SINGLE, DOUBLE = (precision_of(name) for name in ("bfloat16", "float32", "float64"))


class Way(NamedTuple):
    """How the model is run."""

    plan: Any
    operation: str = "fused"
    memory: str = "save"
    method: str = "one_backward"
    forces: str = "conservative"


ALONE = Way("auto")
WAYS = [
    *(Way(plan, *how) for plan, how in product(("channel", "edge"), (("fused",), ("unfused",)))),
    *(Way(plan, "fused", "recompute", "create_graph") for plan in ("channel", "edge")),
    *(Way(plan, forces="direct") for plan in ("channel", "edge")),
]


def run(context: ParallelContext, way: Way, precision: Precision) -> dict[str, torch.Tensor]:
    """Energies without references, forces, and the gradient of a loss on both, as one vector."""
    config = model_config(
        width=16,
        num_radial=4,
        cutoff=CUTOFF,
        edge_operation=way.operation,
        edge_memory=way.memory,
        recompute_layers=way.memory == "recompute",
        forces=way.forces,
    )
    potential = build_potential(config, STATISTICS, 0, precision, context, way.plan)
    with torch.no_grad():
        for p, random in zip(potential.parameters(), randomised(config).parameters(), strict=True):
            p.copy_(layout_of(p).slice_of(random.bfloat16()))
    batch = collate(structures(), precision.geometry)
    loss = RecordingLoss(LossConfig("mse", "mse"))
    GRADIENT_METHODS[way.method](potential, batch, loss, label_counts(batch, context))
    gradients = whole_gradients(potential, context)
    return {
        "energy": loss.outputs[keys.ENERGY] - potential.model.reference_energy(batch),
        "forces": loss.outputs[keys.FORCES],
        "gradients": torch.cat([gradients[name].double().flatten() for name in sorted(gradients)]),
        **{f"gradient of {name}": gradient for name, gradient in gradients.items()},
    }


def worst_gradient(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest error of one parameter's gradient; small ones relative to a thousandth of all."""
    floor = 1e-3 * wanted["gradients"].norm()
    errors = [
        float((got[name].double() - gradient).norm() / torch.maximum(gradient.norm(), floor))
        for name, gradient in wanted.items()
        if name.startswith("gradient of")
    ]
    return max(errors)


def on_rank(context: ParallelContext) -> dict[str, Any]:
    found: dict[str, Any] = {"runs": [run(context, way, HALF) for way in WAYS]}
    for plan, precision in product(("channel", "edge"), (HALF, SINGLE)):
        with context.traffic.measured() as sent:
            run(context, Way(plan), precision)
        found[f"bytes {plan} {precision.parameters.itemsize}"] = float(sum(sent.bytes.values()))
    with pytest.MonkeyPatch.context() as patch:
        mistakes.weights_without_sum(patch)
        found["mistake"] = run(context, Way("edge"), HALF)
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return spawn(2, on_rank, tp=2)


@pytest.mark.parametrize("index", range(len(WAYS)), ids=[" ".join(way) for way in WAYS])
def test_two_ranks_are_as_exact_as_one(ranks: list[dict[str, Any]], index: int) -> None:
    way = WAYS[index]._replace(plan="auto")
    wanted, alone = run(ParallelContext(), way, DOUBLE), run(ParallelContext(), way, HALF)
    for found in ranks:
        got = found["runs"][index]
        assert got["forces"].dtype == torch.float32
        for name, bound in {"energy": OUTPUTS, "forces": OUTPUTS, "gradients": GRADIENTS}.items():
            error = distance(got[name], wanted[name])
            assert error < bound, name
            assert error < 3 * distance(alone[name], wanted[name]), name
        assert worst_gradient(got, wanted) < 3 * GRADIENTS


def test_a_missing_sum_is_seen(ranks: list[dict[str, Any]]) -> None:
    wanted = run(ParallelContext(), ALONE, DOUBLE)
    assert worst_gradient(ranks[0]["mistake"], wanted) > 2 * 3 * GRADIENTS


def test_ranks_agree(ranks: list[dict[str, Any]]) -> None:
    """Energies and forces are replicated: the same bits."""
    for one, other in zip(ranks[0]["runs"], ranks[1]["runs"], strict=True):
        assert torch.equal(one["energy"], other["energy"])
        assert torch.equal(one["forces"], other["forces"])


def test_less_is_sent(ranks: list[dict[str, Any]]) -> None:
    """Under `edge` features and weights travel in two bytes; under `channel` partial sums in four."""
    found = ranks[0]
    assert found["bytes edge 2"] < 0.75 * found["bytes edge 4"]
    assert found["bytes channel 2"] < found["bytes channel 4"]
