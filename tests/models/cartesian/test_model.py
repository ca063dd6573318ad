"""The Cartesian family against its formulas written a second time; constants, sizes, what is sent, errors."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megagnn.config import config_from_dict
from megagnn.data import keys
from megagnn.data.batch import batch_from_atoms
from megagnn.models.cartesian import messages
from megagnn.models.cartesian.messages import COMPONENTS, PATHS, Edges
from megagnn.models.potential import build_potential
from megagnn.models.precision import precision_of
from megagnn.ops import Segments
from megagnn.parallel.context import ParallelContext
from tests.distributed.spawn import spawn
from tests.models.cartesian import plain
from tests.models.physics import STATISTICS, crystal, ethanol, model_config, randomised, slab
from tests.tolerances import PARITY

SETS = ("full", "lean", "painn")


def batch(cutoff: float = 4.0) -> dict[str, Tensor]:
    found = batch_from_atoms([ethanol(), crystal(), slab()], cutoff, torch.float64)
    return {**found, keys.LEVEL: torch.tensor([0, 1, 1])}


def loss(energy_B: Tensor, forces_NC: Tensor) -> Tensor:
    return energy_B.square().sum() + (forces_NC * torch.sin(forces_NC)).sum()


def errors(paths: str, num_splines: int = 0, **changes: Any) -> dict[str, float]:
    """max|x - x_ref| / max|x_ref| of energies, forces and gradients against the formulas of other keys."""
    same: dict[str, Any] = {"family": "cartesian", "paths": paths, "num_splines": num_splines}
    config, b = model_config(**same), batch()
    potential = randomised(config)
    outputs = potential(b, create_graph=True)
    bonding_B = outputs[keys.ENERGY] - potential.model.reference_energy(b)
    loss(bonding_B, outputs[keys.FORCES]).backward()
    got = {"energy": bonding_B.detach(), "forces": outputs[keys.FORCES].detach()}
    got |= {name: p.grad for name, p in potential.model.named_parameters() if p.grad is not None}
    parameters = {name: p.detach().requires_grad_() for name, p in potential.model.named_parameters()}
    moved = {**b, keys.POSITIONS: b[keys.POSITIONS].clone().requires_grad_()}
    other = model_config(**{**same, **changes})
    energy_B = plain.energies(parameters, other, STATISTICS, moved)
    (gradient_NC,) = torch.autograd.grad(energy_B.sum(), moved[keys.POSITIONS], create_graph=True)
    loss(energy_B, -gradient_NC).backward()
    expected = {"energy": energy_B.detach(), "forces": -gradient_NC.detach()}
    expected |= {name: p.grad for name, p in parameters.items() if p.grad is not None}
    assert got.keys() == expected.keys() == {"energy", "forces", *parameters}
    return {
        name: ((x - expected[name]).abs().max() / expected[name].abs().max()).item()
        for name, x in got.items()
    }


@pytest.mark.parametrize(("paths", "splines"), [*((paths, 0) for paths in SETS), ("full", 13)])
def test_equals_the_formulas_written_again(paths: str, splines: int) -> None:
    found = errors(paths, splines)
    assert max(found.values()) <= PARITY, found


def test_another_definition_is_far_outside_the_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(errors("full", cutoff=4.001).values()) > 1e3 * PARITY
    monkeypatch.setitem(plain.FACTORS, 13, 5.3)  # for 90/17
    assert max(errors("full").values()) > 1e3 * PARITY


@pytest.mark.parametrize("number", PATHS)
def test_factors_give_unit_variance(number: int) -> None:
    """Of independent components of unit variance, for any direction: the mean square over the receiver's."""
    path, unit_C = PATHS[number], torch.tensor([0.48, -0.6, 0.64], dtype=torch.float64)
    components = COMPONENTS[path.sender]
    # one edge for each component of the sender
    given = torch.eye(components, dtype=torch.float64).unsqueeze(-1)
    unit_EC = unit_C.expand(components, 3)
    nowhere = Segments(torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    edges = Edges(nowhere, nowhere, None, unit_EC.unsqueeze(-1), *messages.direction_matrices(unit_EC))
    weights = {n: torch.zeros(components, 1, dtype=torch.float64) for n in PATHS}
    weights[number] = torch.full((components, 1), path.factor, dtype=torch.float64)
    sender = {name: torch.zeros(components, n, 1, dtype=torch.float64) for name, n in COMPONENTS.items()}
    sender[path.sender] = given
    sender["h"] = sender["h"].squeeze(-1)
    found = messages.messages(PATHS, weights, sender, edges)[path.receiver]
    assert found.square().sum().item() == pytest.approx(COMPONENTS[path.receiver], rel=1e-12)


def test_the_basis_is_orthonormal_symmetric_and_traceless() -> None:
    basis = messages.tensor_basis()
    torch.testing.assert_close(torch.einsum("mij,nij->mn", basis, basis), torch.eye(5).double())
    assert torch.equal(basis, basis.mT)
    assert torch.einsum("mii->m", basis).abs().max() < 1e-15


def test_sizes_are_those_of_the_formulas() -> None:
    """Of the default shares of the width: multiply-adds per atom 10.1 F^2, and parameters 5.6 F^2."""
    config: Any = model_config(family="cartesian", width=256, num_layers=3)
    model = build_potential(config, STATISTICS, deferred=True).model
    inner = model.layer(1)
    assert model.work(config, 1).per_atom / 256**2 == pytest.approx(10.1, abs=0.3)
    assert sum(p.numel() for p in inner.parameters()) / 256**2 == pytest.approx(5.6 + 14 * 8 / 512, abs=0.1)
    assert model.work(config, 1).per_edge / 128 == 14 * 8 + 68
    lean: Any = model_config(family="cartesian", width=256, num_layers=3, paths="lean")
    assert model.work(lean, 1).per_edge / 128 == 5 * 8 + 1 + (1 + 3 + 3) + (1 + 5 + 5)


def sent(context: ParallelContext, forces: str, cutoff: float) -> tuple[int, list[Any]]:
    """Edges of the batch, and elements that this rank sends forwards and backwards."""
    config = model_config(family="cartesian", cutoff=cutoff, forces=forces)
    potential, b = randomised(config, context=context), batch(cutoff)
    b[keys.POSITIONS].requires_grad_(forces == "conservative")
    with context.traffic.measured() as forward:
        outputs = potential.model(b)
    with context.traffic.measured() as backward:
        torch.stack([x.sum() for x in outputs.values()]).sum().backward()
    return b[keys.EDGE_INDEX].shape[1], [forward.total("tp"), backward.total("tp")]


def all_sent(context: ParallelContext) -> dict[tuple[str, float], tuple[int, list[Any]]]:
    cases = [(forces, cutoff) for forces in ("conservative", "direct") for cutoff in (3.0, 4.5)]
    return {case: sent(context, *case) for case in cases}


def test_what_is_sent_does_not_grow_with_edges() -> None:
    """Features of atoms, sums of norms and outputs, gradients of positions; nothing per edge."""
    num_layers, h, v, t = 3, 16, 3 * 8, 5 * 4
    gathered = h + (num_layers - 1) * (h + v + t) + h
    for rank in spawn(2, all_sent, tp=2):
        for forces in ("conservative", "direct"):
            scattered = (num_layers - 1) * (h + v + t) + (h + v if forces == "direct" else h)
            # of n numbers an all-gather and a reduce-scatter send n/2 from each of two ranks, an all-reduce n
            once = (gathered + scattered) / 2 + 2 * num_layers + 1
            outputs, positions = (4, 0) if forces == "direct" else (1, 3)
            expected = [n * len(batch()[keys.POSITIONS]) for n in (once + outputs, once + positions)]
            (few_edges, few), (many_edges, many) = rank[forces, 3.0], rank[forces, 4.5]
            assert many_edges > 2 * few_edges
            assert few == many == expected


@pytest.mark.parametrize("paths", SETS)
def test_bfloat16_is_near_float64(paths: str) -> None:
    """Norms of errors of forces, and of gradients by one backward: some roundings of 2^-9 in each layer."""
    found = []
    for precision in map(precision_of, ("bfloat16", "float64")):
        config = model_config(family="cartesian", paths=paths)
        potential = build_potential(config, STATISTICS, precision=precision)
        b = batch_from_atoms([ethanol(), crystal(), slab()], 4.0, precision.geometry)
        pair = potential.directional(b, torch.sin(10 * b[keys.POSITIONS]))[keys.ENERGY]
        (pair.value.sum() + pair.tangent.sum()).backward()
        gradient = torch.cat(
            [p.grad.flatten().double() for p in potential.parameters() if p.grad is not None]
        )
        found.append((potential(b)[keys.FORCES].double(), gradient))
    for got, expected in zip(*found, strict=True):
        assert 0 < (got - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"paths": "all"}, "'model.paths'.*got 'all'"),
        ({"preset": "leen"}, "'model.preset'.*got 'leen'; nearest: 'lean'"),
        (
            {"paths": "painn", "tensor_width": 4},
            "tensor_width needs paths with tensors, got 4 .*'painn'; leave it",
        ),
        ({"num_splines": 10}, r"num_splines must be 0 or at least .* \+ 3 = 11, got 10; take more"),
    ],
)
def test_errors(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_dict({"model": {"family": "cartesian", **values}})


def test_presets_are_the_sets_of_paths() -> None:
    found = {p: config_from_dict({"model": {"family": "cartesian", "preset": p}}).model for p in SETS}
    assert {name: model.paths for name, model in found.items()} == {p: p for p in SETS}  # type: ignore[attr-defined]
    assert found["painn"].widths.keys() == {"h", "v"}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"width": 12}, "model.tensor_width 3 is not divisible by tensor_parallel 2; use 2 or 4"),
        ({"edge_width": 5}, "model.edge_width 5 is not divisible by tensor_parallel 2; use 4 or 6"),
        ({"vector_width": 7}, "model.vector_width 7 is not divisible by tensor_parallel 2; use 6 or 8"),
    ],
)
def test_widths_that_ranks_do_not_divide(widths: dict[str, int], message: str) -> None:
    context = ParallelContext(tp_size=2)
    with pytest.raises(ValueError, match=message):
        build_potential(model_config(family="cartesian", **widths), STATISTICS, context=context)


def test_the_plan_edge_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"'edge' divides products of channels on edges.*use 'auto' or 'channel'"
    ):
        build_potential(model_config(family="cartesian"), STATISTICS, plan="edge")
