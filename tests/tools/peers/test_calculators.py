"""The table of calculators: the fastest round of each, on the terminal and as lines of JSON."""

import json

from tools.peers import calculators


def test_the_fastest_round_of_each_is_kept(tmp_path, monkeypatch, capsys):
    rounds = iter([{8: 4e-3, 64: 5e-3}, {8: 2e-3, 64: 9e-3}, {8: 3e-3, 64: 6e-3}, {8: 8e-3, 64: 7e-3}])
    monkeypatch.setattr(calculators, "times_of", lambda *_: next(rounds))
    out = tmp_path / "calculators.jsonl"
    models = ["megagnn=one", "mace=other"]
    assert calculators.main([*models, "--sizes", "8", "64", "--rounds", "2", "--json", str(out)]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines == [
        {"program": "megagnn", "threads": 1, "seconds": {"8": 3e-3, "64": 5e-3}},
        {"program": "mace", "threads": 1, "seconds": {"8": 2e-3, "64": 7e-3}},
    ]
    assert "| 1 | megagnn | 375 | 78 |" in capsys.readouterr().out
