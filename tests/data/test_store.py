"""The packed store: what is written is read, damage is told, and nothing is left half written."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest

from megagnn.data import keys
from megagnn.data.split import split_groups
from megagnn.data.store import Store, write_store
from megagnn.data.store_format import ARRAYS
from megagnn.data.store_writer import _Writer
from tests.data.conftest import make_structure


def everything_under(path):
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


def test_round_trip(structures, make_store):
    store = Store.open(make_store(structures))
    assert len(store) == len(structures)
    assert store.header.sources == ("A", "B")
    assert store.header.levels == ("toy", "other")
    assert store.header.provenance == {"A": {"engine": "toy"}}
    for index, s in enumerate(structures):
        back = store.structure(index)
        assert np.array_equal(back[keys.ATOMIC_NUMBERS], s.atomic_numbers)
        assert np.array_equal(back[keys.POSITIONS], s.positions.astype(np.float32))
        assert np.array_equal(back[keys.CELL], s.cell.astype(np.float32))
        assert np.array_equal(back[keys.PBC], s.pbc)
        assert back[keys.PBC].dtype == back[keys.FIXED].dtype == np.bool_
        assert back.get(keys.ENERGY) == s.energy  # float64 on disk: exact
        for key, label in ((keys.FORCES, s.forces), (keys.STRESS, s.stress)):
            assert (key in back) == (label is not None)
            if label is not None:
                assert np.array_equal(back[key], label.astype(np.float32))
        assert np.array_equal(back[keys.FIXED], np.zeros(s.num_atoms, bool) if s.fixed is None else s.fixed)
        assert store.header.sources[back[keys.SOURCE]] == s.source
        assert store.header.levels[back[keys.LEVEL]] == s.level
        assert store.num_atoms[index] == s.num_atoms


def test_splits_and_groups(structures, make_store):
    store = Store.open(make_store(structures))
    parts = [store.indices(split) for split in ("train", "valid", "test")]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(store)))
    for group in np.unique(store.group):
        members = np.flatnonzero(store.group == group)
        assert len(np.unique(store.split[members])) == 1
        assert {structures[m].group for m in members} == {store.group_names()[group]}
    with pytest.raises(ValueError, match="unknown split 'dev'; known are train, valid, test"):
        store.indices("dev")


def test_structure_out_of_range(structures, make_store):
    store = Store.open(make_store(structures))
    for index in (-1, len(store)):
        with pytest.raises(IndexError):
            store.structure(index)


def test_a_worker_receives_the_path_and_not_the_data(structures, make_store):
    store = Store.open(make_store(structures))
    sent = pickle.dumps(store)
    assert len(sent) < 1000
    assert np.array_equal(pickle.loads(sent).arrays["positions"], store.arrays["positions"])


def test_same_structures_give_the_same_bytes(structures, make_store):
    first, second = make_store(structures, "one"), make_store(structures, "two")
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes()


def test_files_are_ordinary_npy(structures, make_store):
    path = make_store(structures)
    for name, (dtype, trailing, _) in ARRAYS.items():
        array = np.load(path / f"{name}.npy")
        assert array.dtype == np.dtype(dtype)
        assert array.shape[1:] == trailing


@pytest.mark.parametrize(
    "missing", ["a failing generator", "a bad structure", "no structure", "splits", "leak"]
)
def test_nothing_remains_after_an_error(tmp_path, structures, missing):
    splits = np.zeros(len(structures), dtype=np.uint8)

    def failing():
        yield structures[0]
        raise RuntimeError("engine died")

    cases = {
        "a failing generator": (failing(), splits, RuntimeError, "engine died"),
        "a bad structure": (
            [structures[0], replace(structures[1], energy=np.nan)],
            splits,
            ValueError,
            "structure 1",
        ),
        "no structure": ([], splits[:0], ValueError, "no structure to write"),
        "splits": (structures, splits[:-1], ValueError, "splits must have shape"),
        "leak": (
            structures,
            np.arange(len(structures)) % 2,
            ValueError,
            "group 'm0', met in source 'A', lies on two sides",
        ),
    }
    given, chosen, kind, message = cases[missing]
    with pytest.raises(kind, match=message):
        write_store(tmp_path / "deep" / "store", given, splits=chosen)
    assert everything_under(tmp_path) in ([], ["deep"])


def test_refuses_splits_out_of_range(tmp_path, structures):
    with pytest.raises(ValueError, match="splits must be 0, 1 or 2"):
        write_store(tmp_path / "s", structures, splits=np.full(len(structures), 3))


def test_existing_places_are_safe(tmp_path, structures, make_store):
    path = make_store(structures)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(ValueError, match="exists already"):
        write_store(path, structures, splits=split_groups)
    with pytest.raises(ValueError, match="no structure"):
        write_store(path, [], splits=split_groups, overwrite=True)
    assert before == {file.name: file.read_bytes() for file in path.iterdir()}
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="not a store"):
        write_store(tmp_path / "home", structures, splits=split_groups, overwrite=True)
    write_store(path, structures[:40], splits=split_groups, overwrite=True)
    assert len(Store.open(path)) == 40
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "store"]


class TestDamage:
    @pytest.fixture
    def path(self, structures, make_store):
        return make_store(structures)

    def test_not_a_directory(self, path):
        with pytest.raises(ValueError, match="is not a directory"):
            Store.open(path / "header.json")
        with pytest.raises(ValueError, match="is not a directory"):
            Store.open(path / "nowhere")

    def test_not_a_store(self, tmp_path):
        with pytest.raises(ValueError, match="is not a store"):
            Store.open(tmp_path)

    @pytest.mark.parametrize(
        "text", ["", "[]", "{}", '{"format": "megagnn-store", "version": 1}', "\x00garbage"]
    )
    def test_bad_header(self, path, text):
        (path / "header.json").write_text(text)
        with pytest.raises(ValueError, match=r"header.json is (not the header|damaged)"):
            Store.open(path)

    @pytest.mark.parametrize(("key", "value"), [("format", "other"), ("version", 2)])
    def test_other_format_or_version(self, path, key, value):
        header = json.loads((path / "header.json").read_text())
        (path / "header.json").write_text(json.dumps({**header, key: value}))
        with pytest.raises(ValueError, match=key):
            Store.open(path)

    @pytest.mark.parametrize("name", sorted(ARRAYS))
    def test_missing_array(self, path, name):
        (path / f"{name}.npy").unlink()
        with pytest.raises(ValueError, match=f"lacks {name}.npy"):
            Store.open(path)

    @pytest.mark.parametrize("name", sorted(ARRAYS))
    @pytest.mark.parametrize("left", ["nothing", "half", "all but one byte"])
    def test_truncated_array(self, path, name, left):
        file = path / f"{name}.npy"
        data = file.read_bytes()
        file.write_bytes(
            data[: {"nothing": 0, "half": len(data) // 2, "all but one byte": len(data) - 1}[left]]
        )
        with pytest.raises(ValueError, match=f"{name}.npy is truncated or damaged"):
            Store.open(path)

    def test_foreign_array(self, path):
        np.save(path / "energy.npy", np.zeros(3))
        with pytest.raises(ValueError, match=r"energy.npy holds float64 \(3,\)"):
            Store.open(path)

    def test_changed_byte_is_found_by_its_checksum(self, path):
        file = path / "forces.npy"
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)
        store = Store.open(path)
        with pytest.raises(ValueError, match=r"forces.npy does not match its checksum"):
            store.verify()

    @pytest.mark.parametrize("damage", ["missing", "truncated", "too short"])
    def test_damaged_names_of_groups(self, path, damage):
        file = path / "groups.json"
        if damage == "missing":
            file.unlink()
        else:
            file.write_text({"truncated": file.read_text()[:-4], "too short": '["m0"]'}[damage])
        for use in (Store.open(path).verify, Store.open(path).group_names):
            with pytest.raises(ValueError, match=r"groups.json (is missing or damaged|does not name every)"):
                use()

    def test_sound_store_passes(self, path):
        Store.open(path).verify()


def test_single_structure(tmp_path):
    write_store(tmp_path / "s", [make_structure(1)], splits=np.zeros(1, dtype=np.uint8))
    assert Store.open(tmp_path / "s").structure(0)[keys.POSITIONS].shape == (1, 3)


def test_more_files_and_kinds_than_short_integers_count(tmp_path):
    """Each structure of a file and a kind of its own; the writer is told the numbers before by hand."""
    with _Writer(tmp_path) as writer:
        for table in (writer.names["config_type"], writer.names["file"]):
            table.update({str(k): k for k in range(40_000)})
        writer.add(replace(make_structure(2), file="last", config_type="odd"))
        writer.finish(np.zeros(1, np.uint8), {}, {}, ())
    for name in ("file", "config_type"):
        assert np.load(tmp_path / f"{name}.npy").tolist() == [40_000]


def test_too_many_sources_are_refused(tmp_path):
    with _Writer(tmp_path) as writer:
        writer.names["source"].update({str(k): k for k in range(32_768)})
        with pytest.raises(ValueError, match="more than 32767 sources in one store"):
            writer.add(make_structure(2))
