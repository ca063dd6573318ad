"""The 14 paths are e3nn's tensor product: messages, and gradients in weights, features and directions.

Always against its results kept in e3nn.npz (tools/cartesian_reference.py), and against itself where it is
installed (the extra `peers`).
"""

from importlib.util import find_spec
from pathlib import Path

import cartesian_reference
import numpy as np
import pytest
import torch
from torch import Tensor

from megagnn.models.cartesian.messages import COMPONENTS, PATHS, Edges, direction_matrices, messages
from megagnn.ops import Segments

TOLERANCE = 1e-12


def kept() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs, and results."""
    with np.load(Path(__file__).parent / "e3nn.npz") as arrays:
        found = {name: torch.from_numpy(arrays[name]) for name in arrays}
    results = {name: x for name, x in found.items() if name.startswith(("message", "gradient"))}
    return {name: x for name, x in found.items() if name not in results}, results


def errors(
    given: dict[str, Tensor], expected: dict[str, Tensor], order: tuple[int, ...] = tuple(PATHS)
) -> dict[str, float]:
    """max|x - x_ref| / max|x_ref| of this project's messages and gradients. order: of the weights."""
    given = {name: x.clone().requires_grad_(not name.startswith("bar")) for name, x in given.items()}
    unit_EC = given["r"] / given["r"].norm(dim=-1, keepdim=True)
    nowhere = Segments(torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    edges = Edges(nowhere, nowhere, None, unit_EC.unsqueeze(-1), *direction_matrices(unit_EC))
    weights = dict(zip(order, given["w"].unbind(0), strict=True))
    found = messages(PATHS, weights, {name: given[name] for name in COMPONENTS}, edges)
    got = cartesian_reference.gradients(found, given)
    assert got.keys() == expected.keys()
    return {n: ((x - expected[n]).abs().max() / expected[n].abs().max()).item() for n, x in got.items()}


def test_equals_what_e3nn_gave() -> None:
    found = errors(*kept())
    assert len(found) == 3 + 5
    assert max(found.values()) <= TOLERANCE, found


@pytest.mark.skipif(not find_spec("e3nn"), reason="e3nn is not installed: only its kept results")
def test_equals_e3nn() -> None:
    given = kept()[0]
    found = errors(given, cartesian_reference.e3nn_result(given))
    assert max(found.values()) <= TOLERANCE, found


@pytest.mark.parametrize("number", list(PATHS)[1:])
def test_another_order_of_paths_is_far_outside_the_tolerance(number: int) -> None:
    """Exchanging the weights of any path with those of the one before changes messages or gradients."""
    order = [*PATHS]
    order[number - 1], order[number - 2] = order[number - 2], order[number - 1]
    assert max(errors(*kept(), tuple(order)).values()) > 1e-2
