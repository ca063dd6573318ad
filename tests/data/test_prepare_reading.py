"""What `megagnn prepare` makes of users' files: flags of reading, what is skipped, counted and told."""

import json

import numpy as np
import pytest

from megagnn.cli import main
from megagnn.data import keys
from megagnn.data.formats import ReadOptions
from megagnn.data.preparation import Input, Preparation
from megagnn.data.store import Store, write_store
from tests.data.conftest import make_structure
from tests.data.formats.frames import STRESS, VOLUME, crystal, text_of, write
from tools.pack_store import pack_store

ONE_SPLIT = ("--split", "1,0,0", "--group-by", "frame")


def prepare(*arguments):
    return main(["prepare", *map(str, arguments)])


@pytest.fixture
def refuse(capsys, tmp_path):
    """Run a command that must fail with exit code 2, a message on stderr, and nothing written."""

    def run(*arguments):
        before = sorted(tmp_path.rglob("*"))
        assert prepare(*arguments, "--out", tmp_path / "refused") == 2
        assert sorted(tmp_path.rglob("*")) == before
        return capsys.readouterr().err

    return run


def record(store):
    (provenance,) = Store.open(store).header.provenance.values()
    return provenance


def test_virials_units_and_species_by_flags(tmp_path, capsys):
    virial = text_of(-VOLUME * STRESS / 27.211386)
    frames = [crystal(k, V=virial, species=("A", "B", "C")) for k in range(4)]
    path = write(tmp_path / "a.xyz", *frames)
    flags = ("--units", "energy=Ha,forces=Ha/bohr", "--species", "A=Cu,B=Pt,C=Ni", "--virial-key", "V")
    keyed = ("--energy-key", "energy", "--forces-key", "forces")
    assert prepare(path, *flags, *keyed, *ONE_SPLIT, "--out", tmp_path / "s") == 0
    store = Store.open(tmp_path / "s")
    assert np.allclose(store.structure(0)[keys.STRESS], STRESS, rtol=1e-5)
    assert store.structure(1)[keys.ENERGY] == pytest.approx(-9.9 * 27.211386, rel=1e-6)
    assert record(tmp_path / "s")["units"] == {"energy": "Ha", "forces": "Ha/bohr"}
    assert record(tmp_path / "s")["species"] == {"A": "Cu", "B": "Pt", "C": "Ni"}
    assert "a: 4 structures: stress made from the virial, as -virial/V" in capsys.readouterr().out


def test_virial_given_as_stress_is_refused(tmp_path, refuse):
    path = write(tmp_path / "a.xyz", crystal(virial=text_of(STRESS)))
    assert "--virial-key virial" in refuse(path, "--stress-key", "virial")
    assert "unknown unit 'foe'" in refuse(path, "--units", "energy=foe")
    assert "'Xx' is not an element" in refuse(path, "--type-map", "1=Xx")
    assert "ASE reads no format" in refuse(path, "--ase-format", "extxzy")


def test_flags_that_would_do_nothing_to_a_store(tmp_path, refuse):
    path = write(tmp_path / "a.xyz", crystal(0), crystal(1))
    assert prepare(path, *ONE_SPLIT, "--out", tmp_path / "s") == 0
    assert "--units would do nothing: stores have units" in refuse(tmp_path / "s", "--units", "energy=Ha")
    assert prepare(tmp_path / "s", path, "--units", "energy=Ha", *ONE_SPLIT, "--out", tmp_path / "both") == 0
    energies = Store.open(tmp_path / "both").arrays["energy"]
    assert energies[2:] == pytest.approx(27.211386 * energies[:2], rel=1e-6)


