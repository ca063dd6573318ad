"""Maximal update in the Cartesian family: variances and rates by kind of weight; activations."""

from dataclasses import replace

import pytest
import torch

from megagnn.models.potential import build_potential
from megagnn.scaling import coordinates
from tests.models.physics import STATISTICS, model_config
from tests.models.test_parts import moved

BASE = {"family": "cartesian", "width": 16, "base_width": 16, "base_layers": 4, "num_layers": 4}
OUTPUTS = ("force_head.weight", "energy_head.out.weight")
HIDDEN = (".up.", ".residual.", ".gates.", ".down.", "energy_head.hidden.weight")
INPUTS = (".bias", "gain_F", ".gains.", ".gate_slopes.", ".path_weights.", "embedding.weight")


def kind_of(name: str) -> str:
    for kind, parts in (("output", OUTPUTS), ("input", INPUTS), ("hidden", HIDDEN)):
        if any(part in name for part in parts):
            return kind
    raise AssertionError(f"which kind is {name}?")


@pytest.mark.parametrize("forces", ["direct", "conservative"])
@pytest.mark.parametrize("scale", [1, 4])
def test_table(forces: str, scale: int) -> None:
    """Rates and weights beside those of the standard parametrisation: at the base, and at four times it."""
    sizes = {**BASE, "width": 16 * scale, "num_layers": 4 * scale}
    config = model_config(forces=forces, **sizes)
    standard = build_potential(config, STATISTICS)
    found = build_potential(replace(config, parametrisation="mup"), STATISTICS)
    kinds = set()
    for (name, p), q in zip(found.named_parameters(), standard.parameters(), strict=True):
        kind, in_layer = kind_of(name), ".layers." in name and "force_head" not in name
        kinds.add(kind)
        rate = (1.0 if kind == "input" else 1 / scale) * (scale**-0.5 if in_layer else 1.0)
        assert p.rate == pytest.approx(rate, rel=1e-12), name  # type: ignore[attr-defined]
        is_matrix = kind == "hidden" and not name.endswith(".bias")
        want = pytest.approx(scale**0.5 * rate, rel=1e-12) if is_matrix else None
        assert p.matrix_rate == want, name  # type: ignore[attr-defined]
        torch.testing.assert_close(p, q * (scale**-0.5 if kind == "output" else 1.0), rtol=1e-6, atol=0)
    assert kinds == {"input", "hidden", "output"}


@pytest.mark.parametrize("forces", ["direct", "conservative"])
def test_activations_move_alike_at_every_width(forces: str) -> None:
    """Slopes of log change in log width: near zero, and not so in the standard one."""
    sizes = [
        s for kind in coordinates.PARAMETRISATIONS for s in moved(kind, forces, (16, 64, 256), "cartesian")
    ]
    found = coordinates.slopes(sizes)
    print("\n".join(coordinates.describe(found)))
    for quantity, slope in found["mup"].items():
        assert abs(slope) < 0.2, f"{quantity}: {slope:.2f}"
    assert found["standard"]["layer 2"] > 0.4
