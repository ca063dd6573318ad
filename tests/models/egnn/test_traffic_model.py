"""The formulas of what is sent equal what the collectives count, exactly; `auto` takes the smaller plan."""

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from megagnn.data import keys
from megagnn.data.batch import collate
from megagnn.models.costs import Pass, Setting
from megagnn.models.egnn.config import EGNNConfig
from megagnn.models.egnn.edge.operation import partition_edges
from megagnn.models.egnn.traffic_model import choose_plan, edge_total
from megagnn.models.family import pass_elements
from megagnn.models.potential import Potential, apply_strain, frozen
from megagnn.parallel.context import ParallelContext, Traffic
from tests.distributed.spawn import spawn
from tests.distributed.test_data_parallel import graphs
from tests.models.physics import model_config, randomised

# All widths different, so that no two terms can be mistaken for one another.
WIDTHS = {"message_hidden": 24, "message_width": 12, "coordinate_hidden": 20, "node_hidden": 28}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "stress": {"stress": True, **WIDTHS},
    "fixed coordinates": {"update_coordinates": False, **WIDTHS},
    "satorras": {"preset": "satorras", "num_layers": 2, "coordinate_bias": True},
    "direct": {"forces": "direct", **WIDTHS},
}
PLANS = ("channel", "edge")
CELLS = [
    (name, plan, memory, layers_again)
    for name in CONFIGURATIONS
    for plan in PLANS
    for memory in ("save", "recompute")
    for layers_again in (False, True)
]


def batch() -> dict[str, Tensor]:
    return collate(graphs(), torch.float64)


def counted(context: ParallelContext, potential: Potential) -> dict[str, tuple[Traffic, Traffic]]:
    """What is sent forward and backward in each pass of a training step."""
    b, config = batch(), potential.model.config
    if config.forces != "conservative":
        with context.traffic.measured() as forward:
            outputs = potential.model(b)
        with context.traffic.measured() as backward:
            (outputs[keys.ENERGY].sum() + outputs[keys.FORCES].sin().sum()).backward()
        return {"direct": (forward, backward)}
    x_NC = b[keys.POSITIONS].clone().requires_grad_()
    moved, inputs = {**b, keys.POSITIONS: x_NC}, [x_NC]
    if config.stress:
        inputs.append(torch.zeros_like(b[keys.CELL]).requires_grad_())
        moved = apply_strain(moved, inputs[-1])
    with frozen(potential.model):
        with context.traffic.measured() as forward:
            energy_B = potential.model(moved)[keys.ENERGY]
        with context.traffic.measured() as backward:
            torch.autograd.grad(energy_B.sum(), inputs)
    bars = [torch.ones_like(t) for t in inputs]
    with context.traffic.measured() as pair_forward:
        pair = potential.directional(b, *bars)[keys.ENERGY]
    with context.traffic.measured() as pair_backward:
        (pair.value.sum() + pair.tangent.sum()).backward()
    return {"value": (forward, backward), "pair": (pair_forward, pair_backward)}


def derived(context: ParallelContext, config: EGNNConfig, plan: Any, which: str) -> Pass:
    """The same by the formulas."""
    b = batch()
    num_atoms, num_structures = len(b[keys.POSITIONS]), len(b[keys.NUM_ATOMS])
    own = partition_edges(b, context, plan).own_rows
    setting = Setting(
        ranks=context.tp_size,
        planes=2 if which == "pair" else 1,
        num_atoms=num_atoms,
        own_atoms=own.stop - own.start,
        num_edges=b[keys.EDGE_INDEX].shape[1],
        blocks_again=config.edge_memory == "recompute",
        layers_again=config.recompute_layers,
        weights_wanted=which != "value",
    )
    positions = 3 * num_atoms + (9 * num_structures if config.stress else 0)
    return pass_elements(config, plan, setting, positions if which == "value" else 0)


