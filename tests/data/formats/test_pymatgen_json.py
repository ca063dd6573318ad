"""JSON of pymatgen structures with labels: lists, MatPES, MPtrj, molecules; streamed, compressed, damaged."""

import gzip
import json

import numpy as np
import pytest

from megagnn.data.formats import ReadOptions, detect_format, parse_units, pymatgen_json, read_structures
from megagnn.data.formats.pymatgen_json import iterate_entries
from tests.data.formats.springs import FILES

CELL = [[4.0, 0, 0], [0, 4.0, 0], [1.0, 0, 4.0]]
FORCES = [[0.1, 0, 0], [-0.1, 0, 0]]
KBAR = [[16.021766, 0, 0], [0, -32.043532, 0], [0, 0, 0]]


def structure(**changes):
    sites = [
        {"species": [{"element": name, "occu": 1}], "abc": abc, "label": name}
        for name, abc in (("Na", [0, 0, 0]), ("Cl", [0.5, 0.5, 0.5]))
    ]
    return {"@class": "Structure", "lattice": {"matrix": CELL, "a": 4.0}, "sites": sites, **changes}


def plain(energy=-7.0, **changes):
    return {"structure": structure(), "energy": energy, "forces": FORCES, **changes}


def write(path, data):
    text = json.dumps(data)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_lists_in_the_units_of_ase(tmp_path, name):
    path = write(tmp_path / name, [plain(stress=[[0.1, 0, 0], [0, 0.2, 0], [0, 0, 0.3]]), plain(-6.5)])
    assert detect_format(path) == "pymatgen"
    first, second = read_structures(path)
    assert first.atomic_numbers.tolist() == [11, 17]
    assert np.allclose(first.positions, [[0, 0, 0], [2.5, 2, 2]])
    assert (first.energy, second.energy, first.source) == (-7.0, -6.5, "a")
    assert first.forces.tolist() == FORCES
    assert first.stress.diagonal().tolist() == [0.1, 0.2, 0.3]
    assert second.stress is None
    assert first.pbc.all()


def test_mptrj(tmp_path):
    frames = {
        f"mp-{m}": {
            f"mp-{m}-0-{k}": {
                "structure": structure(),
                "uncorrected_total_energy": -7.0 - k,
                "corrected_total_energy": -9.0 - k,
                "energy_per_atom": -4.5,
                "force": FORCES,
                "stress": KBAR,
            }
            for k in range(2)
        }
        for m in (1, 2)
    }
    read = list(read_structures(write(tmp_path / "mptrj.json", frames)))
    assert [s.energy for s in read] == [-7.0, -8.0, -7.0, -8.0]
    assert [s.group for s in read] == ["mp-1", "mp-1", "mp-2", "mp-2"]
    with pytest.raises(ValueError, match="with --forces-key force --stress-key stress if"):
        list(read_structures(tmp_path / "mptrj.json", ReadOptions(energy_key="corrected_total_energy")))
    assert np.allclose(read[0].stress, np.diag([-0.01, 0.02, 0.0]), atol=1e-9)  # kBar, compression positive
    assert read[0].forces.tolist() == FORCES


def test_matpes(tmp_path):
    voigt = [10.0, 20.0, 30.0, 4.0, 5.0, 6.0]
    entry = plain(
        matpes_id="matpes-1",
        stress=voigt,
        functional="PBE",
        provenance={"original_mp_id": "mp-7", "md_step": 3},
    )
    path = write(tmp_path / "MatPES.json", [entry])
    (read,) = read_structures(path)
    assert (read.energy, read.level, read.group) == (-7.0, "PBE", "mp-7")
    assert read.stress is None
    assert any("--units stress=-kBar reads it" in note for note in read.notes)
    (given,) = read_structures(path, ReadOptions(units=parse_units("stress=-kBar")))
    assert np.allclose(given.stress * -1602.1766, [[10, 6, 5], [6, 20, 4], [5, 4, 30]])


