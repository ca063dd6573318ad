"""LMDB of pickled graphs (both layouts of torch_geometric) and of rows of ASE; what is refused in them.

The files of tests/data/files are written by tools/sample_files/lmdb_files.py with the tools of their formats.
"""

import io
import json
import os
import pickle
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.build import add_adsorbate, fcc111, molecule
from ase.calculators.emt import EMT

from megagnn.data.foreign import RefusedError, pickles
from megagnn.data.formats import ReadOptions, detect_format, read_structures

lmdb = pytest.importorskip("lmdb", reason="lmdb is not installed")
FILES = Path(__file__).parents[1] / "files"


def slabs():
    """As the files have them: frames of CO on copper, labelled by ASE's EMT."""
    rng = np.random.default_rng(0)
    for _ in range(3):
        atoms = fcc111("Cu", (1, 1, 3), vacuum=6)
        add_adsorbate(atoms, molecule("CO"), 1.9, "fcc", mol_index=1)
        atoms.pbc = True
        atoms.positions += rng.normal(0, 0.05, atoms.positions.shape)
        atoms.calc = EMT()
        yield atoms


@pytest.mark.parametrize(
    ("name", "rows", "group", "level"),
    [
        ("oc20.lmdb", [0, 1, 2], "OC20 1331084", "unknown"),
        ("oc22.lmdb", [0, 1, 2], "OC22 1331084", "PBE+U"),
        ("slabs.aselmdb", [0, 2], "COCu3", "unknown"),
    ],
)
def test_frames_are_those_that_were_written(name, rows, group, level):
    assert detect_format(FILES / name) == "lmdb"
    found = list(read_structures(FILES / name))
    written = list(slabs())
    assert len(found) == len(rows)
    for structure, row in zip(found, rows, strict=True):
        atoms = written[row]
        assert structure.atomic_numbers.tolist() == atoms.numbers.tolist()
        assert structure.positions == pytest.approx(atoms.positions, abs=1e-5)
        assert structure.cell == pytest.approx(atoms.cell.array, abs=1e-5)
        assert structure.pbc.all()
        assert structure.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
        assert structure.forces == pytest.approx(atoms.get_forces(), abs=1e-5)  # of fixed atoms, too
        assert structure.fixed.tolist() == [True, True, False, False, False]
        assert np.abs(structure.forces[:2]).max() > 0.01
        assert (structure.group, structure.level) == (group, level)


def test_stress_keys_and_groups_of_rows():
    (first, _) = read_structures(FILES / "slabs.aselmdb", ReadOptions(group_by="info:sid"))
    assert first.stress == pytest.approx(
        np.array([[0.01, 0.003, 0.002], [0.003, 0.02, 0.001], [0.002, 0.001, 0.03]])
    )
    assert first.group == "slab0"
    own = ReadOptions(energy_key="REF_energy", forces_key="none", stress_key="none")
    assert [s.energy for s in read_structures(FILES / "slabs.aselmdb", own)] == [-1.5, -1.5]
    with pytest.raises(ValueError, match=r"no energy key 'E'; keys there are .*REF_energy"):
        list(
            read_structures(
                FILES / "slabs.aselmdb", ReadOptions(energy_key="E", forces_key="forces", stress_key="none")
            )
        )


def test_another_usual_name_of_the_energy_leaves_the_forces(tmp_path):
    row = {**ROW, "energy": -1.0, "free_energy": -1.5, "forces": [[0.5, 0, 0]]}
    path = with_record(tmp_path, "slabs.aselmdb", b"1", packed(row))
    first = next(read_structures(path, ReadOptions(energy_key="free_energy")))
    assert (first.energy, first.forces.tolist()) == (-1.5, [[0.5, 0, 0]])


def with_record(tmp_path, name, key, content):
    path = Path(shutil.copy(FILES / name, tmp_path / name))
    environment = lmdb.open(str(path), subdir=False, map_size=1 << 24, lock=False)
    with environment, environment.begin(write=True) as transaction:
        transaction.put(key, content)
    return path


