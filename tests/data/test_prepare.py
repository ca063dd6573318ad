"""`megagnn prepare` from the command line's arguments to the store, and every bad input on the way."""

import argparse
import json
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from megagnn.data import keys, prepare
from megagnn.data.store import Store
from tools.pack_store import pack_store

FORMULAS = ("CH4", "H2O", "NH3", "C2H6", "CO2", "HCN", "CH4O", "C2H2", "N2", "O2", "H2", "CO")


def frame(formula, seed, **changes):
    rng = np.random.default_rng(seed)
    num_atoms = len(Atoms(formula))
    positions = changes.pop(
        "positions", 1.5 * np.arange(num_atoms)[:, None] + rng.uniform(0, 0.3, (num_atoms, 3))
    )
    atoms = Atoms(formula, positions=positions)
    labels = {"energy": -5.0 * num_atoms, "forces": rng.normal(size=(num_atoms, 3)), **changes}
    atoms.calc = SinglePointCalculator(atoms, **labels)
    atoms.info["run"] = seed % 4
    return atoms


@pytest.fixture
def data(tmp_path):
    """Ten conformations of each of twelve molecules, shuffled."""
    frames = [frame(f, 100 * k + c) for k, f in enumerate(FORMULAS) for c in range(10)]
    order = np.random.default_rng(0).permutation(len(frames))
    ase.io.write(tmp_path / "all.xyz", [frames[k] for k in order], format="extxyz")
    return tmp_path


def run(*arguments):
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    return prepare.run(parser.parse_args([str(a) for a in arguments]))


def formulas(store, split):
    return {tuple(np.sort(store.structure(int(i))[keys.ATOMIC_NUMBERS])) for i in store.indices(split)}


def test_extended_xyz_to_store(data, capsys):
    assert run(data / "all.xyz", "--out", data / "out", "--source", "mols", "--level", "PBE") == 0
    store = Store.open(data / "out")
    store.verify()
    assert len(store) == 120
    assert store.header.sources == ("mols",)
    assert store.header.levels == ("PBE",)
    provenance = store.header.provenance["mols"]
    assert (provenance["num_read"], provenance["num_rejected"], provenance["rejection_rate"]) == (120, 0, 0.0)
    assert provenance["method"] == "PBE"
    assert provenance["files"][0]["name"] == "all.xyz"
    printed = capsys.readouterr().out
    assert "120 structures" in printed
    assert "mols" in printed


def test_conformations_of_a_molecule_never_part(data):
    run(data / "all.xyz", "--out", data / "out")
    store = Store.open(data / "out")
    sides = [formulas(store, split) for split in ("train", "valid", "test")]
    assert all(sides)
    assert not sides[0] & sides[1]
    assert not sides[0] & sides[2]
    assert not sides[1] & sides[2]


def test_every_frame_on_its_own_comes_with_a_warning(data, capsys):
    run(data / "all.xyz", "--out", data / "out", "--group-by", "frame")
    assert "near copies of training frames land in the test set" in capsys.readouterr().err
    store = Store.open(data / "out")
    assert [len(store.indices(s)) for s in ("train", "valid", "test")] == [96, 12, 12]
    assert formulas(store, "train") & formulas(store, "test")  # what the warning is about


def test_group_by_key_and_fractions(data):
    run(data / "all.xyz", "--out", data / "out", "--group-by", "info:run", "--split", "0.5,0.25,0.25")
    store = Store.open(data / "out")
    assert [len(np.unique(store.group[store.indices(s)])) for s in ("train", "valid", "test")] == [2, 1, 1]


def test_one_group_tells_the_way_out_and_writes_nothing(data):
    ase.io.write(data / "md.xyz", [frame("H2O", k) for k in range(9)], format="extxyz")
    with pytest.raises(ValueError, match=r"source 'md' has 1 group\(s\).*--test.*--group-by"):
        run(data / "md.xyz", "--out", data / "out")
    assert not (data / "out").exists()


def test_fixed_test_file(data):
    ase.io.write(data / "held.xyz", [frame("H2O", k) for k in range(7)], format="extxyz")
    run(data / "all.xyz", "--test", data / "held.xyz", "--out", data / "out")
    store = Store.open(data / "out")
    assert store.header.sources == ("all",)  # the test file joins the one source there is
    assert store.indices("test").tolist() == list(range(120, 127))
    assert len(store.indices("valid")) > 0
    assert not formulas(store, "train") & formulas(store, "valid")
    assert store.header.split["test_files"] == ["held.xyz"]


