import time

import pytest

from megagnn.models.potential import build_potential
from megagnn.models.registry import FAMILIES
from megagnn.parallel.parameter import num_parameters
from megagnn.plan.layout import Sizes
from tests.plan.layouts import layout_of


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_layers", [1, 2, 3, 6])
def test_parameters_are_counted_without_the_model(family: str, num_layers: int) -> None:
    layout = layout_of(
        {"family": family, "num_layers": num_layers, "forces": "direct"}, sizes=Sizes(9, 90, 1, 5, 3)
    )
    model = build_potential(layout.model, layout.statistics)
    assert layout.num_parameters == num_parameters(model)
    units = layout.units(0)
    assert [name for name, _ in units] == [name for name, _ in model.model.blocks()]
    assert sum(s.numel for _, unit in units for s in unit) == layout.num_parameters


def test_a_hundred_billion_parameters_take_no_time() -> None:
    start = time.process_time()
    layout = layout_of({"width": 32768, "num_layers": 14}, ranks=16384, parallel={"pipeline": 2, "tensor": 8})
    assert 1e11 < layout.num_parameters < 1.1e11
    assert (layout.dp, layout.pp, layout.tp) == (1024, 2, 8)
    assert time.process_time() - start < 5


def test_stages_hold_every_unit_once() -> None:
    layout = layout_of(parallel={"pipeline": 2}, optim={"accumulate_steps": 4}, ranks=2)
    names = [name for rank in range(2) for name, _ in layout.units(rank)]
    whole = layout_of().units(0)
    assert names == [name for name, _ in whole]
    assert layout.numbers_on(0) + layout.numbers_on(1) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ranks": 3, "parallel": {"tensor": 2}}, "3 rank.s. cannot be divided"),
        ({"ranks": 3, "parallel": {"tensor": 3}}, "32 is not divisible by tensor_parallel 3; use 30 or 33"),
        ({"ranks": 8, "parallel": {"pipeline": 8}}, "4 are fewer than the 8 stages"),
        (
            {
                "model": {"forces": "conservative", "family": "painn"},
                "train": {"gradient_method": "create_graph"},
            },
            "plan",
        ),
    ],
)
def test_what_cannot_be_laid_out_is_refused(values: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=message):
        layout_of(**values)


def test_a_batch_has_atoms() -> None:
    with pytest.raises(ValueError, match="num_edges of a plan must be at least 1, got 0"):
        Sizes(3, 0)
