"""What every model family must keep of the interface, and how configurations choose a family."""

import dataclasses
import typing
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megagnn.config import RunConfig, config_from_dict, config_to_dict
from megagnn.data import keys
from megagnn.data.batch import batch_from_atoms
from megagnn.models.config import ModelConfig
from megagnn.models.family import Part, layer_works, step_flops
from megagnn.models.potential import Potential, build_potential
from megagnn.models.registry import FAMILIES, model_class, presets_of
from megagnn.objective.config import LossConfig
from megagnn.objective.gradient_methods import GRADIENT_METHODS
from megagnn.objective.loss import Loss, label_counts
from megagnn.parallel.context import ParallelContext
from megagnn.pipeline_parallel.stage import layer_costs
from tests.distributed.parity import batch_of
from tests.models.physics import STATISTICS, crystal, ethanol, randomised
from tests.tolerances import PARITY

families = pytest.mark.parametrize("family", FAMILIES)


def forces_of(family: str) -> tuple[str, ...]:
    """The values of `model.forces` that a family has."""
    return typing.get_args(typing.get_type_hints(FAMILIES[family].config)["forces"])


def config_of(family: str, **values: Any) -> ModelConfig:
    forces = "direct" if "direct" in forces_of(family) else "none"
    small = {"width": 16, "num_layers": 3, "num_radial": 8, "cutoff": 4.0, "forces": forces}
    model = {"family": family, **small, **values}
    return config_from_dict({"model": model, "loss": {"force_weight": 0}}).model


def potential_of(family: str, part: Part | None = None, **values: Any) -> Potential:
    return build_potential(config_of(family, **values), STATISTICS, 0, torch.float64, part=part)


@families
def test_states_are_as_the_fields_say(family: str) -> None:
    """What a pipeline stage expects is what the stage before it makes."""
    model, batch = potential_of(family).model, batch_from_atoms([ethanol(), crystal()], 4.0)
    state = model.embed(batch)
    for done in range(4):
        if done:
            state = model.run_layers([done - 1], batch, state)
        fields = model.fields(done, batch)
        assert next(iter(fields)) == "h"
        for name, field in fields.items():
            assert (tuple(state[name].shape), state[name].dtype) == field, name
        state = {name: state[name] for name in fields} | {
            name: value for name, value in state.items() if done == 3 and name not in fields
        }
    outputs, whole = model.outputs(batch, state), model(batch)
    assert outputs.keys() == whole.keys()
    for key in whole:
        torch.testing.assert_close(outputs[key], whole[key], rtol=1e-12, atol=1e-12)


@families
def test_blocks_hold_every_parameter_once(family: str) -> None:
    model = potential_of(family).model
    names = [f"{block}.{name}" for block, module in model.blocks() for name, _ in module.named_parameters()]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert [name for name, _ in model.blocks()][-4:] == ["layers.0", "layers.1", "layers.2", "energy_head"]


@families
def test_a_part_holds_what_the_whole_does(family: str) -> None:
    """Initial weights do not depend on the part: pipeline ranks need not talk about them."""
    whole = dict(potential_of(family).model.named_parameters())
    first = potential_of(family, Part((0, 1), head=False)).model
    last = potential_of(family, Part((2,), embedding=False)).model
    parts = [dict(model.named_parameters()) for model in (first, last)]
    assert not parts[0].keys() & parts[1].keys()
    assert parts[0].keys() | parts[1].keys() == whole.keys()
    for part in parts:
        for name, parameter in part.items():
            assert torch.equal(parameter, whole[name]), name


@pytest.mark.parametrize(
    ("family", "forces"),
    [(family, forces) for family in FAMILIES for forces in forces_of(family) if forces != "conservative"],
)
def test_the_work_is_what_is_multiplied(family: str, forces: str) -> None:
    """Matrix products counted by PyTorch in a forward pass of plain operations.

    Products with a vector of one output, and such of a few components, are of lower order in the width. What
    a family counts outside of matrix products PyTorch does not.
    """
    plain = {"edge_operation": "unfused"} if hasattr(config_of(family), "edge_operation") else {}
    potential = potential_of(family, width=64, forces=forces, **plain)
    batch = batch_from_atoms([crystal()], 4.0)
    num_atoms, num_edges = len(batch[keys.ATOMIC_NUMBERS]), batch[keys.EDGE_INDEX].shape[1]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        potential(batch)
    works = layer_works(potential.model.config)
    stated = sum((w.per_edge - w.channelwise) * num_edges + w.per_atom * num_atoms for w in works)
    assert counter.get_total_flops() / 2 == pytest.approx(stated, rel=0.03)


@families
def test_one_backward_equals_derivatives_of_derivatives(family: str) -> None:
    """Every operation of the family knows pairs of value and tangent."""
    potential, batch = randomised(config_of(family, forces="conservative", stress=True)), batch_of(range(3))
    loss, counts = Loss(LossConfig(stress_weight=0.1)), label_counts(batch, ParallelContext())
    found = []
    for method in ("create_graph", "one_backward"):
        GRADIENT_METHODS[method](potential, batch, loss, counts)
        found.append({name: p.grad for name, p in potential.named_parameters()})
        potential.zero_grad()
    for name, expected in found[0].items():
        error = (found[1][name] - expected).abs().max()
        assert error <= PARITY * expected.abs().max(), name


@families
def test_stages_and_sweeps_count_alike(family: str) -> None:
    config = config_of(family)
    atoms, neighbours = 100.0, 30.0
    per_atom = sum(layer_costs(config, neighbours))
    assert step_flops(config, atoms, atoms * neighbours) == pytest.approx(2 * 3 * per_atom * atoms)


@families
def test_configurations_come_back(family: str) -> None:
    config = config_from_dict({"model": {"family": family, "width": 24}})
    assert type(config.model) is FAMILIES[family].config
    assert config_from_dict(config_to_dict(config)) == config
    assert model_class(config.model).__name__ in FAMILIES[family].model
    assert "default" in presets_of({"family": family})


def test_without_a_family_it_is_the_egnn() -> None:
    assert config_from_dict({"model": {"width": 24}}).model.family == "egnn" == RunConfig().model.family


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"family": "egn"}, "model.family must be one of .*egnn.*, got 'egn'; nearest: 'egnn'"),
        ({"family": 3}, "model.family must be one of .*egnn.*, got 3"),
        ({"num_splines": 16}, "'model.num_splines' is one of the family cartesian, and of 'egnn' it is not"),
        ({"edge_memori": "save"}, "'model.edge_memori'; nearest valid key: 'model.edge_memory'"),
        ({"width": 0}, "'model.width': input should be greater than 0, got 0"),
        ({"preset": "satoras"}, "'model.preset': .* got 'satoras'; nearest: 'satorras'"),
    ],
)
def test_errors_name_the_nearest(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_dict({"model": values})


def test_errors_of_all_sections_come_together() -> None:
    with pytest.raises(ValueError, match=r"model\.width.*\n.*optim\.learning_rate"):
        config_from_dict({"model": {"width": 0}, "optim": {"learning_rate": -1}})


def test_a_wrong_model_hides_rules_between_sections() -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*model\.width[^\n]*$"):
        config_from_dict({"model": {"width": 0, "stress": True}, "loss": {"stress_weight": 1}})


def test_every_family_has_the_keys_of_all() -> None:
    common = {field.name for field in dataclasses.fields(ModelConfig)}  # type: ignore[arg-type]
    for family in FAMILIES.values():
        assert common <= {field.name for field in dataclasses.fields(family.config)}  # type: ignore[arg-type]
