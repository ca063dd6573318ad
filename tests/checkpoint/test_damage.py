"""A checkpoint that is cut, or has one bit changed anywhere, is refused by name; the one before is used."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megagnn.checkpoint import manifest as checkpoint_manifest
from megagnn.checkpoint.folder import open_folder
from megagnn.checkpoint.manifest import complaints
from megagnn.checkpoint.single_file import load_checkpoint
from tests import runs

FILES = ("manifest.json", "rank-00000.safetensors")
NUM_POSITIONS = 150  # with --full: every byte


@pytest.fixture(scope="module")
def damaged(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to be damaged; whole again after each test."""
    copy = tmp_path_factory.mktemp("damage") / "step-00000060"
    shutil.copytree(folder, copy)
    return copy


def positions(length: int, request: pytest.FixtureRequest) -> list[int]:
    if request.config.getoption("--full"):
        return list(range(length))
    spread = {length * k // NUM_POSITIONS for k in range(NUM_POSITIONS)}
    return sorted(spread | set(range(20)) | {length - k for k in range(1, 90)})


def complaint(read: Callable[[Path], object], path: Path) -> str:
    try:
        read(path)
    except ValueError as error:
        return str(error)
    return "nothing"


def flipped(path: Path, where: list[int]) -> Iterator[int]:
    """The file with one bit changed, at each of these bytes in turn; another bit at each."""
    content = path.read_bytes()
    with open(path, "r+b", buffering=0) as file:
        for position in where:
            file.seek(position)
            file.write(bytes([content[position] ^ (1 << position % 8)]))
            yield position
            file.seek(position)
            file.write(content[position : position + 1])
    assert path.read_bytes() == content


@pytest.mark.parametrize("name", FILES)
def test_a_changed_bit(damaged: Path, name: str, request: pytest.FixtureRequest) -> None:
    manifest, path = open_folder(damaged).manifest, damaged / name
    where = positions(path.stat().st_size, request)
    few = where[:: 1 + len(where) // 500]
    for position in flipped(path, where if name == FILES[0] else few):
        assert f"{path} is damaged" in complaint(open_folder, damaged), f"byte {position}"
    for position in flipped(path, where if name == FILES[1] else []):
        assert f"{path} is damaged" in str(complaints(damaged, manifest, [name])), f"byte {position}"


@pytest.mark.parametrize("name", FILES)
def test_cut_and_longer(damaged: Path, name: str, request: pytest.FixtureRequest) -> None:
    path = damaged / name
    content = path.read_bytes()
    lengths = positions(len(content), request)
    for length in lengths[:: 1 + len(lengths) // 2000]:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"{path} is (damaged or )?truncated"):
            open_folder(damaged)
    path.write_bytes(content + b"\n")
    with pytest.raises(ValueError, match=f"{path} is damaged"):
        open_folder(damaged)
    path.unlink()
    with pytest.raises(ValueError, match=f"{path} (is missing|cannot be read)"):
        open_folder(damaged)
    path.write_bytes(content)
    open_folder(damaged)


def test_a_changed_bit_of_a_single_file(
    checkpoint: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = tmp_path / "best.safetensors"
    shutil.copyfile(checkpoint, path)
    version = path.read_bytes().find(b"version")  # a name of the metadata, which is looked up
    for position in flipped(path, [version, *positions(path.stat().st_size, request)]):
        assert "best.safetensors" in complaint(load_checkpoint, path), f"byte {position}"


def test_without_checksums_it_would_be_read(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistake: sizes are compared, and the format's own checks are trusted."""
    path = damaged / FILES[1]
    entry = open_folder(damaged).manifest.files[FILES[1]]
    monkeypatch.setattr(checkpoint_manifest, "sha256_of", lambda path: entry.sha256)
    before = load_checkpoint(damaged, optimizer=True).tensors
    for _ in flipped(path, [entry.size // 2]):
        after = load_checkpoint(damaged, optimizer=True).tensors
        assert not all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("name", FILES)
def test_the_one_before_is_used(
    store: Path, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """And leads to the same bits; the damaged one is kept beside."""
    run = tmp_path / "run"
    shutil.copytree(run_dir, run, symlinks=True)
    bad = run / "checkpoints" / "step-00000060"
    next(flipped(bad / name, [200]))
    assert runs.train(store, run, "--resume") == 0
    told = capsys.readouterr().err
    assert f"warning: {bad / name} is damaged" in told
    assert "it is now step-00000060.damaged, using" in told
    assert "steps 50 to 60" in told
    assert (run / "checkpoints" / "step-00000060.damaged" / name).exists()
    for link in ("last", "best"):
        expected = load_checkpoint(run_dir / "checkpoints" / link, optimizer=True)
        got = load_checkpoint(run / "checkpoints" / link, optimizer=True)
        assert got.progress == expected.progress
        assert all(torch.equal(got.tensors[key], tensor) for key, tensor in expected.tensors.items())


def test_nothing_is_whole(
    store: Path, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_dir, run, symlinks=True)
    bad = sorted((run / "checkpoints").glob("step-*"))
    for number, folder in enumerate(bad):
        next(flipped(folder / FILES[number % 2], [100]))
    assert runs.train(store, run, "--resume") == 2
    told = capsys.readouterr().err
    assert "can be used; start again with --overwrite" in told
    assert all(f"{folder / FILES[number % 2]} is damaged" in told for number, folder in enumerate(bad))
    assert sorted((run / "checkpoints").glob("step-*")) == bad, "all are left as they are"


def test_a_damaged_best_does_not_spoil_the_end(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The best is older than what a run resumes from, so that nothing has looked at it before."""
    run, often = tmp_path / "run", ("--train.checkpoint_every", "2", "--train.validate_every", "4")
    assert runs.train(store, run, *often, "--train.num_steps", "8") == 0
    best = (run / "checkpoints" / "best").resolve() / FILES[1]
    next(flipped(best, [300]))
    trainer = runs.make_trainer(store, run, *often, "--train.num_steps", "8")
    trainer._finish(_Said())  # type: ignore[arg-type]
    assert f"best.safetensors was not written: {best} is damaged" in capsys.readouterr().out


class _Said:
    """A monitor that prints."""

    def say(self, text: str) -> None:
        print(text)
