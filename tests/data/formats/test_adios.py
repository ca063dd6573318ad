"""ADIOS2 folders of HydraGNN, as tools/sample_files/adios.py writes them, and a stand-in for adios2."""

import importlib
import sys
from types import ModuleType

import numpy as np
import pytest

from megagnn.data.foreign import RefusedError
from megagnn.data.formats import detect_format, read_structures
from megagnn.data.inspect_file import describe_file
from tests.data.formats.springs import FILES, spring


def test_structures_of_the_file():
    pytest.importorskip("adios2", reason="adios2 is not installed")
    path = FILES / "hydragnn.bp"
    found = list(read_structures(path))
    assert len(found) == 7
    for s in found:
        energy, forces = spring(s.positions)
        assert s.energy == pytest.approx(energy, abs=1e-4)  # of 500 eV in single precision
        assert s.forces == pytest.approx(forces, abs=2e-6)
        assert not s.pbc.any()
        assert not s.cell.any()
    assert [(s.charge, s.multiplicity) for s in found] == [
        *([(0.0, 1), (1.0, 2)] * 2),
        *([(0.0, 1)] * 2),
        (1.0, 2),
    ]
    assert "7; 7 were read" in describe_file(path)


def test_the_folder_is_known():
    assert detect_format(FILES / "hydragnn.bp") == "adios"


class Reader:
    """What the reader needs of `adios2.FileReader`, on a dictionary of arrays."""

    def __init__(self, arrays):
        self.arrays = arrays

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def available_variables(self):
        return {name: {"Shape": ", ".join(map(str, array.shape))} for name, array in self.arrays.items()}

    def read(self, name, start=None, count=None):
        array = self.arrays[name]
        if start is None:
            return array
        return array[tuple(slice(a, a + n) for a, n in zip(start, count, strict=True))]


@pytest.fixture
def read(monkeypatch):
    module = ModuleType("adios2")
    monkeypatch.setitem(sys.modules, "adios2", module)
    monkeypatch.delitem(sys.modules, "megagnn.data.foreign.adios", raising=False)
    adios = importlib.import_module("megagnn.data.foreign.adios")
    monkeypatch.setattr(adios, "BLOCK", 2)

    def run(arrays):
        module.FileReader = lambda _: Reader(arrays)
        return list(adios.structures("a.bp", ["energy", "forces"]))

    yield run
    sys.modules.pop("megagnn.data.foreign.adios", None)


def column(arrays, name, *values):
    values = [np.asarray(value, dtype=float) for value in values]
    counts = np.array([len(value) for value in values])
    arrays[name] = np.concatenate(values)
    arrays[f"{name}/variable_count"], arrays[f"{name}/variable_offset"] = counts, np.cumsum(counts) - counts


def of_three():
    arrays = {}
    sizes = (2, 1, 3)
    column(arrays, "trainset/pos", *(np.full((n, 3), k) for k, n in enumerate(sizes)))
    column(arrays, "trainset/x", *(np.full((n, 4), k + 1) for k, n in enumerate(sizes)))
    column(arrays, "trainset/energy", *([[-float(k)]] for k in range(3)))
    column(arrays, "trainset/forces", *(np.full((n, 3), 0.1 * k) for k, n in enumerate(sizes)))
    column(arrays, "trainset/pbc", [1, 1, 1], [0, 0, 0], [1, 1, 0])
    column(arrays, "trainset/cell", *(np.eye(3) * (k + 1) for k in range(3)))
    return arrays


def test_rows_of_each_structure(read):
    description, *items = read(of_three())
    assert description == {"layout": "HydraGNN", "keys": ["energy", "forces"], "num_structures": 3}
    assert [item["numbers"].tolist() for item in items] == [[1, 1], [2], [3, 3, 3]]
    assert [item["positions"][0, 0] for item in items] == [0, 1, 2]
    assert [float(item["values"]["energy"]) for item in items] == [0, -1, -2]
    assert [item["values"]["forces"].shape for item in items] == [(2, 3), (1, 3), (3, 3)]
    assert [None if item["cell"] is None else item["cell"][0, 0] for item in items] == [1, None, 3]
    assert items[2]["pbc"].tolist() == [True, True, False]
    assert items[2]["where"] == "trainset 2"
    assert all("the file does not say its units" in note for item in items for note in item["notes"])


def test_other_and_damaged_files_are_refused(read):
    with pytest.raises(RefusedError, match=r"a split \(trainset/pos\).* has a; convert"):
        read({"a": np.zeros(3)})
    arrays = of_three()
    arrays["trainset/forces/variable_offset"][1] = 0
    with pytest.raises(RefusedError, match="structures of trainset/forces do not follow one another"):
        read(arrays)
    arrays = of_three()
    arrays["trainset/pos"] = arrays["trainset/pos"][:-1]
    with pytest.raises(RefusedError, match=r"trainset/pos has shape \(5, 3\), its structures have 6 rows"):
        read(arrays)
    arrays = of_three()
    del arrays["trainset/energy/variable_offset"]
    with pytest.raises(RefusedError, match="trainset/energy has no variable_count or variable_offset"):
        read(arrays)
    arrays = {name: array for name, array in of_three().items() if not name.startswith("trainset/x")}
    assert read(arrays)[1] == "trainset 0: there is neither atomic_numbers nor x"
