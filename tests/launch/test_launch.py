"""What torchrun starts again continues the run that this command began, and no other."""

from pathlib import Path

import pytest
from torch.distributed import TCPStore

from megagnn.checkpoint.single_file import load_checkpoint
from tests import runs

SHORT = ("--train.num_steps", "6", "--train.checkpoint_every", "2")
LONGER = ("--train.num_steps", "8", "--train.checkpoint_every", "2")
AGAIN = "started again by torchrun: continuing"


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    """A store as torchrun holds it, and the environment of its only rank."""
    store = TCPStore("127.0.0.1", 0, is_master=True)
    variables = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    for name, value in (variables | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(name, value)
    return store


def step(out_dir: Path) -> int:
    return load_checkpoint(out_dir / "checkpoints/last").progress.step


def test_it_continues(
    store: Path, tmp_path: Path, torchrun: TCPStore, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs.train(store, tmp_path / "run", *SHORT) == 0
    assert AGAIN not in capsys.readouterr().err
    assert runs.train(store, tmp_path / "run", *LONGER) == 0
    assert AGAIN in capsys.readouterr().err
    assert step(tmp_path / "run") == 8


def test_it_does_not_take_an_earlier_run_over(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The user said neither --resume nor --overwrite, however often torchrun repeats the command."""
    assert runs.train(store, tmp_path / "run", *SHORT) == 0
    master = TCPStore("127.0.0.1", 0, is_master=True)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(master.port))
    for _ in range(2):
        assert runs.train(store, tmp_path / "run", *LONGER) == 2
        assert "holds an earlier run; add --resume" in capsys.readouterr().err
    assert step(tmp_path / "run") == 6


def test_it_overwrites_once(
    store: Path, tmp_path: Path, torchrun: TCPStore, capsys: pytest.CaptureFixture[str]
) -> None:
    """What began with --overwrite must not remove its own checkpoints when it is started again."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/launch.txt").write_text("of another command")
    (tmp_path / "run/checkpoints").mkdir()
    (tmp_path / "run/checkpoints/best.safetensors").write_text("of another run")
    assert runs.train(store, tmp_path / "run", *SHORT, "--overwrite") == 0
    shown = tmp_path / "run/checkpoints/last"
    before = shown.stat().st_mtime_ns
    assert runs.train(store, tmp_path / "run", *SHORT, "--overwrite") == 0
    assert AGAIN in capsys.readouterr().err
    assert shown.stat().st_mtime_ns == before, "it was at its end: nothing to do"