def test_named_sources(data):
    ase.io.write(data / "held.xyz", [frame("H2O", k) for k in range(3)], format="extxyz")
    arguments = (f"A={data / 'all.xyz'}", f"B={data / 'all.xyz'}2", "--out", data / "out")
    (data / "all.xyz2").write_bytes((data / "all.xyz").read_bytes())
    with pytest.raises(ValueError, match=r"needs the name of its source, one of A, B: --test NAME="):
        run(*arguments, "--format", "ase", "--test", data / "held.xyz")
    ase.io.write(data / "more.xyz", [frame(f, 5) for f in FORMULAS], format="extxyz")
    run(
        f"A={data / 'all.xyz'}",
        f"B={data / 'more.xyz'}",
        "--test",
        f"B={data / 'held.xyz'}",
        "--out",
        data / "out",
    )
    store = Store.open(data / "out")
    assert store.header.sources == ("A", "B")
    assert {int(store.source[i]) for i in store.indices("test")} == {0, 1}
    of_b = store.source[120:] == 1
    assert of_b.all()
    assert store.split[-3:].tolist() == [2, 2, 2]
    # Groups that A holds out are held out of B, too, though B has a test file; H2O is its publisher's choice.
    assert not formulas(store, "test") & formulas(store, "train") - {(1, 1, 8)}
    with pytest.raises(ValueError, match=r"test file .* needs the name of its source, one of A"):
        run(f"A={data / 'all.xyz'}", "--test", f"C={data / 'held.xyz'}", "--out", data / "out2")


def test_equal_groups_in_two_sources_lie_on_one_side(data):
    ase.io.write(data / "other.xyz", [frame(f, 7 + k) for k, f in enumerate(FORMULAS)], format="extxyz")
    run(f"A={data / 'all.xyz'}", f"B={data / 'other.xyz'}", "--out", data / "out")
    store = Store.open(data / "out")
    sides = [formulas(store, split) for split in ("train", "valid", "test")]
    assert len(set.union(*sides)) == sum(map(len, sides))
    for split in ("train", "valid", "test"):
        assert set(store.source[store.indices(split)].tolist()) == {0, 1}


def test_a_test_file_of_one_source_is_held_out_of_the_other(data):
    ase.io.write(data / "b.xyz", [frame(f, 7) for f in FORMULAS if f != "H2O"], format="extxyz")
    ase.io.write(data / "held.xyz", [frame("H2O", k) for k in range(3)], format="extxyz")
    run(
        f"A={data / 'all.xyz'}",
        f"B={data / 'b.xyz'}",
        "--test",
        f"B={data / 'held.xyz'}",
        "--out",
        data / "out",
    )
    assert (1, 1, 8) not in formulas(Store.open(data / "out"), "train")


def test_files_without_a_name_are_one_source(data, capsys):
    ase.io.write(data / "more.xyz", [frame(f, 5) for f in FORMULAS], format="extxyz")
    run(data / "all.xyz", data / "more.xyz", "--out", data / "mine")
    store = Store.open(data / "mine")
    assert store.header.sources == ("mine",)
    assert "note: 2 files make one source, 'mine'; NAME=FILE" in capsys.readouterr().err
    run(f"A={data / 'all.xyz'}", data / "more.xyz", "--out", data / "two")
    assert Store.open(data / "two").header.sources == ("A", "more")


def test_missing_labels_are_told(data, capsys):
    frames = [frame(f, k) for k, f in enumerate(FORMULAS)]
    del frames[3].calc.results["forces"]
    del frames[5].calc.results["energy"]
    frames[7].pbc, frames[7].cell = (True, True, False), 20 * np.eye(3)
    labels = {**frames[7].calc.results, "stress": np.zeros(6)}
    frames[7].calc = SinglePointCalculator(frames[7], **labels)
    ase.io.write(data / "gaps.traj", frames)
    run(data / "gaps.traj", "--out", data / "out")
    printed = capsys.readouterr().out
    assert "gaps: 1 of 12 structures have no energy" in printed
    assert "gaps: 1 of 12 structures have no forces" in printed
    assert "gaps: 1 structures: stress left out: not periodic in three directions" in printed
    provenance = Store.open(data / "out").header.provenance["gaps"]
    assert provenance["num_without"] == {"energy": 1, "forces": 1}
    assert provenance["notes"] == {"stress left out: not periodic in three directions": 1}


def test_same_file_twice(data):
    with pytest.raises(ValueError, match=r"given more than once.* without --test and --valid, --split"):
        run(data / "all.xyz", "--test", data / "all.xyz", "--out", data / "out")


