"""Batches in one piece."""

import pickle

import numpy as np
import pytest
import torch

from megagnn.data import keys
from megagnn.data.batch import build_graph, collate
from megagnn.data.parcel import Parcel, Slots


def batch(first: float = 3.0) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(0)
    graphs = [
        build_graph(
            np.full(n, 6), rng.random((n, 3)) * 3, np.diag([first, 9.0, 3.0]), np.array([True] * 3), 4.0
        )
        for n in (3, 1, 5)
    ]
    return collate(graphs)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("empty", [False, True])
def test_it_arrives_as_it_was(narrow: bool, empty: bool) -> None:
    given = collate([]) if empty else batch()
    parcel = pickle.loads(pickle.dumps(Parcel.of(given, narrow)))
    found = parcel.batch()
    assert found.keys() == given.keys()
    for key, value in given.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value), key
        assert found[key].is_contiguous()
        assert parcel.memory is not None
        assert narrow or found[key].data_ptr() % 64 == parcel.memory.data_ptr() % 64
    assert empty or len(given[keys.CELL_SHIFTS]) > 100


def test_narrow_is_15_bytes_an_edge_of_36() -> None:
    given = batch()
    edges = given[keys.EDGE_INDEX].shape[1]
    whole, narrow = (Parcel.of(given, narrow).memory for narrow in (False, True))
    assert whole is not None
    assert narrow is not None
    saved = len(whole) - len(narrow)
    assert abs(saved - 21 * edges) <= 3 * 64


def test_shifts_that_no_byte_holds_stay_as_they_are() -> None:
    given = batch(first=0.03)
    assert given[keys.CELL_SHIFTS].abs().max() > 127
    found = Parcel.of(given, narrow=True).batch()
    assert torch.equal(found[keys.CELL_SHIFTS], given[keys.CELL_SHIFTS])


@pytest.mark.parametrize("num_bytes", [10**6, 100])
def test_slots_are_free_once_a_parcel_arrived(num_bytes: int) -> None:
    """In memory of its own where a slot is too small."""
    given, slots = batch(), Slots(2, num_bytes)
    sent = [pickle.loads(pickle.dumps(slots.send(given, number))) for number in (6, 7)]
    assert [parcel.memory is None for parcel in sent] == [num_bytes > 100] * 2
    assert [parcel.slot for parcel in sent] == [0, 1]
    arrived = [slots.receive(parcel).batch() for parcel in sent]
    slots.memory.zero_()
    for found in arrived:
        assert all(torch.equal(found[key], value) for key, value in given.items())