def on_rank(context: ParallelContext) -> list[tuple[Any, ...]]:
    """(cell, pass, counted forward, derived forward, counted backward, derived backward)."""
    rows = []
    for name, plan, memory, layers_again in CELLS:
        config = model_config(
            **CONFIGURATIONS[name], edge_memory=memory, recompute_layers=layers_again, edge_block=32
        )
        potential = randomised(config, 0, context, plan)
        for which, (forward, backward) in counted(context, potential).items():
            want = derived(context, config, plan, which)
            cell = (name, plan, memory, layers_again, which)
            rows.append((cell, forward.total("tp"), want.forward, backward.total("tp"), want.backward))
            assert sum(forward.bytes.values()) == 8 * want.forward, "float64 everywhere"
    return rows


@pytest.mark.parametrize("tp", [2, 4])
def test_formulas_equal_the_counts(tp: int) -> None:
    for rows in spawn(tp, on_rank, tp=tp):
        assert len(rows) == 56
        for cell, forward, want_forward, backward, want_backward in rows:
            assert (forward, backward) == (want_forward, want_backward), cell
            assert forward > 0


def whole_step(plan: Any, config: EGNNConfig, tp: int, num_atoms: int, num_edges: int) -> Fraction:
    """Everything that a training step sends, atoms included, by the formulas held against the counts."""
    total, planes = Fraction(0), (1, 2) if config.forces == "conservative" else (1,)
    for count in planes:
        setting = Setting(
            ranks=tp,
            planes=count,
            num_atoms=num_atoms,
            own_atoms=Fraction(num_atoms, tp),
            num_edges=num_edges,
            blocks_again=config.edge_memory == "recompute",
            weights_wanted=count == planes[-1],
        )
        total += sum(pass_elements(config, plan, setting))
    return total


@pytest.mark.parametrize("forces", ["conservative", "direct"])
@pytest.mark.parametrize("memory", ["save", "recompute"])
def test_auto_takes_the_plan_that_sends_less(forces: str, memory: str) -> None:
    chosen = set()
    for width in (64, 256, 1024, 8192):
        config = model_config(width=width, forces=forces, edge_memory=memory)
        for num_atoms in (10, 300, 10_000):
            for neighbours in (2, 40):
                for tp in (2, 4, 8):
                    num_edges = num_atoms * neighbours
                    sizes = {
                        keys.ATOMIC_NUMBERS: torch.empty(num_atoms, device="meta"),
                        keys.EDGE_INDEX: torch.empty(2, num_edges, device="meta"),
                    }
                    context = ParallelContext(tp_size=tp)
                    plan = choose_plan("auto", config, sizes, context)
                    assert plan is not None
                    sent = {p: whole_step(p, config, tp, num_atoms, num_edges) for p in ("channel", "edge")}
                    assert sent[plan] == min(sent.values())
                    chosen.add(plan)
    assert chosen == {"channel", "edge"}, "each is the better one somewhere"


def test_the_crossover_is_where_the_leading_terms_say() -> None:
    """Direct forces, `save`, in units of u: channel 4 E F, edge 6 F^2 + 2 (1 + 2/t) N F, and small terms."""
    width, num_atoms, tp = 2048, 100, 8
    config = model_config(width=width, forces="direct", num_layers=1, num_radial=1)
    u = Fraction(tp - 1, tp)
    leading = u * (6 * width * width + num_atoms * width * 2 * (1 + Fraction(2, tp)))
    edge = edge_total("edge", config, tp, num_atoms, 0)
    assert float(edge / leading) == pytest.approx(1, rel=0.01)
    channel = edge_total("channel", config, tp, num_atoms, 5000)
    assert float(channel / (u * 4 * 5000 * width)) == pytest.approx(1, rel=0.01)


def test_a_chosen_plan_is_kept_and_one_rank_has_none() -> None:
    config = model_config()
    assert choose_plan("channel", config, {}, ParallelContext(tp_size=2)) == "channel"
    assert choose_plan("auto", config, {}, ParallelContext()) is None