def test_a_virial_of_the_usual_name_is_not_paired_with_labels_of_other_names(tmp_path):
    entry = plain(virial=[1.0, 1.0, 1.0, 0.0, 0.0, 0.0], REF_energy=-9.0, REF_forces=FORCES)
    path = write(tmp_path / "a.json", [entry])
    (usual,) = read_structures(path)
    assert np.allclose(usual.stress, -np.eye(3) / 64.0)
    named = {"energy_key": "REF_energy", "forces_key": "REF_forces"}
    (read,) = read_structures(path, ReadOptions(**named))
    assert (read.energy, read.stress) == (-9.0, None)
    assert any("--virial-key reads it" in note for note in read.notes)
    (asked,) = read_structures(path, ReadOptions(**named, virial_key="virial"))
    assert np.allclose(asked.stress, usual.stress)
    (without,) = read_structures(path, ReadOptions(stress_key="none"))
    assert (without.energy, without.stress, without.notes) == (-7.0, None, ())


def test_other_keys_and_molecules(tmp_path):
    sites = [{"species": [{"element": "D", "occu": 1}], "xyz": [0, 0, k * 0.7]} for k in range(2)]
    molecule = {"@class": "Molecule", "charge": 1, "spin_multiplicity": 2, "sites": sites}
    entry = {"structure": molecule, "E": -0.5, "F": FORCES}
    path = write(tmp_path / "a.json", [entry])
    with pytest.raises(ValueError, match=r"frame 0: unknown species D .*--species D=H"):
        list(read_structures(path))
    with pytest.raises(ValueError, match="frame 0: no energy or forces found; keys there are E, F"):
        list(read_structures(path, ReadOptions(species={"D": "H"})))
    options = ReadOptions(species={"D": "H"}, energy_key="E", forces_key="F", units=parse_units("energy=Ha"))
    (read,) = read_structures(path, options)
    assert read.energy == pytest.approx(-13.605693)
    assert not read.pbc.any()
    assert (read.notes, read.charge, read.multiplicity) == ((), 1.0, 2)
    with pytest.raises(ValueError, match="there is no energy key 'G'; keys there are E, F"):
        list(read_structures(path, ReadOptions(species={"D": "H"}, energy_key="G", forces_key="F")))


def test_a_bad_entry_and_a_file_cut_short(tmp_path):
    path = write(tmp_path / "a.json", [plain(), {"structure": {"sites": []}}, plain(-6.0), plain(-5.0)])
    with pytest.raises(ValueError, match="frame 1: no structure as pymatgen writes it"):
        list(read_structures(path))
    path.write_text(path.read_text()[:-50])
    told = []
    read = list(read_structures(path, ReadOptions(on_unreadable=told.append)))
    assert [s.energy for s in read] == [-7.0, -6.0]
    assert [("frame 1" in str(t), "is the file whole" in str(t)) for t in told] == [
        (True, False),
        (False, True),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lattice": {"matrix": CELL[:2]}}, r"lattice must be numbers of shape \(3, 3\), got \(2, 3\)"),
        ({"lattice": {"matrix": CELL, "pbc": [True]}}, r"pbc must be numbers of shape \(3,\), got \(1,\)"),
        (
            {"sites": [{"species": [{"element": "Na"}], "abc": ["a", 0, 0]}]},
            r"abc of the sites must be numbers of shape \(1, 3\): could not convert",
        ),
        ({"sites": [{"species": [{"element": "Na"}], "abc": [0, 0]}]}, r"shape \(1, 3\), got \(1, 2\)"),
        ({"sites": [3]}, "no structure as pymatgen writes it"),
        ({"lattice": [3]}, "no structure as pymatgen writes it"),
    ],
)
def test_a_structure_of_another_shape_is_named_and_can_be_skipped(tmp_path, change, message):
    path = write(tmp_path / "a.json", [plain(), {**plain(), "structure": structure(**change)}, plain(-6.0)])
    with pytest.raises(ValueError, match=f"frame 1: .*{message}"):
        list(read_structures(path))
    told = []
    read = list(read_structures(path, ReadOptions(on_unreadable=told.append)))
    assert ([s.energy for s in read], len(told)) == ([-7.0, -6.0], 1)


