import dataclasses
import json
import multiprocessing
from pathlib import Path

import pytest

from megagnn.scaling.laws.record import describe_loss, squared
from megagnn.scaling.records import append_line, parse_record, read_records
from tests.scaling.synthetic import study, write

RECORD = study(widths=(16,), data=(500,), seeds=1)[0]


def test_a_line_and_back() -> None:
    full = dataclasses.replace(RECORD, memory_gib=0.5, technique="fused", versions={"megagnn": "0.1.0"})
    for record in (RECORD, full, dataclasses.replace(RECORD, seconds=None)):
        assert parse_record(record.to_json(), "here") == record


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flops": None}, r"runs, line 1: field 'flops': Input should be a valid number, got None"),
        ({"width": 1.5}, r"field 'width': Input should be a valid integer.*, got 1.5"),
        ({"parameters": 0}, r"field 'parameters': Input should be greater than 0, got 0"),
        ({"widht": 3}, r"field 'widht': Unexpected keyword argument; a run has run, recipe, width"),
        ({"losses": {}}, r"field 'losses': Dictionary should have at least 1 item"),
        ({"losses": {"force_mae": 0.1}}, r"field 'losses.force_mae': Input should be"),
        (
            {"losses": {"force_mae": {"value": float("nan"), "unit": "eV/Å"}}},
            r"field 'losses.force_mae.value': Input should be a finite number, got nan",
        ),
        ({"data": {"structures": 5}}, r"field 'atoms': Field required"),
        ({"data": 5}, r"field 'structures': Field required.*in `data`"),
    ],
)
def test_what_is_wrong_with_a_line(change: dict[str, object], message: str) -> None:
    values = {**json.loads(RECORD.to_json()), **change}
    with pytest.raises(ValueError, match=message):
        parse_record(json.dumps(values), "runs, line 1")


def test_a_missing_field_and_no_json() -> None:
    values = json.loads(RECORD.to_json())
    del values["seed"]
    with pytest.raises(ValueError, match=r"line 1: field 'seed': Field required; a run has"):
        parse_record(json.dumps(values), "line 1")
    for text in ("{", "[1]"):
        with pytest.raises(ValueError, match="line 1: not a JSON object"):
            parse_record(text, "line 1")


def test_files(tmp_path: Path) -> None:
    path = write(tmp_path / "runs.jsonl", study(widths=(16, 32), data=(500,), seeds=1))
    assert [r.width for r in read_records([path])] == [16, 32]
    told = r"runs\.jsonl, line 1: the run 'w16-l3-n500-s0' of the recipe 'synthetic' is there already"
    with pytest.raises(ValueError, match=told):
        read_records([path, path])
    other = [dataclasses.replace(r, recipe="other") for r in read_records([path])]
    both = read_records([path, write(tmp_path / "others.jsonl", other)])
    assert [(r.recipe, r.width) for r in both[1:3]] == [("synthetic", 32), ("other", 16)]
    with pytest.raises(FileNotFoundError, match="no file of runs at"):
        read_records([tmp_path / "other.jsonl"])
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="no runs in"):
        read_records([tmp_path / "empty.jsonl"])


def test_a_line_cut_short_by_a_kill(tmp_path: Path) -> None:
    """It is left out by readers, and gone after the next run; a broken line with an end is an error."""
    path = write(tmp_path / "runs.jsonl", [RECORD])
    with open(path, "a") as file:
        file.write(RECORD.to_json()[:40])
    assert read_records([path]) == [RECORD]
    other = dataclasses.replace(RECORD, run="other")
    append_line(path, other.to_json())
    assert read_records([path]) == [RECORD, other]
    with open(path, "a") as file:
        file.write(RECORD.to_json()[:40] + "\n")
    with pytest.raises(ValueError, match="line 3: not a JSON object"):
        read_records([path])


def _append(path: Path, worker: int) -> None:
    for k in range(20):
        append_line(path, dataclasses.replace(RECORD, run=f"{worker}-{k}").to_json())


def test_processes_append_at_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "runs.jsonl"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_append, args=(path, k)) for k in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len({r.run for r in read_records([path])}) == 60


def test_the_kind_of_a_loss() -> None:
    assert squared("energy_mse") is True
    assert squared("slabs/force_rmse") is False
    assert squared("force_mae") is False
    assert squared("objective") is None
    assert describe_loss("energy_mse", "(eV/atom)^2") == "energy_mse [(eV/atom)^2], squared error"