BAD_FRAMES = {
    "NaN energy": (frame("H2O", 0, energy=float("nan")), "energy holds NaN", "finite_labels"),
    "NaN forces": (frame("H2O", 0, forces=np.full((3, 3), np.nan)), "forces holds NaN", "finite_labels"),
    "unknown element": (frame("XH2", 0), "unknown element with atomic number 0", "element"),
    "overlapping atoms": (frame("H2", 0, positions=np.zeros((2, 3))), r"overlap: 0\.0000 Å", "min_distance"),
    "huge force": (frame("H2", 0, forces=np.full((2, 3), 1e3)), "above the limit of 100 eV/Å", "max_force"),
    "empty": (Atoms(), "the structure is empty", "empty"),
}


@pytest.mark.parametrize("name", BAD_FRAMES)
def test_a_bad_structure_stops_or_is_counted(data, name):
    bad, message, rule = BAD_FRAMES[name]
    frames = [frame(f, k) for k, f in enumerate(FORMULAS)]
    frames.insert(3, bad)
    ase.io.write(data / "bad.traj", frames)
    before = sorted(p.name for p in data.iterdir())
    with pytest.raises(ValueError, match=f"bad.traj, frame 3: .*{message}"):
        run(data / "bad.traj", "--out", data / "out")
    assert sorted(p.name for p in data.iterdir()) == before
    run(data / "bad.traj", "--out", data / "out", "--on-bad", "skip")
    store = Store.open(data / "out")
    assert len(store) == len(FORMULAS)
    provenance = store.header.provenance["bad"]
    assert provenance["rejected"] == {rule: 1}
    assert provenance["rejection_rate"] == pytest.approx(1 / 13)


def test_limits_are_the_users(data):
    ase.io.write(
        data / "a.traj",
        [frame(f, k, forces=np.full((len(Atoms(f)), 3), 90.0)) for k, f in enumerate(FORMULAS)],
    )
    with pytest.raises(ValueError, match="limit of 100"):
        run(data / "a.traj", "--out", data / "out")
    run(data / "a.traj", "--out", data / "out", "--max-force", "200")
    with pytest.raises(ValueError, match="limit is 9 Å"):
        run(data / "a.traj", "--out", data / "out2", "--max-force", "200", "--min-distance", "9")


@pytest.mark.parametrize("content", [b"", b"\x80\x04garbage", b"3\ncomment\nH 0 0 0\n"])
def test_unreadable_file(data, content):
    (data / "broken.xyz").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read .*broken.xyz"):
        run(data / "all.xyz", data / "broken.xyz", "--out", data / "out")
    assert not (data / "out").exists()


