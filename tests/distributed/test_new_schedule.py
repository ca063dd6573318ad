"""The schedule of docs/extending.md: one file, by which everything finds it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megagnn.config import config_from_dict
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.parameter import layout_of
from megagnn.pipeline_parallel import registry, schedules
from megagnn.pipeline_parallel.pipeline import schedule_for
from megagnn.pipeline_parallel.simulate import simulate
from megagnn.pipeline_parallel.validate import ScheduleError
from megagnn.train.trainer import Trainer
from tests.distributed.spawn import spawn
from tests.distributed.test_pipeline_training import TOLERANCE, configuration
from tests.distributed.whole import gather_whole
from tests.runs import write_data

pytestmark = pytest.mark.timeout(1200)

NAME = "gpipe-fifo"
DOCUMENT = Path(__file__).parents[2] / "docs" / "extending.md"


def example() -> str:
    """The file that the section shows."""
    section = DOCUMENT.read_text().split("\n## A schedule\n")[1].split("\n## ")[0]
    (found,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return str(found)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder beside the package's own in which the registry looks, too; forgotten afterwards."""
    path, known, modules = tmp_path / "schedules", dict(registry._entries), set(sys.modules)
    path.mkdir()
    monkeypatch.setattr(schedules, "__path__", [*schedules.__path__, str(path)])
    yield path
    for name in set(registry._entries) - set(known):
        del registry._entries[name]
    for name in set(sys.modules) - modules:
        if name.startswith(schedules.__name__):
            del sys.modules[name]


def test_it_is_found_proved_and_simulated(folder: Path) -> None:
    values = {"parallel": {"pipeline": 2, "schedule": NAME}, "model": {"forces": "direct"}}
    with pytest.raises(ValueError, match=f"called '{NAME}' .*did you mean 'gpipe'"):
        config_from_dict(values)
    (folder / "gpipe_fifo.py").write_text(example())
    assert config_from_dict(values).schedule == NAME
    with pytest.raises(ValueError, match=f"'{NAME}' is not for model.forces = 'conservative'"):
        config_from_dict({**values, "model": {"forces": "conservative"}})
    schedule = schedule_for(NAME, "direct", 2, 4)
    assert simulate(schedule).bubble == pytest.approx(1 / 5)


def test_what_breaks_a_rule_is_refused(folder: Path) -> None:
    """Backwards before forwards; a number of micro-batches that it says not to take; a name that is taken."""
    wrong = example().replace('("F", "B")', '("B", "F")').replace(NAME, "backwards")
    (folder / "backwards.py").write_text(wrong)
    with pytest.raises(ScheduleError, match="order: needs 0F0"):
        schedule_for("backwards", "direct", 2, 4)
    even = example().replace(NAME, "even").replace('"even")', '"even", fewest=lambda p, m: m + m % 2)', 1)
    (folder / "even.py").write_text(even)
    assert schedule_for("even", "direct", 2, 4).num_micro_batches == 4
    with pytest.raises(ValueError, match=r"'even' over 2 pipeline ranks does not take 3 .*; use 4"):
        schedule_for("even", "direct", 2, 3)
    (folder / "twice.py").write_text(example().replace(NAME, "1f1b"))
    with pytest.raises(ValueError, match=r"schedules.twice and .* both name a schedule '1f1b'; rename one"):
        registry.registered()


def trained(context: ParallelContext, folder: Path, store: Path, out_dir: Path) -> dict[str, Tensor]:
    """Final weights of this rank's part."""
    more = {}
    if context.pp_size > 1:
        schedules.__path__.append(str(folder))
        more = {"parallel.schedule": NAME, "parallel.zero_stage": "0"}
    trainer = Trainer(configuration(context, store, out_dir, 2, 2, more), context)
    if context.pp_size > 1:
        assert trainer.pipeline is not None
        assert trainer.pipeline.schedule.name == NAME
    trainer.run()
    named = trainer.potential.named_parameters()
    return {n: gather_whole(p, layout_of(p), context).clone() for n, p in named}


def test_a_run_with_it_is_the_run_of_one_process(folder: Path, tmp_path: Path) -> None:
    (folder / "gpipe_fifo.py").write_text(example())
    store = write_data(tmp_path / "store")
    whole = trained(ParallelContext(), folder, store, tmp_path / "one")
    parts = spawn(2, trained, folder, store, tmp_path / "two", pp=2)
    weights = parts[0] | parts[1]
    assert weights.keys() == whole.keys()
    for name, weight in whole.items():
        torch.testing.assert_close(weights[name], weight, atol=TOLERANCE, rtol=TOLERANCE)