class Evil:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def test_total_energies_of_oc20(tmp_path):
    path = Path(shutil.copy(FILES / "oc20.lmdb", tmp_path))
    relative = next(read_structures(path))
    assert "relative to slab and gas" in relative.notes[0]
    total = ReadOptions(energy_key="total_energy", forces_key="forces")
    with pytest.raises(ValueError, match=r"total_energy needs oc20_ref.pkl beside the file; fetch it"):
        list(read_structures(path, total))
    (tmp_path / "oc20_ref.pkl").write_bytes(pickle.dumps({"random1331084": -100.0}))
    found = next(read_structures(path, total))
    assert found.energy == pytest.approx(relative.energy - 100)
    assert (found.level, found.notes) == ("RPBE", ())
    assert np.array_equal(found.forces, relative.forces)
    (tmp_path / "oc20_ref.pkl").write_bytes(pickle.dumps({"random1": np.float64(-100.0)}))
    with pytest.raises(
        ValueError, match=r"record 0: oc20_ref.pkl .* has no random1331084, .*; fetch the one"
    ):
        list(read_structures(path, total))
    (tmp_path / "oc20_ref.pkl").write_bytes(pickle.dumps(Evil(os.unlink, str(path))))
    with pytest.raises(ValueError, match=r"the pickle names posix.unlink"):
        list(read_structures(path, total))
    assert path.exists()


@pytest.mark.parametrize("function", [os.system, eval, np.load, os.unlink])
def test_no_pickle_is_run(function, tmp_path):
    marked = tmp_path / "marked"
    marked.touch()
    text = {os.system: f"rm {marked}", eval: f"__import__('os').unlink('{marked}')"}.get(
        function, str(marked)
    )
    path = with_record(tmp_path, "oc22.lmdb", b"1", pickle.dumps(Evil(function, text)))
    name = f"{function.__module__}.{function.__name__}"
    with pytest.raises(ValueError, match=rf"record 1: the pickle names .*{function.__name__}, .* not run"):
        list(read_structures(path))
    told = []
    assert len(list(read_structures(path, ReadOptions(on_unreadable=told.append)))) == 2
    assert len(told) == 1, name
    assert marked.exists()


ARRAYS = [
    np.arange(6.0).reshape(2, 3),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.arange(3, dtype=">i4"),
    np.array([True, False]),
    np.array(["Cu", "O"]),
    np.zeros((2, 0), dtype=np.float32),
    np.float32(1.5),
    np.array(2.5),
]


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_arrays_and_tensors_are_those_that_were_pickled(protocol):
    tensors = [
        torch.arange(12.0).reshape(3, 4)[1:, ::2],
        torch.ones(2, 3).T,
        torch.zeros(2, 0),
        torch.tensor(3),
    ]
    found = pickles.load(pickle.dumps(dict(enumerate(ARRAYS + tensors)), protocol))
    for wanted, got in zip(ARRAYS + [tensor.numpy() for tensor in tensors], found.values(), strict=True):
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        assert np.array_equal(got, wanted)


def forged(name, state=None):
    """A `numpy.dtype` of any name, with a state that NumPy itself would not give it."""
    return Evil(np.dtype, name, False, True) if state is None else EvilState((name, False, True), state)


class EvilState(Evil):
    def __init__(self, arguments, state):
        self.call = (np.dtype, arguments, state)


class OfArray(Evil):
    """An array of a forged type, whose bytes would be taken for pointers."""

    def __init__(self, kind, content):
        self.call = (np.zeros(0).__reduce__()[0], (np.ndarray, (0,), b"b"), (1, (1,), kind, False, content))


def of_tensor(storage, offset, size, stride):
    return Evil(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, None)


