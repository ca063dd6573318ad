"""Steps of many structures at once: cut from an order and dealt to batches, all steps of a window together.

The rule is that of `BudgetSampler`, the longest run that fits and the costliest structure first to the batch
that has least, with one difference that lets all steps be dealt at the same time: a step is cut by a share of
the budget of all its batches (`fill`) where the rule for few structures tries again and again. Where a step
finds no room even so, it becomes two.
"""

from typing import NamedTuple

import numpy as np

from megagnn.data.arrays import Bools, Ints

FILLS = (0.99, 0.98, 0.97, 0.95, 0.92, 0.88, 0.8, 0.65, 0.5)


class Budget(NamedTuple):
    """Limits of one batch."""

    atoms: int
    edges: int
    structures: int


class Sizes(NamedTuple):
    """Structures in their order: room that each takes, (K,) each, and what it costs."""

    atoms: Ints
    edges: Ints
    cost: Ints


class Dealt(NamedTuple):
    """Batches of steps: those of a step one after another, `num` of each."""

    places: Ints
    """(K,) in the order, batch by batch; rising within a batch."""
    bounds: Ints
    """(steps * num + 1,) where each batch begins in `places`."""


def cut(sizes: Sizes, budget: Budget, num: int, fill: float) -> Ints:
    """(steps + 1,) where steps begin: the longest runs within a share of the budgets of `num` batches."""
    count = len(sizes.atoms)
    ends = np.minimum(np.arange(count) + budget.structures * num, count)
    for size, limit in ((sizes.atoms, budget.atoms), (sizes.edges, budget.edges)):
        total = np.cumsum(size)
        room = total - size + (limit * num if num == 1 else int(limit * num * fill))
        ends = np.minimum(ends, np.searchsorted(total, room, side="right"))
    following, starts, at = np.maximum(ends, np.arange(count) + 1).tolist(), [0], 0
    while at < count:
        at = following[at]
        starts.append(at)
    return np.array(starts, dtype=np.int64)


def best_fill(sizes: Sizes, budget: Budget, num: int) -> float:
    """The share of the budget that makes the fewest steps of these structures."""
    if num == 1 or not len(sizes.atoms):
        return 1.0
    return min(FILLS, key=lambda fill: len(deal(sizes, cut(sizes, budget, num, fill), budget, num).bounds))


def deal(sizes: Sizes, starts: Ints, budget: Budget, num: int) -> Dealt:
    """Every step's structures to `num` batches, in as many more steps as they need for room.

    starts: (steps + 1,) of the steps, rising from 0 to K.
    """
    slots = np.zeros(len(sizes.atoms), dtype=np.int64)
    begins, ends = starts[:-1], starts[1:]
    found = []
    while len(begins):
        fits = (
            np.ones(len(begins), dtype=np.bool_)
            if num == 1
            else _deal(sizes, begins, ends, budget, slots, num)
        )
        found.append(begins[fits])
        begins, ends = begins[~fits], ends[~fits]
        middle = (begins + ends) // 2
        begins, ends = np.concatenate([begins, middle]), np.concatenate([middle, ends])
    steps = np.append(np.sort(np.concatenate([*found, starts[:0]])), len(slots))
    step = np.repeat(np.arange(len(steps) - 1), np.diff(steps))
    batch = step * num + slots
    bounds = np.zeros((len(steps) - 1) * num + 1, dtype=np.int64)
    np.cumsum(np.bincount(batch, minlength=len(bounds) - 1), out=bounds[1:])
    places = np.arange(len(slots)) if num == 1 else _sorted_places(batch)
    return Dealt(places, bounds)


def _sorted_places(key: Ints) -> Ints:
    """Stable order of keys from 0: one sort of numbers that hold the place, too, is the fastest there is."""
    bits = len(key).bit_length()
    if len(key) and int(key.max()).bit_length() + bits > 62:
        return np.argsort(key, kind="stable")
    return np.sort(key << bits | np.arange(len(key))) & ((1 << bits) - 1)


def _deal(sizes: Sizes, begins: Ints, ends: Ints, budget: Budget, slots: Ints, num: int) -> Bools:
    """Whether each step finds room; its structures' batches to `slots`.

    The n-th costliest structures of all steps are placed together, steps with more of them first.
    """
    lengths = ends - begins
    many = np.argsort(-lengths, kind="stable")
    lengths, begins = lengths[many], begins[many]
    place = np.arange(lengths.sum()) + np.repeat(begins - np.cumsum(lengths) + lengths, lengths)
    step = np.repeat(np.arange(len(lengths)), lengths)
    cost = sizes.cost[place]
    place = place[_sorted_places(step * (int(cost.max(initial=0)) + 1) + (cost.max(initial=0) - cost))]
    offsets = np.cumsum(lengths) - lengths
    # steps that have an n-th structure: a prefix
    active = len(lengths) - np.searchsorted(lengths[::-1], np.arange(lengths.max(initial=0)), side="right")
    load = np.zeros((len(lengths), num), dtype=np.int64)
    room = np.empty((3, len(lengths) * num), dtype=np.int64)
    room[0], room[1], room[2] = budget
    fits = np.ones(len(lengths), dtype=np.bool_)
    first = np.arange(len(lengths)) * num
    for n, size in enumerate(active.tolist()):
        structure = place[offsets[:size] + n]
        need = np.stack([sizes.atoms[structure], sizes.edges[structure], np.ones_like(structure)])
        slot = first[:size] + load[:size].argmin(1)
        full = np.flatnonzero((room[:, slot] < need).any(0))
        if len(full):
            free = np.all(room.reshape(3, -1, num)[:, full] >= need[:, full, None], axis=0)
            slot[full] = first[full] + np.where(free, load[full], np.iinfo(np.int64).max).argmin(1)
            fits[full] &= np.any(free, axis=1)
        room[:, slot] -= need
        load.reshape(-1)[slot] += sizes.cost[structure]
        slots[structure] = slot - first[:size]
    back = np.empty_like(fits)
    back[many] = fits
    return back
