"""Boxes of runs, and who writes what: every number of the whole exactly once, evenly shared."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagnn.checkpoint.boxes import Box, boxes_of_run, parse_key, parts_by_name, share_of
from megagnn.optim.pieces import Piece
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.parameter import ParameterLayout

SHAPES = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)


@settings(deadline=None, max_examples=200)
@given(SHAPES, st.data())
def test_boxes_of_a_run_are_the_run(shape: tuple[int, ...], data: st.DataObject) -> None:
    """In order, each contiguous: the numbers of all boxes one after the other are those of the run."""
    numel = math.prod(shape)
    begin = data.draw(st.integers(0, numel))
    end = data.draw(st.integers(begin, numel))
    numbers = torch.arange(numel).view(shape)
    found: list[int] = []
    boxes = boxes_of_run(shape, begin, end)
    for box in boxes:
        at = tuple(slice(a, a + n) for a, n in zip(box.offsets, box.sizes, strict=True))
        found += numbers[at].reshape(-1).tolist()
    assert found == list(range(begin, end))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


@settings(deadline=None)
@given(SHAPES, st.text("abc./_[]", min_size=1, max_size=8))
def test_keys_are_read_back(shape: tuple[int, ...], name: str) -> None:
    box = Box(tuple(range(len(shape))), shape)
    assert parse_key(box.key(name)) == (name, box)


def test_other_names_are_no_boxes() -> None:
    with pytest.raises(ValueError, match=r"'weight' is not the name of a box of a tensor"):
        parse_key("weight")


SHARDED = {"rows": ((8, 6), 0), "columns": ((6, 8), 1), "deep": ((3, 4, 5), 1), "bias": ((7,), None)}
SHARDED |= {"matrix": ((5, 9), None), "scalar": ((), None)}


def pieces(dp: int, dp_rank: int, tp: int, tp_rank: int, zero: bool) -> list[Piece]:
    """Each parameter, whole on every data-parallel rank or cut into runs over them at uneven places."""
    result = []
    for number, (name, (shape, dim)) in enumerate(SHARDED.items()):
        layout = ParameterLayout(shape, dim, tp if dim is not None else 1, tp_rank if dim is not None else 0)
        whole = 1000 * number + torch.arange(math.prod(shape), dtype=torch.float64).view(shape)
        own = layout.slice_of(whole).reshape(-1)
        begin, end = 0, own.numel()
        if zero:
            cuts = [min(own.numel(), own.numel() * rank // dp + rank) for rank in range(dp)] + [own.numel()]
            begin, end = cuts[dp_rank], cuts[dp_rank + 1]
        if begin < end:
            result.append(Piece(name, "model", layout, begin, end, own[begin:end].clone(), not zero))
    return result


GRIDS = list(itertools.product((1, 2, 3), (1, 2, 4), (False, True)))


@pytest.mark.parametrize(("dp", "tp", "zero"), GRIDS)
def test_all_ranks_together_write_everything_once(dp: int, tp: int, zero: bool) -> None:
    written = {name: torch.zeros(shape) for name, (shape, _) in SHARDED.items()}
    sizes = []
    for dp_rank, tp_rank in itertools.product(range(dp), range(tp)):
        context = ParallelContext(dp_size=dp, dp_rank=dp_rank, tp_size=tp, tp_rank=tp_rank)
        own = share_of(pieces(dp, dp_rank, tp, tp_rank, zero), context)
        sizes.append(sum(part.box.numel for parts in own.values() for part in parts))
        for name, parts in own.items():
            short, number = name.removeprefix("model/"), list(SHARDED).index(name.removeprefix("model/"))
            shape = SHARDED[short][0]
            whole = 1000 * number + torch.arange(math.prod(shape), dtype=torch.float64).view(shape)
            for part in parts:
                at = tuple(slice(a, a + n) for a, n in zip(part.box.offsets, part.box.sizes, strict=True))
                assert torch.equal(part.values, whole[at]), f"{name} {part.box}"
                assert part.full_shape == shape
                written[short][at] += 1
    for name, count in written.items():
        assert bool((count == 1).all()), name
    if not zero:
        assert max(sizes) - min(sizes) <= 2, "an even share for everyone"


def test_what_a_rank_holds_is_all_of_it() -> None:
    held = pieces(1, 0, 2, 1, zero=False)
    parts = parts_by_name(held)
    assert sum(p.box.numel for found in parts.values() for p in found) == sum(p.end for p in held)
    parts["model/bias"][0].values.fill_(3.0)
    assert bool((next(p for p in held if p.name == "bias").values == 3.0).all()), "views, to be loaded into"


@given(st.lists(st.tuples(*[st.tuples(st.integers(0, 4), st.integers(1, 5))] * 2), max_size=3))
def test_what_two_boxes_share(ranges: list[tuple[tuple[int, int], tuple[int, int]]]) -> None:
    """The numbers of both, in one place in each, or nothing; and boxes that touch share nothing."""
    first, second = (Box(tuple(r[k][0] for r in ranges), tuple(r[k][1] for r in ranges)) for k in (0, 1))
    whole = torch.arange(9 ** len(ranges)).view((9,) * len(ranges))
    a, b = (whole[box.slices_in(Box((0,) * len(ranges), whole.shape))] for box in (first, second))
    common = first.overlap(second)
    shared = set(a.reshape(-1).tolist()) & set(b.reshape(-1).tolist())
    if common is None:
        assert not shared
    else:
        assert common.numel == len(shared)
        assert torch.equal(a[common.slices_in(first)], b[common.slices_in(second)])
        assert set(a[common.slices_in(first)].reshape(-1).tolist()) == shared