def test_unconverged_structures_are_left_out_and_counted(tmp_path, capsys):
    frames = [crystal(k, converged="F" if k == 1 else "T") for k in range(4)]
    path = write(tmp_path / "a.xyz", *frames)
    assert prepare(path, *ONE_SPLIT, "--out", tmp_path / "s") == 0
    assert len(Store.open(tmp_path / "s")) == 3
    assert record(tmp_path / "s")["rejected"] == {"unconverged": 1}
    assert "a: 1 of 4 structures left out: unconverged (--keep-unconverged keeps" in capsys.readouterr().out
    assert prepare(path, *ONE_SPLIT, "--keep-unconverged", "--out", tmp_path / "all") == 0
    assert len(Store.open(tmp_path / "all")) == 4
    assert record(tmp_path / "all")["rejected"] == {}


def test_an_archive_of_made_structures_says_nothing_of_what_was_read(tmp_path, capsys):
    store = tmp_path / "made"
    rejected = {
        "num_rejected": 2,
        "rejected": {"not_converged": 2},
    }  # as `megagnn label` counts, without num_read
    write_store(
        store, [make_structure(source="A")], splits=np.zeros(1, dtype=np.uint8), provenance={"A": rejected}
    )
    pack_store(store, tmp_path / "made.tar.xz")
    assert prepare(tmp_path / "made.tar.xz", "--out", tmp_path / "s") == 0
    assert "left out" not in capsys.readouterr().out


def test_skip_covers_what_cannot_be_read(tmp_path, capsys, refuse):
    good = write(tmp_path / "good.xyz", *(crystal(k) for k in range(4)))
    cut = write(tmp_path / "cut.xyz", crystal(4), crystal(5)[:-200])
    bare = write(tmp_path / "bare.xyz", crystal(6, energy=None).replace("forces", "f"), crystal(7))
    junk = write(tmp_path / "junk.xyz", "no structure\n")
    files = (good, cut, bare, junk)
    assert "cut.xyz, frame 1" in refuse(good, cut, *ONE_SPLIT)
    assert "bare.xyz: no energy or forces found" in refuse(good, bare, *ONE_SPLIT)
    assert prepare(*files, *ONE_SPLIT, "--on-bad", "skip", "--out", tmp_path / "s") == 0
    said = capsys.readouterr()
    assert len(Store.open(tmp_path / "s")) == 6
    assert record(tmp_path / "s")["rejected"] == {"unreadable": 2, "unlabelled": 1}
    assert record(tmp_path / "s")["num_read"] == 9
    assert "s: 2 of 9 structures left out: unreadable" in said.out
    assert "cut.xyz: 1 frame(s) left out: cannot read" in said.out
    assert any("cut.xyz: 1 frame(s)" in line for line in Store.open(tmp_path / "s").header.warnings)
    assert "junk.xyz: nothing could be read of it: cannot read" in said.err
    alone = refuse(junk, *ONE_SPLIT, "--on-bad", "skip")
    assert "nothing could be read of it" in alone
    assert "no structure to write" in alone
    far = write(tmp_path / "far.xyz", crystal(0))
    apart = (good, far, *ONE_SPLIT, "--on-bad", "skip", "--energy-key", "E", "--forces-key", "none")
    assert "far.xyz: nothing is kept of it; every structure broke a rule" in refuse(*apart)


def test_frames_are_numbered_as_in_the_file_and_a_lost_rest_is_told(tmp_path, capsys):
    frames = [crystal(k) for k in range(6)]
    frames[1] = "".join(frames[1].splitlines(keepends=True)[:-1])
    near = frames[3].splitlines(keepends=True)
    frames[3] = "".join([*near[:-1], near[-2]])  # two atoms at one place
    path = write(tmp_path / "a.xyz", *frames, "x\n3\nplain\n")
    assert prepare(path, *ONE_SPLIT, "--on-bad", "skip", "--out", tmp_path / "s") == 0
    capsys.readouterr()
    assert record(tmp_path / "s")["rejected"] == {"unreadable": 2, "min_distance": 1}
    assert "a.xyz: 2 frame(s) left out: cannot read" in (
        said := Store.open(tmp_path / "s").header.warnings[0]
    )
    assert said.endswith("; nothing after frame 5 was read")


