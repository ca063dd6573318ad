"""The mlearn reader, on a tiny file of the same form."""

import copy
import json

import numpy as np
import pytest

from megagnn.data.formats import ReadOptions, detect_format, read_structures

CELL = [[5.5, 0.0, 0.0], [0.0, 5.5, 0.0], [1.0, 0.0, 5.4]]


def entry(group, description, energy=-10.8):
    sites = [
        {"species": [{"element": "Si", "occu": 1}], "abc": abc, "xyz": xyz, "label": "Si"}
        for abc, xyz in (([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]), ([0.5, 0.5, 0.5], [3.25, 2.75, 2.7]))
    ]
    return {
        "structure": {"@class": "Structure", "lattice": {"matrix": CELL, "a": 5.5}, "sites": sites},
        "outputs": {"energy": energy, "forces": [[0.1, 0, 0], [-0.1, 0, 0]], "virial_stress": [1.0] * 6},
        "group": group,
        "description": description,
        "tag": "train",
        "num_atoms": 2,
        "element": "Si",
    }


ENTRIES = [
    entry("AIMD-NVT", "Snapshot 20000 of 100000 of AIMD NVT simulation for normal structure at 300 K"),
    entry("AIMD-NVT", "Snapshot 24000 of 100000 of AIMD NVT simulation for normal structure at 300 K"),
    entry("AIMD-NVT", "Snapshot 24000 of 100000 of AIMD NVT simulation for normal structure at 843 K"),
    entry("Elastic", "Si 2x2x2 cell, mode 0, strain -0.1"),
    entry("Elastic", "Si 2x2x2 cell, mode 1, strain -0.1"),
    entry("Surface", "Si_surface_mp/Si_mp-149_(3_2_1)"),
]


@pytest.fixture
def path(tmp_path):
    (tmp_path / "Si_training.json").write_text(json.dumps(ENTRIES))
    return tmp_path / "Si_training.json"


def write(path, entries):
    path.write_text(json.dumps(entries))
    return path


def test_reads_structures_and_labels(path):
    assert detect_format(path) == "mlearn"
    structures = list(read_structures(path))
    assert len(structures) == len(ENTRIES)
    first = structures[0]
    assert first.atomic_numbers.tolist() == [14, 14]
    assert np.allclose(first.positions, [[0, 0, 0], [3.25, 2.75, 2.7]])
    assert first.cell.tolist() == CELL
    assert first.pbc.all()
    assert first.energy == -10.8
    assert first.forces.tolist() == [[0.1, 0, 0], [-0.1, 0, 0]]
    assert (first.source, first.level) == ("Si_training", "PBE")


def test_stress_of_unknown_order_is_left_out(path):
    assert all(s.stress is None for s in read_structures(path))


def test_keys_of_a_stress_are_refused_and_others_must_be_there(path):
    keyed = {"energy_key": "energy", "forces_key": "forces"}
    for stress in ({"stress_key": "virial_stress", "virial_key": "none"}, {"virial_key": "virial_stress"}):
        with pytest.raises(
            ValueError, match=r"-key virial_stress would read a stress of mlearn.*another order"
        ):
            list(read_structures(path, ReadOptions(**keyed, **stress)))
    with pytest.raises(
        ValueError, match=r"frame 0: there is no energy key 'E'; keys there are energy, forces, virial_stress"
    ):
        list(read_structures(path, ReadOptions(energy_key="E", forces_key="forces")))
    read = list(read_structures(path, ReadOptions(**keyed, stress_key="none", virial_key="none")))
    assert [s.energy for s in read] == [-10.8] * len(ENTRIES)


def test_snapshots_of_a_run_and_strains_of_a_cell_stay_together(path):
    groups = [s.group for s in read_structures(path)]
    assert groups[0] == groups[1] == "Si, AIMD-NVT: AIMD NVT simulation for normal structure at 300 K"
    assert groups[3] == groups[4] == "Si, Elastic"
    assert len(set(groups)) == 4


def test_other_groupings(path):
    assert {s.group for s in read_structures(path, ReadOptions(group_by="formula"))} == {"Si"}
    by_kind = {s.group for s in read_structures(path, ReadOptions(group_by="info:group"))}
    assert by_kind == {"AIMD-NVT", "Elastic", "Surface"}


def test_positions_from_fractions_where_no_others_are_given(tmp_path):
    bare = copy.deepcopy(ENTRIES[0])
    for site in bare["structure"]["sites"]:
        del site["xyz"]
    (structure,) = read_structures(write(tmp_path / "a.json", [bare]))
    assert np.allclose(structure.positions, [[0, 0, 0], [3.25, 2.75, 2.7]])


def changed(change):
    bad = copy.deepcopy(ENTRIES[0])
    change(bad)
    return [ENTRIES[1], bad]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (changed(lambda e: e.pop("structure")), "frame 1: not an entry of the mlearn form.*structure"),
        (changed(lambda e: e["structure"].pop("lattice")), "frame 1: not an entry .*lattice"),
        (
            changed(lambda e: e["structure"]["sites"][0]["species"][0].update(element="Xx")),
            "unknown species Xx",
        ),
        (
            changed(lambda e: e["structure"]["sites"][0]["species"][0].update(occu=0.5)),
            "frame 1: a site is shared",
        ),
        (changed(lambda e: e.update(outputs=[3])), "frame 1: not an entry of the mlearn form"),
        ({"structure": 1}, "expected a list of structures, got dict"),
    ],
)
def test_refuses(tmp_path, entries, message):
    with pytest.raises(ValueError, match=message):
        list(read_structures(write(tmp_path / "a.json", entries), format="mlearn"))


def test_truncated_file(path):
    path.write_text(path.read_text()[:-40])
    with pytest.raises(ValueError, match=r"cannot read .*Si_training.json.*is the file whole"):
        list(read_structures(path))


def test_other_json_files_are_left_to_ase(tmp_path):
    (tmp_path / "db.json").write_text('{"1": {"numbers": [1]}, "ids": [1]}')
    assert detect_format(tmp_path / "db.json") == "ase"
