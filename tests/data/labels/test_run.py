"""The data depend on the seed, and not on workers, interruptions or the order of chunks."""

import os
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megagnn.data.labels import engines as engines_module
from megagnn.data.labels import run as command
from megagnn.data.labels.chunks import chunk_path
from megagnn.data.labels.run import LabelJob, hash_splits, label
from megagnn.data.labels.sources import SOURCES, find_sources
from megagnn.data.store import Store

NUM = 60  # three chunks of at most 25 slabs
needs_xtb = pytest.mark.skipif(
    find_spec("tblite") is None or find_spec("rdkit") is None, reason="megagnn[labels]"
)


def job(out: Path, workers: int = 1, num: int = NUM, seed: int = 0, keep_parts: bool = False) -> LabelJob:
    return LabelJob([SOURCES["slabs-emt"]], num, seed, workers, out, per_group=1, keep_parts=keep_parts)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Store:
    out = tmp_path_factory.mktemp("reference") / "store"
    label(job(out))
    assert not out.with_name("store.parts").exists()
    return Store.open(out)


def same_bits(store: Path, reference: Store) -> bool:
    opened = Store.open(store)
    opened.verify()
    return opened.header.to_json() == reference.header.to_json()  # checksums of all arrays, and provenance


def test_store_holds_what_was_asked_for(reference: Store) -> None:
    header = reference.header
    assert (len(reference), header.sources, header.levels) == (NUM, ("slabs-emt",), ("EMT",))
    made = header.provenance["slabs-emt"]
    assert (made["engine"], made["method"], made["seed"]) == ("ase", "EMT", 0)
    assert made["num_rejected"] == sum(made["rejected"].values()) > 0
    assert made["rejection_rate"] == pytest.approx(made["num_rejected"] / made["num_labelled"])
    assert np.isnan(reference.arrays["stress"]).all()


def test_two_workers_equal_one(tmp_path: Path, reference: Store) -> None:
    label(job(tmp_path / "store", workers=2))
    assert same_bits(tmp_path / "store", reference)
    label(job(tmp_path / "other", seed=1))
    assert not same_bits(tmp_path / "other", reference)


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, reference: Store) -> None:
    out = tmp_path / "store"
    program = (
        "import sys, argparse; from megagnn.data.labels import run as c; p = argparse.ArgumentParser();"
        "c.add_arguments(p); sys.exit(c.run(p.parse_args()))"
    )
    arguments = [
        "--source",
        "slabs-emt",
        "--num",
        str(NUM),
        "--workers",
        "2",
        "--per-group",
        "1",
        "--out",
        str(out),
    ]
    parts = out.with_name("store.parts") / "slabs-emt"
    process = subprocess.Popen([sys.executable, "-c", program, *arguments], stderr=subprocess.DEVNULL)
    while not chunk_path(parts, 0).exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists(), "killed before it could end, or this test shows nothing"
    done = chunk_path(parts, 0).stat().st_mtime_ns
    label(job(out, keep_parts=True))
    assert chunk_path(parts, 0).stat().st_mtime_ns == done, "the finished chunk was made again"
    assert same_bits(out, reference)


def test_a_larger_job_continues_a_smaller_one(tmp_path: Path, reference: Store) -> None:
    label(job(tmp_path / "small", num=20, keep_parts=True))
    os.rename(tmp_path / "small.parts", tmp_path / "large.parts")
    label(job(tmp_path / "large"))
    assert same_bits(tmp_path / "large", reference)


def test_parts_of_another_job_are_refused(tmp_path: Path) -> None:
    label(job(tmp_path / "store", num=5, keep_parts=True))
    with pytest.raises(ValueError, match="store already exists; choose another --out"):
        label(job(tmp_path / "store"))
    os.rename(tmp_path / "store", tmp_path / "kept")
    with pytest.raises(ValueError, match="holds parts of another job: seed is 0 there and 1 here"):
        label(job(tmp_path / "store", num=5, seed=1))
    (tmp_path / "store.parts" / "slabs-emt" / "plan.json").unlink()
    with pytest.raises(ValueError, match=r"holds files but no plan.json"):
        label(job(tmp_path / "store", num=5))