@pytest.mark.parametrize("data", [[], {}, [1, -2.5e3, "a", None], {"a": [1, {"b": 2}], "c": "x,]}"}])
@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_entries_do_not_depend_on_how_the_file_is_cut(tmp_path, monkeypatch, data, chunk):
    monkeypatch.setattr(pymatgen_json, "CHUNK", chunk)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(data, indent=1))
    read = list(iterate_entries(path))
    assert read == (list(data.items()) if isinstance(data, dict) else [(None, value) for value in data])


@pytest.mark.parametrize("text", ["", "1", "[1 2]", "[1,", '{"a" 1}', "{1: 2}", "[1, x]", "[" * 200_000])
def test_what_is_no_list_of_entries(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"expected|ends early|nested too deeply"):
        list(iterate_entries(path))


def test_files_of_pymatgen():
    """Those of tests/data/files, written by tools/sample_files/pymatgen_json.py."""
    trajectory, alexandria = (
        list(read_structures(FILES / name)) for name in ("mptrj.json", "alexandria.json.bz2")
    )
    assert [s.energy for s in trajectory] == [-7.0, -8.0, -7.0, -8.0]
    assert [s.group for s in trajectory] == ["mp-1", "mp-1", "mp-2", "mp-2"]
    assert np.allclose(trajectory[1].stress, np.diag([-0.01, 0.02, 0.0]), atol=1e-9)
    assert [s.energy for s in alexandria] == [-7.0, -8.0]  # without the correction
    assert [s.group for s in alexandria] == ["agm000", "agm001"]
    assert alexandria[0].stress is None
    for structure in (trajectory[0], alexandria[0]):
        assert structure.forces.tolist() == FORCES
        assert np.allclose(structure.cell, CELL)
        assert np.allclose(structure.positions, [[0, 0, 0], [2.5, 2, 2]])
    names = {"energy_key": "corrected_total_energy", "forces_key": "force", "stress_key": "stress"}
    assert next(read_structures(FILES / "mptrj.json", ReadOptions(**names))).energy == -9.0


@pytest.mark.parametrize("name", ["alexandria.json", "alexandria.json.gz"])
def test_alexandria(name, tmp_path):
    def entry(number, **data):
        sites = [
            {**site, "properties": {"forces": f}}
            for site, f in zip(structure()["sites"], FORCES, strict=True)
        ]
        data = {"mat_id": f"agm{number}", "energy_total": -7.0 - number, "stress": KBAR, **data}
        return {
            "@class": "ComputedStructureEntry",
            "energy": -70.0,
            "entry_id": f"agm{number}",
            "structure": structure(sites=sites),
            "data": data,
        }

    path = write(tmp_path / name, {"entries": [entry(1), entry(2, energy_total=None)], "version": 1})
    text = json.dumps({"entries": [entry(1), entry(2)], "@module": "none"}) if name.endswith("json") else None
    first, *_ = read_structures(path, ReadOptions(on_unreadable=lambda _: None))
    assert (first.energy, first.group) == (-8.0, "agm1")
    assert first.forces.tolist() == FORCES
    assert first.stress is None
    assert "--units stress=-kBar" in first.notes[0]
    declared = next(read_structures(path, ReadOptions(units=parse_units("stress=-kBar"))))
    assert np.allclose(declared.stress, np.diag([-0.01, 0.02, 0.0]), atol=1e-9)
    if text is not None:
        (tmp_path / "cut.json").write_text(text[:-40])
        with pytest.raises(ValueError, match="the file ends early"):
            list(read_structures(tmp_path / "cut.json"))
