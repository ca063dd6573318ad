"""The store: asynchronous, atomic, rotating, never without the best; errors reach the training thread."""

import multiprocessing
import os
import pickle
import resource
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megagnn.checkpoint import folder as checkpoint_folder
from megagnn.checkpoint import writer as checkpoint_store
from megagnn.checkpoint.boxes import Parts
from megagnn.checkpoint.folder import FolderCheckpoint, open_folder, remove_folder
from megagnn.checkpoint.progress import Progress
from megagnn.checkpoint.single_file import load_checkpoint, save_checkpoint
from megagnn.checkpoint.writer import CheckpointStore
from megagnn.optim.pieces import Piece
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.parameter import ParameterLayout

SIZE = 1000


@pytest.fixture(scope="module")
def example(run_dir: Path) -> FolderCheckpoint:
    """Whose configuration and statistics every checkpoint here takes."""
    return open_folder(run_dir / "checkpoints" / "last")


def piece(value: float) -> Piece:
    values = torch.full((SIZE,), value, dtype=torch.float64)
    return Piece("weight", "model", ParameterLayout((SIZE // 10, 10)), 0, SIZE, values, True)


def save(store: CheckpointStore, example: FolderCheckpoint, step: int, best: int | None = None) -> Piece:
    saved = piece(float(step))
    store.save(
        [saved], example.config, example.statistics, Progress(step=step, best_step=best, best_loss=0.1)
    )
    return saved


def entries(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_the_last_and_the_best_of_each_stay(tmp_path: Path, example: FolderCheckpoint) -> None:
    store = CheckpointStore(tmp_path, ParallelContext(), keep=2)
    for step, best in [(1, None), (2, 2), (3, 2), (4, 2), (5, 5), (6, 5), (7, 5), (8, 5)]:
        save(store, example, step, best)
        store.wait()
        newest = load_checkpoint(tmp_path / "last")
        assert newest.progress.step == step
        assert bool((newest.tensors["model/weight"] == step).all())
        if best is not None:
            assert load_checkpoint(tmp_path / "best").progress.step == best
        if step == 5:  # the best of 4 is still there: a run may have to go on from it
            assert entries(tmp_path) == ["best", "last", "step-00000002", "step-00000004", "step-00000005"]
    assert entries(tmp_path) == ["best", "last", "step-00000005", "step-00000007", "step-00000008"]


def test_the_same_step_again_replaces_the_manifest_alone(
    tmp_path: Path, example: FolderCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that stops where a validation is due saves before and after it; a kill between loses nothing."""
    store = CheckpointStore(tmp_path, ParallelContext(), keep=1)
    save(store, example, 3)
    store.wait()
    files = {path: path.stat().st_ino for path in (tmp_path / "step-00000003").glob("*.safetensors")}

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_store.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            save(store, example, 3, best=3)
    assert load_checkpoint(tmp_path / "last").progress.best_step is None  # the old one, whole
    save(store, example, 3, best=3)
    store.wait()
    assert load_checkpoint(tmp_path / "best").progress.best_step == 3
    assert {path: path.stat().st_ino for path in (tmp_path / "step-00000003").glob("*.safetensors")} == files


def test_what_is_saved_is_what_was_there(
    tmp_path: Path, example: FolderCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on and changes the weights while the disk is slow; staging is what makes it safe."""
    written, going = threading.Event(), threading.Event()
    original = checkpoint_store.save_parts

    def slow(path: Path, parts: Parts) -> None:
        going.set()
        assert written.wait(60)
        original(path, parts)

    monkeypatch.setattr(checkpoint_store, "save_parts", slow)
    for staged in (True, False):
        folder = tmp_path / str(staged)
        store = CheckpointStore(folder, ParallelContext())
        if not staged:  # the mistake: what is written is the weights themselves
            monkeypatch.setattr(store, "_staged", lambda parts: parts)
        written.clear()
        going.clear()
        saved = save(store, example, 1)
        assert going.wait(60)
        assert not (folder / "last").exists(), "it returned before anything was written"
        saved.values.fill_(-1.0)
        written.set()
        store.wait()
        kept = load_checkpoint(folder / "last").tensors["model/weight"]
        assert bool((kept == (1.0 if staged else -1.0)).all())


def test_without_a_thread_it_is_there_at_once(tmp_path: Path, example: FolderCheckpoint) -> None:
    store = CheckpointStore(tmp_path, ParallelContext(), asynchronous=False)
    save(store, example, 1)
    assert store._thread is None
    assert load_checkpoint(tmp_path / "last").progress.step == 1


@pytest.mark.parametrize("asynchronous", [True, False])
def test_an_error_of_the_thread_is_raised_in_training(
    tmp_path: Path, example: FolderCheckpoint, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    store = CheckpointStore(tmp_path, ParallelContext(), asynchronous=asynchronous)
    save(store, example, 1)
    store.wait()

    def full_disk(*_: object) -> None:
        raise OSError("No space left on device")

    message = r"step-00000002 was not written: dp0-pp0-tp0: No space left on device"
    monkeypatch.setattr(checkpoint_store, "save_parts", full_disk)
    if asynchronous:
        save(store, example, 2)
        assert store._thread is not None
        store._thread.join()
        with pytest.raises(OSError, match=message):
            store.check()
    with pytest.raises(OSError, match=message):
        store.wait() if asynchronous else save(store, example, 2)
    monkeypatch.undo()
    store.check()
    assert load_checkpoint(tmp_path / "last").progress.step == 1, "the one before is untouched"
    save(store, example, 2)
    store.wait()
    assert load_checkpoint(tmp_path / "last").progress.step == 2


@pytest.mark.parametrize("point", ["save_parts", "_leave", "_commit", "rename", "point_links", "rotate"])
def test_killed_anywhere_in_a_save(tmp_path: Path, example: FolderCheckpoint, point: str) -> None:
    """The process dies at one point of the save of step 3: there are two whole checkpoints, old or new, the
    best is one of them, and nothing is left of the rest after the next start."""
    process = multiprocessing.get_context("fork").Process(target=_die_at, args=(point, tmp_path, example))
    process.start()
    process.join(120)
    assert process.exitcode == 9
    committed = point in ("point_links", "rotate")
    store = CheckpointStore(tmp_path, ParallelContext(), keep=2)
    store.clean()
    found = store.newest()
    assert found is not None
    assert found.progress.step == (3 if committed else 2)
    for link, step in (("last", found.progress.step), ("best", found.progress.best_step)):
        assert load_checkpoint(tmp_path / link).progress.step == step
    names = entries(tmp_path)
    assert all(name in ("best", "last") or name.startswith("step-") for name in names), names
    save(store, example, 4, 3)
    store.wait()
    assert load_checkpoint(tmp_path / "last").progress.step == 4


def _die_at(point: str, folder: Path, example: FolderCheckpoint) -> None:
    torch.set_num_threads(1)
    store = CheckpointStore(folder, ParallelContext(), keep=2, asynchronous=False)
    for step in (1, 2):
        save(store, example, step, step)

    def die(*_: object) -> None:
        os._exit(9)

    if point == "rename":
        checkpoint_store.os.rename = die  # type: ignore[assignment]
    elif point == "_commit":
        store._commit = die  # type: ignore[method-assign]
    else:
        setattr(checkpoint_store, point, die)
    save(store, example, 3, 3)


def test_killed_while_it_removes(tmp_path: Path, example: FolderCheckpoint) -> None:
    """First the name goes, so that no reader takes half of a folder for a checkpoint."""
    store = CheckpointStore(tmp_path, ParallelContext(), asynchronous=False)
    save(store, example, 1)
    process = multiprocessing.get_context("fork").Process(target=_die_removing, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    assert any(name.endswith(".old") for name in entries(tmp_path))
    assert store.newest() is None
    store.clean()
    assert entries(tmp_path) == ["last"], "a link to nothing, until the next save"


def _die_removing(folder: Path) -> None:
    checkpoint_folder.shutil.rmtree = lambda path, **_: os._exit(9) if path.exists() else None  # type: ignore
    remove_folder(folder / "step-00000001")


def test_a_reader_sees_the_old_or_the_new(tmp_path: Path, example: FolderCheckpoint) -> None:
    """Though only one is kept, and the link changes and the old one goes while it reads."""
    store = CheckpointStore(tmp_path, ParallelContext(), keep=1)
    save(store, example, 1, 1)
    store.wait()
    seen: list[int] = []
    errors: list[Exception] = []
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            try:
                got = load_checkpoint(tmp_path / "best")
                values = got.tensors["model/weight"]
                assert bool((values == got.progress.step).all())
                seen.append(got.progress.step)
            except Exception as error:
                errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    step = 1
    while len(set(seen)) < 4 and step < 2000:
        step += 1
        save(store, example, step, step)
    store.wait()
    over.set()
    reader.join()
    assert not errors
    assert seen == sorted(seen)
    assert len(set(seen)) >= 4, "it did read in between"


def test_nothing_is_ever_unpickled(
    tmp_path: Path, example: FolderCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pickles that would run a command lie where torch's own formats have them, and in a rank's place."""
    store = CheckpointStore(tmp_path, ParallelContext(), asynchronous=False)
    save(store, example, 1)
    proof = tmp_path / "proof"
    pickle.loads(pickle.dumps(_Command(proof)))
    assert proof.exists(), "this pickle does run"
    proof.unlink()
    bad = pickle.dumps(_Command(proof))
    for name in (".metadata", "__0_0.distcp", "optimizer.pt", "random.pickle", "rank-00000.json"):
        (tmp_path / "step-00000001" / name).write_bytes(bad)

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    for module, names in ((pickle, ("load", "loads", "Unpickler")), (torch, ("load",))):
        for name in names:
            monkeypatch.setattr(module, name, forbidden)
    found = store.newest()
    assert found is not None
    loaded = piece(0.0)
    found.load([loaded])
    found.restore_random_state(ParallelContext())
    assert bool((loaded.values == 1.0).all())
    (tmp_path / "step-00000001" / "rank-00000.safetensors").write_bytes(bad)
    with pytest.raises(ValueError, match=r"rank-00000\.safetensors is (truncated|damaged)"):
        store.newest()
    with pytest.raises(ValueError, match=r"rank-00000\.safetensors cannot be read"):
        found.load([loaded])  # even past the checksums
    assert not proof.exists()


class _Command:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.proof,))


def test_a_checkpoint_of_another_model(tmp_path: Path, example: FolderCheckpoint) -> None:
    store = CheckpointStore(tmp_path, ParallelContext(), asynchronous=False)
    save(store, example, 1)
    found = store.newest()
    assert found is not None
    values, layout = torch.zeros(SIZE), ParameterLayout((SIZE // 20, 20))
    with pytest.raises(ValueError, match=r"missing \['model/other'\]"):
        found.load([Piece("other", "model", layout, 0, SIZE, values, True)])
    with pytest.raises(ValueError, match=r"model/weight is \(100, 10\), the model has \(50, 20\)"):
        found.load([Piece("weight", "model", layout, 0, SIZE, values, True)])


def test_a_checkpoint_with_a_hole(tmp_path: Path, example: FolderCheckpoint) -> None:
    """An optimizer that forgot to name a run."""
    store = CheckpointStore(tmp_path, ParallelContext(), asynchronous=False)
    whole = piece(1.0)
    part = Piece("weight", "model", whole.layout, 0, 15, whole.values[:15], True)
    store.save([part], example.config, example.statistics, Progress(step=1))
    found = store.newest()
    assert found is not None
    with pytest.raises(ValueError, match="does not hold all of model/weight"):
        found.load([whole])


def test_files_can_be_read_by_others(tmp_path: Path, example: FolderCheckpoint) -> None:
    store = CheckpointStore(tmp_path, ParallelContext(), asynchronous=False)
    save(store, example, 1)
    plain, weights = tmp_path / "plain", tmp_path / "step-00000001" / "rank-00000.safetensors"
    plain.touch()
    assert weights.stat().st_mode == plain.stat().st_mode
    save_file({"x": torch.ones(1)}, plain)
    assert weights.stat().st_mode != plain.stat().st_mode, "safetensors by itself lets only us"


def test_a_file_system_without_links(
    tmp_path: Path, example: FolderCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names are in small files, which change in one go, too."""

    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refused)
    store = CheckpointStore(tmp_path, ParallelContext(), keep=1)
    for step, best in [(1, 1), (2, 1), (3, 3)]:
        save(store, example, step, best)
        store.wait()
        assert (tmp_path / "last").is_file()
        assert load_checkpoint(tmp_path / "last").progress.step == step
        assert load_checkpoint(tmp_path / "best").progress.step == best
    (tmp_path / "last").write_text("../elsewhere\n")
    with pytest.raises(ValueError, match="last is truncated or not a safetensors file"):
        load_checkpoint(tmp_path / "last")


def test_a_failed_rank_is_not_waited_for(
    tmp_path: Path, example: FolderCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the disk has no room for a word about it."""
    store, marker = CheckpointStore(tmp_path, ParallelContext()), tmp_path / "rank-00000.json"
    monkeypatch.setattr(checkpoint_store, "WAIT_SECONDS", 0.1)
    with pytest.raises(TimeoutError, match="1 of the ranks have not written"):
        store._markers(tmp_path)
    data = marker.with_suffix(".safetensors")
    data.write_bytes(bytes(1000))
    checkpoint_store._leave_word(marker, "no room")
    assert data.stat().st_size == 0, "what was written makes room"
    with pytest.raises(OSError, match="no room"):
        store._markers(tmp_path)
    marker.unlink()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_store, "_leave", full)
    checkpoint_store._leave_word(marker, "no room")
    with pytest.raises(OSError, match=r"files of rank-00000 in .* were not written"):
        store._markers(tmp_path)


def test_a_disk_without_room(tmp_path: Path, example: FolderCheckpoint) -> None:
    """A limit on the size of files stands for it; the error is the system's, and not the library's own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(OSError, match=r"out\.safetensors\.\d+\.tmp cannot be written .*is there room"):
            save_checkpoint(
                tmp_path / "out.safetensors",
                example.config,
                example.statistics,
                Progress(),
                {"model/weight": torch.zeros(2000)},
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert entries(tmp_path) == []
