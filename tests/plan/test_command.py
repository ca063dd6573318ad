import json
from pathlib import Path

import pytest

from megagnn.cli import main

CONFIG = str(Path(__file__).parents[2] / "examples/configs/quickstart-egnn.toml")


def test_a_plan_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", CONFIG, "--cluster", "2core", "--ranks", "2", "--parallel.zero_stage", "3"]) == 0
    out = capsys.readouterr().out
    for words in ("egnn, 90,", "ZeRO 3", "pairs: backward", "fits 10.2 GB", "atoms/s", "Wh a step"):
        assert words in out, words


def test_json_holds_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", CONFIG, "--cluster", "8xh100", "--atoms", "100", "--edges", "900", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["peak_bytes"] == max(m["all"] for m in record["memory"].values())
    assert record["seconds"]["step"] == pytest.approx(
        sum(v for k, v in record["seconds"].items() if k != "step")
    )
    assert record["price"] > 0
    assert main(["plan", CONFIG, "--cluster", "8xh100", "--search", "--show", "2", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["layouts"]) == 2


def test_calibrate_needs_no_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megagnn.plan.calibrate.calibrate", lambda path: f"name = '{path.stem}'")
    assert main(["plan", "--calibrate", str(tmp_path / "here.toml")]) == 0
    assert "name = 'here'" in capsys.readouterr().out
    for more in ([CONFIG], ["--cluster", "8xh100"], ["--model.width", "64"]):
        assert main(["plan", *more, "--calibrate", str(tmp_path / "here.toml")]) == 2
        assert "--calibrate FILE measures this machine and plans no run" in capsys.readouterr().err
    assert main(["plan", CONFIG]) == 2
    assert "needs CONFIG.toml and --cluster NAME" in capsys.readouterr().err


def test_what_does_not_fit_is_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", CONFIG, "--cluster", "laptop", "--model.width", "16384"]
    assert main(arguments) == 1
    assert "does not fit: needs" in capsys.readouterr().out
    assert main([*arguments, "--search"]) == 1
    assert "no layout fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cluster", "8xh10"], "did you mean '8xh100'?"),
        (["--cluster", "2core", "--ranks", "3"], "3 ranks are not between 1 and the 2 devices"),
        (["--cluster", "2core", "--parallel.tensor", "2", "--ranks", "1"], "start a multiple of 2 ranks"),
        (["--cluster", "2core", "--search", "--ranks", "0"], "0 ranks are not between 1 and the 2 devices"),
        (["--cluster", "2core", "--atoms", "0"], "num_atoms of a plan must be at least 1, got 0"),
        (["--cluster", "2core", "--structures", "0"], "num_structures of a plan must be at least 1, got 0"),
        (["--cluster", "2core", "--elements", "119"], "num_elements of a plan must be at most 118, got 119"),
        (["--cluster", "2core", "--model.widht", "3"], "nearest valid key: 'model.width'"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", CONFIG, *arguments]) == 2
    assert message in capsys.readouterr().err
