"""The command line as a shell hands it over: paths of all kinds, several values, an absent device."""

import json
from pathlib import Path

import ase.io
import pytest
import torch
from ase import Atoms

from megagnn.calculator import MegaGNNCalculator
from megagnn.cli import main
from tests import runs

SHORT = ["--train.num_steps", "6", "--train.threads", "1"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with two stores and a configuration, and another working directory."""
    home, elsewhere = tmp_path / "home of me", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(elsewhere)
    records = runs.structures()
    runs.write_data(home / "clus=ters", [s for s in records if s.source == "clusters"])
    runs.write_data(home / "crystals", [s for s in records if s.source == "crystals"])
    (home / "run.toml").write_text(runs.CONFIG)
    return home


def test_paths_from_prepare_to_predict(home: Path) -> None:
    """Everywhere with ~, spaces and equals signs; nothing lands in a folder called ~."""
    given = ["--data.paths", "~/clus=ters", "~/crystals", "--out_dir=~/runs/a b=c", *SHORT]
    assert main(["train", *given[:3], "~/run.toml", *given[3:]]) == 0
    best = "~/runs/a b=c/checkpoints/best.safetensors"
    assert main(["evaluate", best, "~/clus=ters", "~/crystals", "--json", "~/m=1.json"]) == 0
    assert set(json.loads((home / "m=1.json").read_text())["sources"]) == {"clusters", "crystals"}
    ase.io.write(home / "in put=1.extxyz", Atoms("Cu2", positions=[[0, 0, 0], [0, 0, 2.5]]))
    arguments = ["--out", "~/out.extxyz", "--source", "clusters"]
    assert main(["predict", best, "~/in put=1.extxyz", *arguments]) == 0
    found = ase.io.read(home / "out.extxyz")
    calculator = MegaGNNCalculator(best, source="clusters")
    assert found.calc.results["energy"] == pytest.approx(calculator.get_potential_energy(found), abs=1e-6)
    assert main(["inspect", best]) == 0
    assert main(["export", best, "~/one.safetensors"]) == 0
    files = [f"mine=~/{name}" for name in ("out.extxyz", "other=1.extxyz")]
    found.positions[1, 2] = 2.8
    ase.io.write(home / "other=1.extxyz", found)
    assert main(["prepare", *files, "--out", "~/mine", "--split", "0,0,1"]) == 0
    header = json.loads((home / "mine" / "header.json").read_text())
    assert header["sources"] == ["mine"]
    assert not list(Path.cwd().iterdir()), "all of it is at home"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line that says so, from every command that takes a device, and nothing written."""
    message = "error: the device is 'cuda' but PyTorch sees no GPU here; use 'cpu' or 'auto'\n"
    config, store = str(home / "run.toml"), str(home / "crystals")
    common = ["train", config, "--data.paths", store, "--out_dir", "run", *SHORT]
    assert main([*common, "--train.device", "cuda"]) == 2
    assert capsys.readouterr().err == f"megagnn train: {message}"
    assert not list(Path.cwd().iterdir())
    assert main(common) == 0
    capsys.readouterr()
    best = "run/checkpoints/best"
    ase.io.write("in.extxyz", Atoms("Cu"))
    before = sorted(Path.cwd().iterdir())
    for command in (["evaluate", best, store], ["predict", best, "in.extxyz", "--out", "out.extxyz"]):
        assert main([*command, "--device", "cuda"]) == 2
        assert capsys.readouterr().err == f"megagnn {command[0]}: {message}"
    assert sorted(Path.cwd().iterdir()) == before
    with pytest.raises(ValueError, match="sees no GPU here"):
        MegaGNNCalculator(best, device="cuda:1")
