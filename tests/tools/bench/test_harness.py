"""The harness of the benchmarks: what it reports, and that it refuses to time wrong results."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from tools.bench import harness
from tools.bench.memory.step import peak_of_events

ARGS = Namespace(rounds=5, seconds=0.0, json=None, plot=None)


def case(**changes: object) -> harness.Case:
    values = torch.ones(1000)
    settings: dict = {
        "op": "sum",
        "shape": {"E": 1000},
        "dtype": "float32",
        "implementations": {
            "ours": values.sum,
            "twice": lambda: (values.sum(), values.sum())[0],
            "absent": None,
        },
        "expected": torch.tensor(1000.0),
        "num_bytes": 4000,
        "ceilings": [harness.read_ceiling(values), harness.product_ceiling(8, 8)],
    }
    return harness.Case(**{**settings, **changes})


def test_records() -> None:
    records = {record.impl: record for record in harness.compare(case(), ARGS)}
    assert list(records) == ["ours", "twice", "absent", "read", "mm"]
    ours = records["ours"]
    assert ours.ratio_to_ours == 1
    assert ours.error == 0
    assert ours.rounds >= 5
    assert ours.gb_per_s == pytest.approx(4000 / ours.seconds / 1e9)
    assert ours.share_of_ceiling is not None
    assert ours.gflop_per_s is None
    assert records["read"].share_of_ceiling == pytest.approx(1)
    assert records["mm"].gflop_per_s == pytest.approx(2 * 8**3 / records["mm"].seconds / 1e9)
    assert records["absent"].seconds is records["absent"].ratio_to_ours is None
    assert records["absent"].note == "not installed"


def test_times_are_of_the_work_and_paired() -> None:
    """Sleeps of known length: nothing else runs in them, and they cannot end early."""
    times = harness._times({"a": lambda: time.sleep(2e-3), "b": lambda: time.sleep(4e-3)}, 5, 0.0)
    assert len(times["a"]) == len(times["b"]) == 5
    assert min(times["a"]) >= 2e-3
    assert min(times["b"]) >= 4e-3


def test_wrong_results_are_not_timed() -> None:
    right, wrong = torch.ones(3), torch.tensor([1.0, 1.0, 1.1])
    for ours, peer, fails in ((wrong, right, True), (right, wrong, True), (right, right + 1e-3, False)):
        works = {"ours": lambda v=ours: v, "peer": lambda v=peer: v}
        wanted = case(implementations=works, expected=right)
        if fails:
            with pytest.raises(ValueError, match=r"must be right to .* got an error of 0\.1"):
                harness.compare(wanted, ARGS)
        else:
            assert harness.compare(wanted, ARGS)[1].error == pytest.approx(1e-3, rel=1e-3)
    with pytest.raises(ValueError, match="nan"):
        harness.compare(case(implementations={"ours": lambda: right * float("nan")}, expected=right), ARGS)
    with pytest.raises(ValueError, match="expected shapes"):
        harness.compare(case(implementations={"ours": lambda: right[:2]}, expected=right), ARGS)


def test_names_must_differ_and_ours_be_there() -> None:
    with pytest.raises(ValueError, match="different names"):
        harness.compare(case(implementations={"read": lambda: torch.tensor(1000.0)}), ARGS)
    with pytest.raises(ValueError, match="ours, a, must be there"):
        harness.compare(case(implementations={"a": None}), ARGS)


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = Namespace(**{**vars(ARGS), "json": tmp_path / "r.json", "plot": tmp_path / "r.png"})
    records = harness.compare(case(), args)
    records[1].ratio_to_ours = 0.5
    harness.report(records, args)
    printed = capsys.readouterr().out
    assert "not installed: absent" in printed
    assert "slower (ratio below 0.95) in 1 of 2" in printed
    assert "twice 0.50" in printed
    loaded = json.loads(args.json.read_text())
    assert [record["impl"] for record in loaded] == [record.impl for record in records]
    assert {"op", "shape", "dtype", "impl", "seconds", "share_of_ceiling", "ratio_to_ours"} <= set(loaded[0])
    assert args.plot.stat().st_size > 1000
    text = harness.table(records)
    assert "E=1000" in text
    assert "missing" in text
    assert text.count("(ceiling)") == 2


def test_missing_modules_are_none() -> None:
    assert harness.optional("no_such_module") is None
    assert harness.optional("torch") is torch


def test_processor_time_leaves_waiting_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sleep takes no processor time; the clock of the wall sees it."""
    assert harness._sample(lambda: time.sleep(0.02), 1) >= 0.02
    monkeypatch.setitem(harness._state, "clock", "cpu")
    assert harness._sample(lambda: time.sleep(0.02), 1) < 0.01


def test_processor_time_of_several_threads(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        harness.parse_args("", argv=["--clock", "cpu", "--threads", "2"])
    assert "--clock cpu adds up the threads' waiting, got --threads 2; use 1" in capsys.readouterr().err


def test_results_may_be_compared_at_another_size_and_layout() -> None:
    """Of a part of the work the times are divided by the part."""
    small = case(
        implementations={"ours": lambda: torch.tensor(3.0), "other": lambda: [torch.tensor([6.0])]},
        comparable={"other": lambda result: result[0][0] / 2},
        expected=torch.tensor(3.0),
    )
    works = {"ours": lambda: time.sleep(2e-3), "other": lambda: time.sleep(2e-3)}
    large = case(
        implementations=works,
        expected=None,
        ceilings=(),
        checked=small,
        portions={"other": 0.25},
        kept_bytes={"other": 5e6},
    )
    found = harness.compare(large, ARGS)
    assert [r.error for r in found] == [0, 0]
    assert min(found[1].round_seconds) >= 8e-3
    assert "keeps 5 MB  (times of 25.0% of the work, divided by it)" in harness.table(found)
    small.comparable = {"other": lambda result: result[0][0] / 4}
    with pytest.raises(ValueError, match="other must be right"):
        harness.compare(large, ARGS)


def test_memory_of_a_work() -> None:
    x = torch.ones(1000, requires_grad=True)
    assert harness.kept_bytes(lambda: x * 2, [x]) == 0
    assert harness.kept_bytes(lambda: (x * x).exp().sin(), [x]) == 4000  # exp's result, which sin keeps too
    assert harness.kept_bytes(lambda: x * x, []) == 4000
    with torch.no_grad():
        assert 12000 <= peak_of_events(lambda: (x + 1) * (x + 2)) < 13000
