"""LMDB of pickled graphs (both layouts of torch_geometric) and of rows of ASE; what is refused in them.

The files of tests/data/files are written by tools/sample_files/lmdb_files.py with the tools of their formats.
"""

import json
import os
import pickle
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from ase.build import add_adsorbate, fcc111, molecule
from ase.calculators.emt import EMT

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
        ("oc20.lmdb", [0, 1, 2], "OC20 1331084", "RPBE"),
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


def test_a_record_that_is_not_there(tmp_path):
    path = with_record(tmp_path, "oc20.lmdb", b"length", pickle.dumps(4))
    with pytest.raises(ValueError, match="record 3: there is none, though the file has 4"):
        list(read_structures(path))