def test_missing_file_is_told_first(data):
    with pytest.raises(ValueError, match=r"nowhere.xyz does not exist"):
        run(data / "all.xyz", data / "nowhere.xyz", "--out", data / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--split", "0.8,0.2"), "--split takes three numbers"),
        (("--split", "a,b,c"), "--split takes three numbers"),
        (("--split", "0.8,0.3,0.1"), "summing to 1"),
        (("--group-by", "molecule"), "unknown grouping 'molecule'"),
        (("--max-force", "0"), "max_force must be"),
        (("--energy-key", "E"), "no energy key 'E'"),
    ],
)
def test_refuses_arguments(data, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(data / "all.xyz", "--out", data / "out", *arguments)
    assert not (data / "out").exists()


def test_overwrite_must_be_asked_for(data):
    run(data / "all.xyz", "--out", data / "out")
    with pytest.raises(ValueError, match="exists already"):
        run(data / "all.xyz", "--out", data / "out", "--seed", "1")
    run(data / "all.xyz", "--out", data / "out", "--seed", "1", "--overwrite")
    assert Store.open(data / "out").header.split["seed"] == 1


def test_an_archive_is_unpacked_as_it_is(data):
    run(data / "all.xyz", "--out", data / "out")
    pack_store(data / "out", data / "sample.tar.xz")
    run(data / "sample.tar.xz", "--out", data / "back")
    for file in (data / "out").iterdir():
        assert file.read_bytes() == (data / "back" / file.name).read_bytes()


def test_a_store_can_be_split_anew_and_keeps_its_origin(data):
    run(data / "all.xyz", "--out", data / "out", "--source", "mols")
    run(data / "out", "--out", data / "again", "--split", "0.5,0.25,0.25")
    old, new = Store.open(data / "out"), Store.open(data / "again")
    assert [len(new.indices(s)) for s in ("train", "valid", "test")] == [60, 30, 30]
    assert not formulas(new, "train") & formulas(new, "test")
    assert new.header.provenance["mols"]["files"][0]["origin"] == old.header.provenance["mols"]


@pytest.fixture
def two_stores(data):
    """Stores of one and of two sources, split by a seed that is not the default."""
    run(data / "all.xyz", "--out", data / "one", "--source", "mols", "--seed", "5")
    ase.io.write(data / "rest.xyz", [frame(f, 7) for f in ("C3H8", "SO2", "H2S", "SiH4")], format="extxyz")
    run(f"other={data / 'rest.xyz'}", "--out", data / "two", "--seed", "5")
    pack_store(data / "two", data / "two.tar.xz")
    return data


@pytest.mark.parametrize("extra", [[], ["--level", "PBE"], ["--max-force", "50"], ["--on-bad", "skip"]])
def test_stores_keep_their_split(two_stores, extra):
    run(two_stores / "one", "--out", two_stores / "again", *extra)
    run(two_stores / "one", two_stores / "two.tar.xz", "--out", two_stores / "both", *extra)
    one, two = Store.open(two_stores / "one"), Store.open(two_stores / "two")
    again, both = Store.open(two_stores / "again"), Store.open(two_stores / "both")
    assert np.array_equal(again.split, one.split)
    assert np.array_equal(both.split, np.concatenate([one.split, two.split]))
    assert again.group_names() == one.group_names()
    assert both.header.split["kept"]["one"] == one.header.split
    for explicit in (["--seed", "0"], ["--split", "0.5,0.25,0.25"], ["--group-by", "formula"]):
        run(two_stores / "one", "--out", two_stores / "anew", "--overwrite", *explicit)
        assert not np.array_equal(Store.open(two_stores / "anew").split, one.split)


def test_stores_that_split_a_group_differently_tell_the_way_out(two_stores):
    run(f"B={two_stores / 'all.xyz'}", "--out", two_stores / "three", "--seed", "1")
    with pytest.raises(ValueError, match=r"lies on two sides of the split.*--seed"):
        run(two_stores / "one", two_stores / "three", "--out", two_stores / "out")
    run(two_stores / "one", two_stores / "three", "--out", two_stores / "out", "--seed", "1")
    store = Store.open(two_stores / "out")
    assert not formulas(store, "train") & formulas(store, "test")


def test_files_beside_a_store_follow_its_groups(two_stores):
    ase.io.write(two_stores / "new.xyz", [frame(f, 9) for f in FORMULAS], format="extxyz")
    run(two_stores / "one", two_stores / "new.xyz", "--out", two_stores / "out")
    one, out = Store.open(two_stores / "one"), Store.open(two_stores / "out")
    assert np.array_equal(out.split[:120], one.split)
    assert not formulas(out, "train") & formulas(out, "test")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--max-force", "1e-3"], r"two.tar.xz, frame 0: the largest force"),
        (["--min-distance", "9"], "limit is 9 Å"),
        (
            ["--energy-key", "E"],
            "two.tar.xz is a store, whose labels have no names of their own; leave --energy-key",
        ),
        (["--format", "ase"], "cannot read"),
        (["--group-by", "info:run"], "has no key 'run' to group by"),
    ],
)
def test_an_archive_heeds_every_option(two_stores, extra, message):
    with pytest.raises(ValueError, match=message):
        run(two_stores / "two.tar.xz", "--out", two_stores / "out", *extra)
    assert not (two_stores / "out").exists()


def test_an_archive_heeds_the_seed(two_stores):
    run(two_stores / "two.tar.xz", "--out", two_stores / "out", "--seed", "1")
    assert Store.open(two_stores / "out").header.split["seed"] == 1


def test_a_store_without_names_is_read_and_warned_of(two_stores, capsys):
    run(two_stores / "one", two_stores / "two", "--out", two_stores / "both")
    header = json.loads((two_stores / "both" / "header.json").read_text())
    del header["sha256"]["groups.json"]
    (two_stores / "both" / "header.json").write_text(json.dumps(header))
    (two_stores / "both" / "groups.json").unlink()
    pack_store(two_stores / "both", two_stores / "old.tar.xz")
    run(two_stores / "old.tar.xz", "--out", two_stores / "back")
    assert Store.open(two_stores / "back").group_names() is None
    assert capsys.readouterr().err == ""
    run(two_stores / "old.tar.xz", "--out", two_stores / "anew", "--seed", "1")
    assert "made before names of groups were stored" in capsys.readouterr().err
    back, anew = Store.open(two_stores / "back"), Store.open(two_stores / "anew")
    assert len(np.unique(back.group)) == len(np.unique(anew.group))


def test_header_is_plain_json_with_units(data):
    run(data / "all.xyz", "--out", data / "out")
    header = json.loads(Path(data / "out" / "header.json").read_text())
    assert header["format"] == "megagnn-store"
    assert header["units"]["energy"] == "eV"
    assert header["split"]["group_by"] == "auto"