def storage(kind, count):
    """The bytes of a storage of eight numbers, of a type that the pickle brings along."""

    class WithStorage(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", kind, "0", "cpu", count) if value is WithStorage else None

    file = io.BytesIO()
    for part in (pickles.MAGIC, 1001, {}, WithStorage, ["0"]):
        WithStorage(file, 2).dump(part)
    content = file.getvalue() + count.to_bytes(8, "little") + np.arange(8.0, dtype="<f4").tobytes()
    return Evil(torch.storage._load_from_bytes, content)


def changed_function():
    name = b"ctorch._utils\n_rebuild_tensor_v2\n"
    return b"\x80\x02" + name + pickle.dumps((None, {"__defaults__": (1, 2)}), 2)[2:-1] + b"b."


POINTER = (0x4141414141).to_bytes(8, "little")
NO_FLAGS = (3, "|", None, None, None, -1, -1, 0)
FIELDS = (3, "|", None, ("a",), {"a": (np.dtype("f8"), 0)}, 8, 1, 16)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (OfArray(forged("O", NO_FLAGS), POINTER), "an array of type O, which is neither numbers nor text"),
        (OfArray(forged("V8", FIELDS), POINTER), "an array of type V8"),
        (OfArray(forged("f8", FIELDS), POINTER), "an array of fields"),
        (OfArray("f8", POINTER), "an array that is not of a type and bytes"),
        (OfArray(forged("f8"), 16), "an array that is not of a type and bytes"),
        (Evil(type(np.float64(0)).__reduce__(np.float64(0))[0], forged("O"), POINTER), "an array of type O"),
        (
            of_tensor(Evil(np.zeros(0).__reduce__()[0], np.ndarray, (9, 0), b"b"), 0, (9,), (1,)),
            "without a stor",
        ),
        (of_tensor(storage(torch.FloatStorage, 8), 0, (9,), (1,)), r"shape \(9,\) in a storage of 8"),
        (of_tensor(storage(torch.FloatStorage, 8), 4, (2, 2), (4, 1)), "ends beyond its storage of 8"),
        (of_tensor(storage(torch.FloatStorage, 8), 4, (2,), (-4,)), r"strides \(-4,\)"),
        (of_tensor(storage(torch.FloatStorage, 8), 0, (2.0,), (1,)), r"shape \(2.0,\)"),
        (of_tensor(storage(torch.FloatStorage, 9), 0, (2,), (1,)), "a tensor of 9 numbers, of which 8"),
        (of_tensor(storage(np.dtype("f4"), 8), 0, (2,), (1,)), "which is no type of numbers"),
        (of_tensor(storage("f4,O", 1), 0, (1,), (1,)), "a tensor of f4,O, which is no type of numbers"),
    ],
)
def test_no_pickle_reaches_memory(value, said):
    with pytest.raises(RefusedError, match=said):
        pickles.load(pickle.dumps(value, 4))


def test_no_pickle_changes_a_function(tmp_path):
    with pytest.raises(RefusedError, match="the pickle changes a function"):
        pickles.load(changed_function())
    path = with_record(tmp_path, "oc22.lmdb", b"1", changed_function())
    told = []
    assert len(list(read_structures(path, ReadOptions(on_unreadable=told.append)))) == 2
    assert "record 1: the pickle changes a function" in str(told[0])


def test_objects_in_place_of_arrays_are_refused(tmp_path):
    with_objects = pickle.dumps({"pos": [[{}]], "atomic_numbers": [1], "cell": np.eye(3)})
    path = with_record(tmp_path, "oc22.lmdb", b"1", with_objects)
    with pytest.raises(ValueError, match=r"record 1: an array of type object, .*; leave it out"):
        list(read_structures(path))


ROW = {"numbers": [1], "positions": [[0, 0, 0]], "cell": np.zeros((3, 3)).tolist(), "pbc": [0, 0, 0]}