@needs_xtb
def test_one_molecule_lies_on_one_side_in_both_sources(tmp_path: Path) -> None:
    names = ["molecules-gfn2", "molecules-gfn1"]
    label(LabelJob(find_sources(names), 60, 0, 2, tmp_path / "store", per_group=2, keep_parts=True))
    store = Store.open(tmp_path / "store")
    sides: dict[str, set[str]] = {}
    row = 0
    for source, name in enumerate(names):
        groups: list[str] = []
        for path in sorted((tmp_path / "store.parts" / name).glob("chunk-*.npz")):
            with np.load(path) as chunk:
                taken = set(groups)  # what an earlier chunk has is dropped
                groups += [group for group in chunk["group"] if group not in taken]
        groups = groups[:60]
        np.testing.assert_array_equal(store.split[row : row + 60], hash_splits(groups))
        assert (store.source[row : row + 60] == source).all()
        for group, split in zip(groups, store.split[row : row + 60], strict=True):
            sides.setdefault(group, set()).add(f"{name} {split}")
        row += 60
    shared = [s for s in sides.values() if len({x.split()[0] for x in s}) == 2]
    assert shared, "without a molecule in both sources this test shows nothing"
    assert all(len({x.split()[1] for x in s}) == 1 for s in shared)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num": 0}, "--num must be at least 1, got 0"),
        ({"workers": 0}, "--workers must be at least 1, got 0"),
        ({"seed": -1}, "--seed must not be negative, got -1"),
    ],
)
def test_impossible_numbers(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        label(job(tmp_path / "store", **change))
    assert list(tmp_path.iterdir()) == []


def test_missing_engine_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(package: str) -> str:
        raise engines_module.PackageNotFoundError(package)

    monkeypatch.setattr(engines_module, "version", nothing)
    with pytest.raises(ValueError, match="pip install rdkit tblite"):
        label(job(tmp_path / "store"))
    assert list(tmp_path.iterdir()) == []


def test_unknown_and_repeated_sources() -> None:
    with pytest.raises(ValueError, match="unknown label source 'slabs'; known: molecules-gfn2"):
        find_sources(["slabs"])
    with pytest.raises(ValueError, match="'slabs-emt' is given 2 times"):
        find_sources(["slabs-emt", "slabs-emt"])


def test_command_says_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser()
    command.add_arguments(parser)
    out = tmp_path / "store"
    arguments = [
        "--source",
        "slabs-emt",
        "--num",
        "10",
        "--workers",
        "1",
        "--per-group",
        "1",
        "--out",
        str(out),
    ]
    assert command.run(parser.parse_args(arguments)) == 0
    said = capsys.readouterr().out
    assert "slabs-emt: 10 structures of 10 groups, EMT (ase" in said
    assert f"wrote {out}" in said


def test_split_depends_on_the_group_alone() -> None:
    groups = [f"molecule/{'C' * n}" for n in range(1, 200)]
    splits = dict(zip(groups, hash_splits(groups), strict=True))
    other = [*groups[50:150][::-1], "slab/fcc111/2x2x3/Cu12"]
    for group, split in zip(other[:-1], hash_splits(other)[:-1], strict=True):
        assert splits[group] == split


def test_splits_never_change_between_versions() -> None:
    # Published test splits hang on these numbers: a change of hash is a change of every data set's splits.
    groups = [f"molecule/{'C' * n}" for n in range(1, 31)]
    found = "".join(map(str, hash_splits(groups)))
    assert found == EXPECTED


EXPECTED = "000100000000000020000000020010"


def test_fractions_are_met_on_average() -> None:
    splits = hash_splits((f"group {i}" for i in range(20_000)), (0.6, 0.3, 0.1))
    shares = np.bincount(splits, minlength=3) / 20_000
    np.testing.assert_allclose(shares, (0.6, 0.3, 0.1), atol=4 * np.sqrt(0.25 / 20_000))


@pytest.mark.parametrize("fractions", [(0.8, 0.1, 0.2), (1.1, -0.1, 0.0)])
def test_impossible_fractions(fractions: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="must be non-negative and sum to 1"):
        hash_splits(["a"], fractions)