def test_energies_that_a_converter_made_up_are_refused(tmp_path, refuse):
    path = write(tmp_path / "dump.xyz", *(crystal(k, energy=0.0) for k in range(4)))
    said = refuse(path, *ONE_SPLIT)
    assert "all 4 energies are 0 while the forces are not" in said
    assert prepare(path, *ONE_SPLIT, "--energy-key", "none", "--out", tmp_path / "s") == 0
    assert np.isnan(Store.open(tmp_path / "s").arrays["energy"]).all()
    one_zero = write(tmp_path / "rel.xyz", *(crystal(k, energy=0.1 * k) for k in range(4)))
    assert prepare(one_zero, *ONE_SPLIT, "--out", tmp_path / "rel") == 0


def test_stores_of_equally_named_files_train_together(tmp_path):
    for folder, seed in (("1", 0), ("2", 100)):
        path = write(tmp_path / folder / "data.xyz", *(crystal(seed + k) for k in range(12)))
        assert prepare(path, "--group-by", "frame", "--seed", folder, "--out", tmp_path / folder / "s") == 0
    one, two = (set(Store.open(tmp_path / f / "s").group_names()) for f in "12")
    assert not one & two
    assert len(one) == len(two) == 12


def test_files_of_one_name_are_told_apart_without_a_look_at_all_files_per_structure(tmp_path):
    class Counted(list):
        num_looks = 0

        def __iter__(self):
            self.num_looks += 1
            return super().__iter__()

    num_looks = []
    for num_frames in (1, 9):
        paths = [tmp_path / str(num_frames) / name for name in ("1/a.xyz", "2/a.xyz", "b.xyz")]
        inputs = Counted(
            Input(write(path, *(crystal(10 * k + n) for n in range(num_frames))))
            for k, path in enumerate(paths)
        )
        out = tmp_path / f"s{num_frames}"
        Preparation(inputs, ReadOptions(source="s", group_by="frame"), fractions=(1, 0, 0)).write(out)
        names = [str(paths[0]), str(paths[1]), "b.xyz"]
        assert list(dict.fromkeys(Store.open(out).files())) == names
        num_looks.append(inputs.num_looks)
    assert num_looks[0] == num_looks[1]


def test_far_positions_keep_their_distances(tmp_path):
    text = crystal(0)
    far = text.replace("Cu 0", "Cu 39700").replace("Cu -0", "Cu -40400")  # whole cells of 4 Å away
    assert far != text
    for name, frame in (("near", text), ("far", far)):
        assert prepare(write(tmp_path / f"{name}.xyz", frame), *ONE_SPLIT, "--out", tmp_path / name) == 0
    near, moved = (Store.open(tmp_path / n).arrays["positions"] for n in ("near", "far"))
    difference = (moved - near) / np.diag([4.0, 4.2, 4.4]).diagonal()
    assert np.abs(difference - np.rint(difference)).max() < 1e-6


def test_json_of_pymatgen_with_a_scheme_of_units(tmp_path):
    site = {"species": [{"element": "Cu", "occu": 1}], "abc": [0, 0, 0]}
    entry = {
        "structure": {"lattice": {"matrix": (3 * np.eye(3)).tolist()}, "sites": [site]},
        "energy": -3.5,
        "forces": [[0, 0, 0]],
        "stress": (5 * np.eye(3)).tolist(),
    }
    (tmp_path / "a.json").write_text(json.dumps([entry]))
    arguments = (tmp_path / "a.json", "--units", "stress=-GPa", *ONE_SPLIT, "--out", tmp_path / "s")
    assert prepare(*arguments) == 0
    stress = Store.open(tmp_path / "s").structure(0)[keys.STRESS]
    assert np.allclose(stress, -5 / 160.21766 * np.eye(3), rtol=1e-5)
