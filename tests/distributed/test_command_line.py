"""The command line under torchrun: train on two ranks, be killed, resume to the same bits, evaluate."""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megagnn.checkpoint.single_file import load_checkpoint
from megagnn.cli import main
from tests import runs
from tests.tolerances import assert_close

RANKS = 2
TIMEOUT_S = 600  # of a command that takes seconds; a deadlock should not hold up the tests for longer


LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*LAUNCH, "-m", "megagnn", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=TIMEOUT_S
    )


def kill_after_a_checkpoint(arguments: list[str], checkpoint: Path) -> None:
    """Starts a run and kills all its ranks, without warning, once a checkpoint is there.

    The ranks are children of this process, where torchrun would leave its own behind.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS)}
    command = [sys.executable, "-m", "megagnn", *arguments]
    ranks = [
        subprocess.Popen(
            command,
            env={**ENVIRONMENT, **rendezvous, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.DEVNULL,
        )
        for rank in range(RANKS)
    ]
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while not checkpoint.exists():
            assert time.monotonic() < deadline, "no checkpoint in time"
            assert all(rank.poll() is None for rank in ranks), "the run ended before its first checkpoint"
            time.sleep(0.01)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("torchrun")
    (folder / "config.toml").write_text(runs.CONFIG)
    return folder / "config.toml", runs.write_data(folder / "store")


def test_two_ranks_from_training_to_metrics(files: tuple[Path, Path], tmp_path: Path) -> None:
    config, store = files
    common = ["train", str(config), "--data.paths", str(store), "--data.max_atoms", "40"]
    whole, parts, metrics = tmp_path / "whole", tmp_path / "parts", tmp_path / "metrics.json"
    done = torchrun(*common, "--out_dir", str(whole))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("training and 12 validation structures") == 1, "only the main rank speaks"

    kill_after_a_checkpoint([*common, "--out_dir", str(parts)], parts / "checkpoints/last")
    assert 0 < load_checkpoint(parts / "checkpoints/last").progress.step < 60
    resumed = torchrun(*common, "--out_dir", str(parts), "--resume")
    assert resumed.returncode == 0, resumed.stderr
    expected = load_checkpoint(whole / "checkpoints/last", optimizer=True)
    got = load_checkpoint(parts / "checkpoints/last", optimizer=True)
    assert got.progress == expected.progress
    assert all(torch.equal(got.tensors[name], tensor) for name, tensor in expected.tensors.items())

    best = str(whole / "checkpoints/best")
    records = [
        replace(s, file=f"{k % 2}.xyz", config_type="odd" if k % 3 else "")
        for k, s in enumerate(runs.structures())
    ]
    named = str(runs.write_data(tmp_path / "named", records))
    evaluated = torchrun("evaluate", best, named, "--json", str(metrics), "--max-atoms", "12")
    assert evaluated.returncode == 0, evaluated.stderr
    found = json.loads(metrics.read_text())
    assert {name: m["num_test"] for name, m in found["sources"].items()} == {"clusters": 6, "crystals": 6}
    assert main(["evaluate", best, named, "--json", str(metrics)]) == 0
    alone = json.loads(metrics.read_text())
    for kind, names in (("files", {"0.xyz", "1.xyz"}), ("config_types", {"(none)", "odd"})):
        assert found[kind].keys() == alone[kind].keys() == names
        for name in names:
            assert found[kind][name] == pytest.approx(alone[kind][name], rel=1e-5)


def test_tensor_parallel_from_training_to_metrics(files: tuple[Path, Path], tmp_path: Path) -> None:
    """A model divided over two ranks is the model of one process, and continues as one, and the other way."""
    config, store = files
    common = ["train", str(config), "--data.paths", str(store), "--train.dtype", "float64"]
    divided, alone = tmp_path / "divided", tmp_path / "alone"
    short = ["--train.num_steps", "20"]
    done = torchrun(*common, "--parallel.tensor", "2", "--out_dir", str(divided), *short)
    assert done.returncode == 0, done.stderr
    assert "data 1 x pipeline 1 x tensor 2" in done.stderr
    one = [sys.executable, "-m", "megagnn", *common, "--out_dir", str(alone)]
    assert subprocess.run([*one, *short], env=ENVIRONMENT, check=False).returncode == 0
    assert_same_weights(divided, alone)

    longer = ["--train.num_steps", "40", "--resume"]
    continued = torchrun(*common, "--parallel.tensor", "2", "--out_dir", str(alone), *longer)
    assert continued.returncode == 0, continued.stderr
    one[-1] = str(divided)
    assert subprocess.run([*one, *longer], env=ENVIRONMENT, check=False).returncode == 0
    assert_same_weights(divided, alone)

    errors = []
    for launch, options in ((LAUNCH, ["--tensor", "2"]), ([sys.executable], [])):
        name = "best" if len(errors) == 0 else "best.safetensors"
        best, metrics = str(divided / "checkpoints" / name), tmp_path / f"{len(errors)}.json"
        command = [*launch, "-m", "megagnn", "evaluate", best, str(store), "--json", str(metrics), *options]
        assert subprocess.run(command, env=ENVIRONMENT, check=False).returncode == 0
        errors.append(json.loads(metrics.read_text())["sources"]["crystals"])
    assert errors[0] == pytest.approx(errors[1], rel=1e-8)


def assert_same_weights(first: Path, second: Path) -> None:
    """Whole parameters, their average and the optimizer's state are equal to 1e-8."""
    a, b = (load_checkpoint(folder / "checkpoints/last", optimizer=True) for folder in (first, second))
    assert a.progress.step == b.progress.step
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
        assert_close(tensor, b.tensors[name], 1e-8)


def test_an_error_on_all_ranks_is_told_and_ends_the_job(files: tuple[Path, Path], tmp_path: Path) -> None:
    config, store = files
    failed = torchrun("train", str(config), "--data.paths", str(store), "--data.max_edges", "20")
    assert failed.returncode != 0
    assert "raise the budget to at least" in " ".join(failed.stderr.split())
