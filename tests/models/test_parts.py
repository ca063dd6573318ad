"""Maximal update: the table of variances and rates, and that activations move alike at every width."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ase.build import molecule

from megagnn.cli import main
from megagnn.config import RunConfig, config_from_dict
from megagnn.data import keys
from megagnn.data.batch import batch_from_atoms
from megagnn.models.potential import build_potential
from megagnn.optim.config import OptimConfig
from megagnn.optim.optimizer import make_sharded_optimizer, parameter_groups, set_learning_rate
from megagnn.optim.rules import RULES
from megagnn.parallel.config import ParallelConfig
from megagnn.parallel.context import ParallelContext
from megagnn.scaling import coordinates
from tests import runs
from tests.models.physics import STATISTICS, model_config, rattled

BASE = {"width": 16, "base_width": 16, "base_layers": 4, "num_layers": 4}
PRESETS = ("default", "study")
# Weights of Linears by the end of their names; the rest of the matrices are of kind "input".
OUTPUTS = ("vector.out.weight", "energy_head.out.weight")
HIDDEN = (
    "from_destination.weight",
    "from_source.weight",
    "message.out.weight",
    "vector.hidden.weight",
    "from_node.weight",
    "from_messages.weight",
    "node_update.out.weight",
    "energy_head.hidden.weight",
)
INPUTS = ("embedding.weight", "from_distance.weight")


def kind_of(name: str) -> str:
    if name.endswith((".bias", ".gain_F")):
        return "input"
    for kind, names in (("output", OUTPUTS), ("hidden", HIDDEN), ("input", INPUTS)):
        if name.endswith(names):
            return kind
    raise AssertionError(f"which kind is {name}?")


@pytest.mark.parametrize("preset", PRESETS)
def test_at_the_base_it_is_the_standard_one(preset: str) -> None:
    found = build_potential(model_config(preset=preset, parametrisation="mup", **BASE), STATISTICS)
    want = build_potential(model_config(preset=preset, **BASE), STATISTICS)
    for (name, p), q in zip(found.named_parameters(), want.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert p.rate == q.rate == 1.0, name  # type: ignore[attr-defined]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("forces", ["direct", "conservative"])
def test_table(preset: str, forces: str) -> None:
    """Four times the base's width and layers: rates and weights beside those of the standard one."""
    sizes = {**BASE, "width": 64, "num_layers": 16}
    config = model_config(preset=preset, forces=forces, **sizes)
    standard = build_potential(config, STATISTICS)
    found = build_potential(replace(config, parametrisation="mup"), STATISTICS)
    for (name, p), q in zip(found.named_parameters(), standard.parameters(), strict=True):
        kind, in_layer = kind_of(name), ".layers." in name and ".vector." not in name
        rate = (1.0 if kind == "input" else 0.25) * (0.5 if in_layer and config.depth_scaling else 1.0)
        assert p.rate == pytest.approx(rate, rel=1e-12), name  # type: ignore[attr-defined]
        is_matrix = kind == "hidden" and not name.endswith(".bias")
        want = pytest.approx(2 * rate, rel=1e-12) if is_matrix else None  # 4^(-1/2) in place of 1/4
        assert p.matrix_rate == want, name  # type: ignore[attr-defined]
        torch.testing.assert_close(p, q * (0.5 if kind == "output" else 1.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_rates_reach_the_optimizer(rule: str) -> None:
    """Every parameter is in one group; the group has its share of the rate and as much decay per step."""
    config = model_config(parametrisation="mup", width=64, num_layers=16, base_width=16, base_layers=4)
    model = build_potential(config, STATISTICS)
    settings = OptimConfig(rule=rule, weight_decay=0.1)
    optimizer = make_sharded_optimizer(model.model, settings, ParallelConfig(), ParallelContext())
    set_learning_rate(optimizer, 1e-2)
    seen = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in seen} == {id(p) for p in model.parameters()}
    assert len(seen) == len({id(p) for p in seen})
    for group in optimizer.param_groups:
        for p in group["params"]:
            is_matrix = rule != "adamw" and p.matrix_rate is not None
            assert group["lr"] == pytest.approx(1e-2 * (p.matrix_rate if is_matrix else p.rate))
            assert group["lr"] * group["weight_decay"] == pytest.approx(1e-3 if p.ndim > 1 else 0.0)


def test_standard_groups_are_as_ever() -> None:
    """Checkpoints of other versions number parameters by group."""
    model = build_potential(model_config(), STATISTICS)
    groups = parameter_groups(model, OptimConfig(weight_decay=0.1))
    assert [(g["weight_decay"], g["rate"]) for g in groups] == [(0.1, 1.0), (0.0, 1.0)]


def run_config(rule: str = "adamw", freeze: tuple[str, ...] = (), **values: object) -> RunConfig:
    return config_from_dict(
        {
            "model": {"num_layers": 2, "cutoff": 4.0, "num_radial": 8, "base_width": 16, **values},
            "loss": {"energy": "huber", "forces": "huber"},
            "optim": {"learning_rate": 1e-2 if rule == "adamw" else 2e-3, "rule": rule, "freeze": freeze},
        }
    )


@pytest.mark.parametrize("forces", ["direct", "conservative"])
def test_activations_move_alike_at_every_width(forces: str) -> None:
    """Slopes of log change in log width over 16 times in width: near zero, and not so in the standard one."""
    sizes = [s for kind in coordinates.PARAMETRISATIONS for s in moved(kind, forces, (16, 64, 256))]
    found = coordinates.slopes(sizes)
    print("\n".join(coordinates.describe(found)))
    assert {"layer 1", "layer 2", "energy", "forces"} == set(found["mup"])
    for quantity, slope in found["mup"].items():
        assert abs(slope) < 0.2, f"{quantity}: {slope:.2f}"
    assert found["standard"]["layer 2"] > 0.4


@pytest.mark.parametrize(
    ("rule", "family", "along", "ends"),
    [
        ("muon", "egnn", "width", (16, 256)),
        ("muon", "egnn", "num_layers", (1, 16)),
        ("soap", "egnn", "width", (16, 256)),
        ("soap", "egnn", "num_layers", (1, 16)),
        ("muon", "cartesian", "width", (16, 256)),
        ("muon", "cartesian", "num_layers", (2, 16)),  # its first layer has no products of vectors
        ("soap", "painn", "width", (16, 256)),
    ],
)
def test_matrices_move_features_alike(
    rule: str, family: str, along: coordinates.Along, ends: tuple[int, int]
) -> None:
    """All other parameters are at rest, so that the law of the matrices is seen alone."""
    kinds = coordinates.PARAMETRISATIONS
    sizes = [s for kind in kinds for s in moved(kind, "direct", ends, family, rule, along)]
    found = coordinates.slopes(coordinates.last_layers(sizes), along)
    print("\n".join(coordinates.describe(found, along)))
    assert abs(found["mup"]["last layer"]) < 0.2
    assert found["standard"]["last layer"] > 0.3


def moved(
    parametrisation: str,
    forces: str,
    values: tuple[int, ...],
    family: str = "egnn",
    rule: str = "adamw",
    along: coordinates.Along = "width",
) -> list[coordinates.Size]:
    """Sizes by width or by layers; under a rule of matrices with all but the matrices frozen."""
    atoms = [rattled(molecule(name), seed=k) for k, name in enumerate(("H2O", "CH4", "CH3OH", "CH3CH2OH"))]
    batch = batch_from_atoms(atoms, 4.0, torch.float32)
    torch.manual_seed(0)
    reference_B = build_potential(run_config().model, STATISTICS).model.reference_energy(batch)
    batch |= {
        keys.ENERGY: reference_B + torch.randn(len(atoms)) * batch[keys.NUM_ATOMS],
        keys.FORCES: torch.randn(len(batch[keys.POSITIONS]), 3),
        keys.HAS_ENERGY: torch.ones(len(atoms), dtype=torch.bool),
        keys.HAS_FORCES: torch.ones(len(atoms), dtype=torch.bool),
    }
    sizes = []
    shape = {"family": family, "parametrisation": parametrisation, "forces": forces, "base_layers": 1}
    for value in values:
        config = run_config(**{"width": 32, **shape, along: value})
        if rule != "adamw":
            named = build_potential(config.model, STATISTICS).model.named_parameters()
            rest = tuple(name for name, p in named if p.matrix_rate is None)  # type: ignore[attr-defined]
            config = run_config(rule, rest, **{"width": 32, **shape, along: value})
        num_steps, num_seeds = (5, 2) if rule == "adamw" else (3, 1)
        for seed in range(num_seeds):
            sizes += coordinates.follow(config, batch, STATISTICS, num_steps, seed)
    return sizes


def test_figure(tmp_path: Path) -> None:
    sizes = moved("mup", "direct", (8, 16))
    drawn = coordinates.draw(sizes)
    assert drawn.figure is not None
    assert len(drawn.figure.axes) == 4
    assert len(sizes) == 2 * 2 * 6 * 4
    for path in coordinates.save_figures([drawn], tmp_path):
        assert path.stat().st_size > 1000


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs.write_data(tmp_path / "store")
    config = runs.CONFIG.replace("[data]", f'[data]\npaths = ["{tmp_path / "store"}"]')
    (tmp_path / "config.toml").write_text(config)
    command = ["coordinate-check", str(tmp_path / "config.toml"), "--out", str(tmp_path / "out")]
    few = ("--widths", "8", "16", "--depths", "1", "2", "--steps", "1", "--seeds", "1")
    assert main([*command, *few, "--optim.rule", "muon"]) == 0
    shown = capsys.readouterr().out
    assert "Slope of log change in log width" in shown
    assert "Slope of log change in log layers" in shown
    found = json.loads((tmp_path / "out" / "coordinates.json").read_text())
    assert {along: set(of) for along, of in found["slopes"].items()} == {
        "width": {"standard", "mup"},
        "num_layers": {"standard", "mup"},
    }
    assert len(found["sizes"]["width"]) == 2 * 2 * 2 * 4
    assert {(s["num_layers"], s["quantity"]) for s in found["sizes"]["num_layers"]} == {
        (n, quantity) for n in (1, 2) for quantity in ("last layer", "energy", "forces")
    }
    for name in ("coordinates.png", "coordinates-depth.png"):
        assert (tmp_path / "out" / name).stat().st_size > 1000
    for name, few in (("widths", ["--widths", "8"]), ("depths", ["--depths", "0", "2"])):
        assert main([*command, *few]) == 2
        assert f"--{name} must be two or more different {name}, got [" in capsys.readouterr().err
