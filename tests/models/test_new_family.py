"""The model family of docs/extending.md, added as it says, has forces, trains, and runs over ranks."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor

from megagnn import overrides
from megagnn.cli import main
from megagnn.models.config import ModelConfig
from megagnn.models.potential import Potential
from megagnn.models.registry import FAMILIES, Family
from megagnn.objective.config import LossConfig
from megagnn.objective.gradient_methods import GRADIENT_METHODS
from megagnn.objective.loss import Loss, label_counts
from megagnn.parallel.context import ParallelContext
from tests import runs
from tests.distributed.parity import batch_of, whole_gradients
from tests.distributed.spawn import spawn
from tests.models.physics import PhysicsTests, model_config, randomised
from tests.tolerances import PARITY

DOCUMENT = Path(__file__).parents[2] / "docs" / "extending.md"
MODULE = "megagnn.models.schnet.model"


def example() -> tuple[str, str, str]:
    """Configuration, model and the line of the registry."""
    section = DOCUMENT.read_text().split("\n## A model family\n")[1].split("\n## ")[0]
    config, model = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (line,) = re.findall(r'^    ("schnet": .*),$', section, re.MULTILINE)
    return config, model, line


def add_family() -> None:
    """The two modules, and the entry of the registry."""
    config, model, line = example()
    names: dict[str, Any] = {"Family": Family}
    exec(config, names)
    exec(model, sys.modules.setdefault(MODULE, ModuleType(MODULE)).__dict__)
    FAMILIES.update(eval(f"{{{line}}}", names))
    ModelConfig.variants["schnet"] = names["SchNetConfig"]


@pytest.fixture(autouse=True)
def family(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    monkeypatch.setitem(FAMILIES, "schnet", None)
    monkeypatch.setitem(ModelConfig.variants, "schnet", None)
    add_family()
    overrides.changes.cache_clear()
    yield
    overrides.changes.cache_clear()


def test_the_registry_can_import_the_configuration() -> None:
    """Before there are models, which import the registry."""
    lines = [line for line in example()[0].splitlines() if "megagnn" in line]
    assert {line.split()[1] for line in lines} == {"megagnn.models.config", "megagnn.overrides"}


def test_forces_of_its_own_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'model.forces': .*'conservative' or 'none', got 'direct'"):
        model_config(family="schnet", forces="direct")


class TestPhysics(PhysicsTests):
    def make_potential(self) -> Potential:
        return randomised(model_config(family="schnet", stress=True, spread=0.7))


def gradients(context: ParallelContext, method: str) -> dict[str, Tensor]:
    """Whole gradients of a loss on energies, forces and stress."""
    add_family()
    config = model_config(family="schnet", stress=True, width=8, cutoff=3.0, num_layers=2)
    potential, batch = randomised(config, context=context), batch_of(range(6))
    loss = Loss(LossConfig(energy="mse", forces="mse", stress="mse", stress_weight=0.1))
    GRADIENT_METHODS[method](potential, batch, loss, label_counts(batch, context))
    return whole_gradients(potential, context)


def test_one_backward_on_two_ranks_equals_derivatives_of_derivatives_on_one() -> None:
    expected = gradients(ParallelContext(), "create_graph")
    for got in spawn(2, gradients, "one_backward", tp=2):
        assert got.keys() == expected.keys()
        for name, whole in expected.items():
            assert (got[name] - whole).abs().max() <= PARITY * whole.abs().max(), name


def test_it_trains_goes_on_and_evaluates(
    tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments: Any = ("--model.family", "schnet", "--train.num_steps", "6", "--parallel.zero_stage", "3")
    assert runs.train(store, tmp_path / "run", *arguments) == 0
    assert runs.train(store, tmp_path / "run", *arguments, "--train.num_steps", "8", "--resume") == 0
    assert runs.train(store, tmp_path / "run", *arguments, "--model.spread", "0.7", "--resume") == 2
    assert "model.spread was 0.5 and is now 0.7" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "run/checkpoints/best"), str(store)]) == 0