def packed(value):
    return zlib.compress(json.dumps(value).encode())


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("oc22.lmdb", pickle.dumps({"pos": 1}), "record 1: a graph has pos and atomic_numbers, got pos"),
        ("oc22.lmdb", b"\x80\x05", "record 1: pickle data was truncated|Ran out of input"),
        ("oc22.lmdb", pickle.dumps(7), "a graph has pos and atomic_numbers, got int"),
        ("slabs.aselmdb", packed({"positions": []}), "row 1: KeyError 'numbers'"),
        ("slabs.aselmdb", packed(ROW)[:-5], "packed text that does not end"),
        ("slabs.aselmdb", zlib.compress(b"{"), "row 1: JSONDecodeError"),
        ("slabs.aselmdb", packed({**ROW, "numbers": {"__ndarray__": [[1], "O", [1]]}}), "array of type O"),
        (
            "slabs.aselmdb",
            packed({**ROW, "energy": -1.0, "forces": [[0, 0]]}),
            r"must be \(1, 3\).* got \(1, 2\)",
        ),
        ("slabs.aselmdb", packed({**ROW, "numbers": [1.5], "energy": 1}), "must be whole numbers up to 118"),
        ("slabs.aselmdb", packed(ROW), "no energy or forces found; keys there are none"),
    ],
)
def test_a_broken_record_is_named(name, content, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        list(read_structures(with_record(tmp_path, name, b"1", content)))


def test_other_and_truncated_files_are_refused(tmp_path):
    environment = lmdb.open(str(tmp_path / "other.lmdb"), subdir=False)
    with environment, environment.begin(write=True) as transaction:
        transaction.put(b"key", b"value")
    with pytest.raises(ValueError, match=r"neither rows of ASE .* its first keys are \[b'key'\]"):
        list(read_structures(tmp_path / "other.lmdb"))
    path = Path(shutil.copy(FILES / "oc22.lmdb", tmp_path))
    path.write_bytes(path.read_bytes()[:8192])
    with pytest.raises(ValueError, match=r"cannot read .*oc22.lmdb: .*is the file whole\?"):
        list(read_structures(path))


@pytest.mark.parametrize("many", [4, 10**18])
@pytest.mark.parametrize(
    ("name", "key", "written", "said", "left"),
    [
        ("oc20.lmdb", b"length", pickle.dumps, "record 3: there is none, though the file has {}", 3),
        ("slabs.aselmdb", b"nextid", lambda n: packed(n + 1), "row 4: .* rows are numbered up to {}", 2),
    ],
)
def test_a_record_that_is_not_there_is_told_once(name, key, written, said, left, many, tmp_path):
    path = with_record(tmp_path, name, key, written(many))
    with pytest.raises(ValueError, match=said.format(many)):
        list(read_structures(path))
    told = []
    assert len(list(read_structures(path, ReadOptions(on_unreadable=told.append)))) == left
    assert len(told) == 1


def test_a_record_lost_in_the_middle_costs_itself(tmp_path):
    path = with_record(tmp_path, "oc20.lmdb", b"3", pickle.dumps({}))
    with lmdb.open(str(path), subdir=False, lock=False) as environment, environment.begin(write=True) as left:
        left.put(b"length", pickle.dumps(4))
        left.delete(b"1")
        left.delete(b"3")
    told = []
    assert len(list(read_structures(path, ReadOptions(on_unreadable=told.append)))) == 2
    assert ["record 1: there is none" in str(told[0]), "record 3" in str(told[1])] == [True, True]


@pytest.mark.parametrize(("key", "content"), [(b"length", pickle.dumps(0)), (b"nextid", zlib.compress(b"1"))])
def test_an_empty_file_is_told(key, content, tmp_path):
    environment = lmdb.open(str(tmp_path / "none.lmdb"), subdir=False)
    with environment, environment.begin(write=True) as transaction:
        transaction.put(key, content)
    with pytest.raises(
        ValueError, match=r"none.lmdb holds no structures; check that its writer came to its end"
    ):
        list(read_structures(tmp_path / "none.lmdb"))


def test_a_file_of_fairchems_own_script():
    """`preprocess_ef` of fairchem-core 1.10, beside the archive that it was made of; it wraps positions."""
    found = list(read_structures(FILES / "fairchem_s2ef.lmdb"))
    archive = list(read_structures(FILES / "fairchem_s2ef.extxyz"))
    assert len(found) == len(archive) == 3
    for mine, published in zip(found, archive, strict=True):
        assert mine.energy == pytest.approx(published.energy + 20.5, abs=1e-6)  # less slab and gas
        assert mine.forces == pytest.approx(published.forces, abs=1e-6)
        fractions = (mine.positions - published.positions) @ np.linalg.inv(published.cell)
        assert fractions == pytest.approx(np.round(fractions), abs=1e-5)
        assert mine.fixed.tolist() == published.fixed.tolist() == [True, True, False, False, False]
        assert mine.group == published.group == "OC20 12"
