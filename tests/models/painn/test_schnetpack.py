"""PaiNN equals that of the package schnetpack: energies, forces and every gradient of a loss on both.

Always against its results kept in schnetpack.npz (tools/painn_reference.py), and against itself where it is
installed (the extra `peers`).
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import painn_reference
import pytest
import torch
from torch import Tensor

from megagnn.data import keys
from megagnn.models.potential import build_potential

TOLERANCE = 1e-10


def kept(basis: str) -> dict[str, Tensor]:
    with np.load(Path(__file__).parent / "schnetpack.npz") as arrays:
        names = [name for name in arrays if name.startswith(f"{basis} ")]
        return {name.removeprefix(f"{basis} "): torch.from_numpy(arrays[name]) for name in names}


def errors(basis: str, expected: dict[str, Tensor], **changes: object) -> dict[str, float]:
    """max|x - x_ref| / max|x_ref| of this project's model with schnetpack's weights."""
    config = painn_reference.config(basis)
    for name, value in changes.items():
        object.__setattr__(config, name, value)
    potential = build_potential(config, painn_reference.STATISTICS, precision=torch.float64)
    weights = {n.removeprefix("weight "): w for n, w in expected.items() if n.startswith("weight ")}
    potential.model.load_state_dict(weights)
    outputs = potential(painn_reference.batch(), create_graph=True)
    painn_reference.loss(outputs[keys.ENERGY], outputs[keys.FORCES]).backward()
    got = {key: outputs[key].detach() for key in (keys.ENERGY, keys.FORCES)}
    got |= {f"gradient {n}": p.grad for n, p in potential.model.named_parameters() if p.grad is not None}
    assert got.keys() | {f"weight {n}" for n in weights} == expected.keys()
    return {n: ((x - expected[n]).abs().max() / expected[n].abs().max()).item() for n, x in got.items()}


@pytest.mark.parametrize("basis", painn_reference.BASES)
def test_equals_what_schnetpack_gave(basis: str) -> None:
    found = errors(basis, kept(basis))
    assert max(found.values()) <= TOLERANCE, found


@pytest.mark.skipif(not find_spec("schnetpack"), reason="schnetpack is not installed: only its kept results")
@pytest.mark.parametrize("basis", painn_reference.BASES)
def test_equals_schnetpack(basis: str) -> None:
    found = errors(basis, painn_reference.schnetpack_result(basis))
    assert max(found.values()) <= TOLERANCE, found


@pytest.mark.parametrize(
    ("name", "value"),
    [("norm_epsilon", 2e-8), ("envelope", "polynomial"), ("distance_epsilon", 1e-3), ("depth_scaling", True)],
)
def test_another_definition_is_far_outside_the_tolerance(name: str, value: object) -> None:
    found = errors("bessel", kept("bessel"), **{name: value})
    assert max(found.values()) > 100 * TOLERANCE
