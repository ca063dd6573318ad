"""Parameters know their slice: weights, copies, counts and sizes on any layout. No processes needed."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

from megagnn.models.egnn.config import EGNNConfig
from megagnn.models.potential import Potential, build_potential
from megagnn.optim.config import OptimConfig
from megagnn.optim.optimizer import make_optimizer
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.parameter import (
    Constant,
    Parameter,
    ParameterLayout,
    check_divisible,
    layout_of,
    make_parameter,
    num_parameters,
)
from tests.distributed.whole import gather_whole
from tests.models.physics import STATISTICS, model_config

CONFIGURATIONS = {
    "default": model_config(),
    "direct": model_config(forces="direct"),
    "satorras": model_config(preset="satorras", coordinate_bias=True),
    "unequal": model_config(message_hidden=24, message_width=8, coordinate_hidden=12, node_hidden=20),
}


def build(config: EGNNConfig, tp: int = 1, rank: int = 0, seed: int = 0) -> Potential:
    context = ParallelContext(tp_size=tp, tp_rank=rank)
    return build_potential(config, STATISTICS, seed, torch.float64, context)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_initial_weights_are_slices_of_one_process(name: str, tp: int) -> None:
    """Bit for bit, whatever the global random state, which is left alone."""
    config = CONFIGURATIONS[name]
    alone = dict(build(config).named_parameters())
    torch.manual_seed(tp)
    state = torch.get_rng_state()
    ranks = [dict(build(config, tp, rank).named_parameters()) for rank in range(tp)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(slices.keys() == alone.keys() for slices in ranks)
    for parameter, whole in alone.items():
        layout = layout_of(ranks[0][parameter])
        assert layout.full_shape == whole.shape
        slices = [rank[parameter] for rank in ranks]
        if layout.is_sharded:
            assert layout.dim is not None
            assert torch.equal(torch.cat(slices, layout.dim), whole), parameter
        else:
            assert all(torch.equal(one, whole) for one in slices), parameter
        assert [layout_of(one).index for one in slices] == (
            list(range(tp)) if layout.is_sharded else [0] * tp
        )


def test_seeds_and_names_matter() -> None:
    """Another seed, or another parameter of the same shape, gives other numbers."""
    one, other = (dict(build(CONFIGURATIONS["default"], seed=s).named_parameters()) for s in (0, 1))
    a, b = (f"model.layers.{k}.message.out.weight" for k in (0, 1))
    assert not torch.equal(one[a], other[a])
    assert not torch.equal(one[a], one[b])


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_number_of_parameters_is_that_of_the_whole_model(name: str, tp: int) -> None:
    config = CONFIGURATIONS[name]
    expected = sum(p.numel() for p in build(config).parameters())
    for rank in range(tp):
        potential = build(config, tp, rank)
        assert num_parameters(potential) == potential.model.num_parameters() == expected
    frozen = build(config, tp)
    first = next(iter(frozen.parameters())).requires_grad_(False)
    assert num_parameters(frozen) == expected - layout_of(first).full_numel


@pytest.mark.parametrize("implementation", ["own", "torch"])
def test_each_of_four_ranks_holds_a_quarter(implementation: str) -> None:
    """Of parameters, gradients and moments, within 2 % at width 64: what is not divided is small."""
    config = model_config(width=64)
    alone = sizes(build(config), implementation)
    assert alone["parameters"] > 50_000
    for rank in range(4):
        for name, size in sizes(build(config, 4, rank), implementation).items():
            assert size == pytest.approx(alone[name] / 4, rel=0.02), f"rank {rank}: {name}"


def sizes(potential: Potential, implementation: str) -> dict[str, int]:
    """Elements that a rank holds after a step."""
    optimizer = make_optimizer(potential, OptimConfig(implementation=implementation))  # type: ignore[arg-type]
    for p in potential.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = [t for one in optimizer.state.values() for t in one.values() if isinstance(t, Tensor) and t.ndim]
    return {
        "parameters": sum(p.numel() for p in potential.parameters()),
        "gradients": sum(p.grad.numel() for p in potential.parameters() if p.grad is not None),
        "optimizer state": sum(t.numel() for t in state),
    }


def test_a_copy_keeps_its_layout() -> None:
    potential = build(CONFIGURATIONS["default"], 4, 3)
    next(iter(potential.parameters())).requires_grad_(False)
    copied = copy.deepcopy(potential)
    for (name, one), (other_name, other) in zip(
        potential.named_parameters(), copied.named_parameters(), strict=True
    ):
        assert name == other_name
        assert isinstance(other, Parameter)
        assert layout_of(one) == layout_of(other)
        assert other.initial is one.initial
        assert other.requires_grad == one.requires_grad
        assert torch.equal(one, other)
        assert one.data_ptr() != other.data_ptr()
    assert num_parameters(copied) == num_parameters(potential)


def test_a_shared_parameter_is_copied_once() -> None:
    one = make_parameter((4, 2), 0, ParallelContext(tp_size=2), Constant(1.0), torch.float32)
    pair = copy.deepcopy([one, one])
    assert pair[0] is pair[1]
    assert pair[0] is not one


@pytest.mark.parametrize(
    ("size", "tp", "use"), [(130, 4, "128 or 132"), (3, 4, "4"), (65, 2, "64 or 66"), (1, 2, "2")]
)
def test_what_does_not_divide_is_refused(size: int, tp: int, use: str) -> None:
    text = f"^width {size} is not divisible by tensor_parallel {tp}; use {use}$"
    with pytest.raises(ValueError, match=text):
        check_divisible("width", size, tp)
    with pytest.raises(ValueError, match=text):
        make_parameter((2, size), 1, ParallelContext(tp_size=tp), Constant(0.0), torch.float32, "width")


def test_what_divides_passes() -> None:
    check_divisible("width", 128, 4)
    check_divisible("width", 130, 1)
    context = ParallelContext(tp_size=4)
    assert make_parameter((3, 8), 1, context, Constant(0.0), torch.float32).shape == (3, 2)
    assert make_parameter((3, 8), None, context, Constant(0.0), torch.float32).shape == (3, 8)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"width": 130}, r"width 130 is not divisible by tensor_parallel 4; use 128 or 132"),
        ({"node_hidden": 18}, r"model\.node_hidden 18 is not divisible by tensor_parallel 4; use 16 or 20"),
        ({"coordinate_hidden": 6}, r"model\.coordinate_hidden 6 is not .* use 4 or 8"),
        ({"message_hidden": 10}, r"model\.message_hidden 10 is not .* use 8 or 12"),
    ],
)
def test_a_model_names_the_width_that_does_not_divide(values: dict[str, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build(model_config(**values), 4)


def test_layouts() -> None:
    """A tensor without a layout is whole; slices are those of chunk; one rank's whole needs no message."""
    plain = torch.zeros(2, 3)
    assert layout_of(plain) == ParameterLayout((2, 3))
    whole = torch.arange(12.0).view(2, 6)
    layout = ParameterLayout((2, 6), dim=1, num_slices=3, index=1)
    assert layout.slice_of(whole).tolist() == [[2, 3], [8, 9]]
    assert layout.full_numel == 12
    assert not ParameterLayout((2, 6), dim=1).is_sharded
    assert torch.equal(gather_whole(whole, ParameterLayout((2, 6), dim=1), ParallelContext()), whole)


def test_a_model_can_be_pickled() -> None:
    """Process pools and torch.save do; the initial laws go along."""
    potential = build_potential(model_config(preset="satorras"), STATISTICS)
    again = pickle.loads(pickle.dumps(potential))
    for (name, p), q in zip(potential.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name
    again.model.reset_parameters(seed=0)
    assert all(torch.equal(p, q) for p, q in zip(potential.parameters(), again.parameters(), strict=True))
    assert again.model.element_embedding.weight.sharding == layout_of(
        potential.model.element_embedding.weight
    )
