"""The reader of ASE's formats: labels as the engine gave them, constraints, keys, groups, broken files."""

import lzma

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms

from megagnn.data.formats import ReadOptions, read_structures


def labelled(atoms, seed=0, **extra):
    rng = np.random.default_rng(seed)
    results = {"energy": float(rng.normal()), "forces": rng.normal(size=(len(atoms), 3)), **extra}
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def slab():
    atoms = fcc111("Cu", (2, 2, 2), vacuum=5.0)
    atoms.pbc = (True, True, False)
    atoms.info.clear()
    atoms.set_constraint(FixAtoms([0, 1, 2, 3]))
    return labelled(atoms, stress=np.arange(6.0), free_energy=-99.0)


def test_forces_of_fixed_atoms_are_kept(tmp_path):
    atoms = slab()
    raw = atoms.calc.results["forces"]
    assert not atoms.get_forces()[:4].any()  # what ASE returns by default, and a reader must not
    ase.io.write(tmp_path / "slab.extxyz", atoms)
    (structure,) = read_structures(tmp_path / "slab.extxyz")
    assert np.allclose(structure.forces, raw, atol=1e-7)
    assert np.abs(structure.forces[:4]).max() > 0.1
    assert structure.fixed.tolist() == [True] * 4 + [False] * 4
    assert structure.pbc.tolist() == [True, True, False]


def test_move_mask_of_oc20_marks_fixed_atoms(tmp_path):
    path = tmp_path / "0.extxyz.xz"
    with lzma.open(path, "wt") as file:
        file.write(
            '2\nLattice="5 0 0 0 5 0 0 0 20" Properties=species:S:1:pos:R:3:move_mask:L:1:tags:I:1:forces:R:3'
            ' energy=-181.5 free_energy=-181.6 pbc="T T T"\n'
            "Cu 0.0 0.0 1.0 F 0 0.1 0.2 0.3\nH 0.0 0.0 3.0 T 2 -0.1 -0.2 -0.3\n"
        )
    (structure,) = read_structures(path)
    assert structure.fixed.tolist() == [True, False]
    assert structure.forces.tolist() == [[0.1, 0.2, 0.3], [-0.1, -0.2, -0.3]]
    assert structure.energy == -181.5  # not the free energy


def test_stress_is_a_full_matrix_in_ase_order(tmp_path):
    atoms = labelled(bulk("Cu"), stress=np.arange(6.0))
    ase.io.write(tmp_path / "bulk.traj", atoms)
    (structure,) = read_structures(tmp_path / "bulk.traj")
    assert structure.stress.tolist() == [[0, 5, 4], [5, 1, 3], [4, 3, 2]]  # xx yy zz yz xz xy
    assert structure.notes == ()


def test_stress_of_a_slab_is_left_out_with_a_note(tmp_path):
    ase.io.write(tmp_path / "slab.traj", slab())
    (structure,) = read_structures(tmp_path / "slab.traj")
    assert structure.stress is None
    assert structure.notes == ("stress left out: not periodic in three directions",)


def test_labels_of_two_methods_are_never_paired(tmp_path):
    atoms = labelled(molecule("H2O"))
    atoms.info["REF_energy"] = -2081.0
    ase.io.write(tmp_path / "two.xyz", atoms, format="extxyz")
    path = tmp_path / "two.xyz"
    with pytest.raises(
        ValueError, match=r"two.xyz, frame 0: energy .*but forces under the usual name.*-key none"
    ):
        list(read_structures(path, ReadOptions(energy_key="REF_energy")))
    (energy_only,) = read_structures(path, ReadOptions(energy_key="REF_energy", forces_key="none"))
    assert (energy_only.energy, energy_only.forces) == (-2081.0, None)
    (both,) = read_structures(path, ReadOptions(energy_key="REF_energy", forces_key="forces"))
    assert np.allclose(both.forces, atoms.calc.results["forces"])


def test_molecule_has_neither_cell_nor_stress(tmp_path):
    atoms = molecule("CH4")
    atoms.cell = 10 * np.eye(3)
    labelled(atoms, stress=np.ones(6))
    ase.io.write(tmp_path / "m.traj", atoms)
    (structure,) = read_structures(tmp_path / "m.traj")
    assert structure.stress is None
    assert not structure.cell.any()
    assert structure.fixed is None


def test_own_keys(tmp_path):
    atoms = molecule("H2O")
    atoms.info |= {"REF_energy": -2081.0, "REF_stress": np.eye(3), "config_type": "water"}
    atoms.arrays["REF_forces"] = np.arange(9.0).reshape(3, 3)
    ase.io.write(tmp_path / "mace.xyz", atoms, format="extxyz")
    options = ReadOptions(energy_key="REF_energy", forces_key="REF_forces", source="water", level="PBE")
    (structure,) = read_structures(tmp_path / "mace.xyz", options)
    assert structure.energy == -2081.0
    assert structure.forces.tolist() == np.arange(9.0).reshape(3, 3).tolist()
    assert (structure.source, structure.level) == ("water", "PBE")
    with pytest.raises(ValueError, match=r"no energy or forces found.*REF_energy.*REF_forces.*--energy-key"):
        list(read_structures(tmp_path / "mace.xyz"))
    with pytest.raises(ValueError, match=r"no energy key 'dft_energy'.*REF_energy"):
        list(read_structures(tmp_path / "mace.xyz", ReadOptions(energy_key="dft_energy")))
    with pytest.raises(ValueError, match="no forces key 'F'"):
        list(read_structures(tmp_path / "mace.xyz", ReadOptions(energy_key="REF_energy", forces_key="F")))


@pytest.mark.parametrize(
    ("group_by", "groups"),
    [
        ("auto", ["H2O", "H2O", "HO", "H4C"]),
        ("formula", ["H2O", "H2O", "HO", "H4C"]),
        ("info:run", ["1", "2", "2", "1"]),
    ],
)
def test_groups(tmp_path, group_by, groups):
    two_waters = molecule("H2O") + Atoms("OH2", positions=molecule("H2O").positions + 5)
    frames = [molecule("H2O"), two_waters, molecule("H2O2"), molecule("CH4")]
    for frame, run in zip(frames, (1, 2, 2, 1), strict=True):
        labelled(frame).info["run"] = run
    ase.io.write(tmp_path / "a.xyz", frames, format="extxyz")
    read = list(read_structures(tmp_path / "a.xyz", ReadOptions(group_by=group_by)))
    assert [s.group for s in read] == groups
    assert read[0].source == "a"


def test_groups_by_file_and_frame(tmp_path):
    ase.io.write(tmp_path / "a.xyz", [labelled(molecule(name)) for name in ("H2O", "CO")], format="extxyz")
    by = {
        name: list(read_structures(tmp_path / "a.xyz", ReadOptions(group_by=name)))
        for name in ("file", "frame")
    }
    assert len({s.group for s in by["file"]}) == 1
    assert len({s.group for s in by["frame"]}) == 2


def test_missing_group_key_names_those_there(tmp_path):
    atoms = labelled(molecule("H2O"))
    atoms.info["mol"] = "a"
    ase.io.write(tmp_path / "a.xyz", atoms, format="extxyz")
    with pytest.raises(ValueError, match="frame 0: has no key 'molecule' to group by; keys there are mol"):
        list(read_structures(tmp_path / "a.xyz", ReadOptions(group_by="info:molecule")))


def test_unknown_grouping():
    with pytest.raises(ValueError, match="unknown grouping 'smiles'; known are auto"):
        ReadOptions(group_by="smiles")


def test_later_frames_may_lack_labels(tmp_path):
    frames = [labelled(molecule("H2O")), molecule("H2O")]
    ase.io.write(tmp_path / "a.xyz", frames, format="extxyz")
    assert [s.energy is None for s in read_structures(tmp_path / "a.xyz")] == [False, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read .*a.xyz, frame 0"),
        ("not a structure\nat all\n", "cannot read .*a.xyz, frame 0"),
        ("3\nProperties=species:S:1:pos:R:3 energy=1\nH 0 0 0\nH 0 0 1\n", "cannot read .*a.xyz, frame 0"),
        ("1\nProperties=species:S:1:pos:R:3 energy=1\nQq 0 0 0\n", "cannot read .*a.xyz, frame 0: .*Qq"),
    ],
)
def test_unreadable_files(tmp_path, text, message):
    (tmp_path / "a.xyz").write_text(text)
    with pytest.raises(ValueError, match=message):
        list(read_structures(tmp_path / "a.xyz", format="ase"))


def test_truncated_in_the_second_frame(tmp_path):
    ase.io.write(tmp_path / "a.xyz", [labelled(molecule("H2O"))] * 2, format="extxyz")
    text = (tmp_path / "a.xyz").read_text()
    (tmp_path / "a.xyz").write_text(text[: int(len(text) * 0.8)])
    with pytest.raises(ValueError, match=r"cannot read .*a.xyz, frame"):
        list(read_structures(tmp_path / "a.xyz"))


def test_missing_file_and_unknown_format(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_structures(tmp_path / "nowhere.xyz")
    with pytest.raises(
        ValueError,
        match="unknown format 'hdf7'; known are adios, ase, cp2k, deepmd, hdf5, lmdb, mlearn, npz, ",
    ):
        read_structures(tmp_path / "nowhere.xyz", format="hdf7")


def test_labels_of_the_same_style_that_nobody_named_are_told(tmp_path):
    atoms = molecule("H2O")
    atoms.info |= {"REF_energy": -2081.0, "REF_virials": np.eye(3), "other_stress": np.eye(3)}
    atoms.arrays["REF_force"] = np.arange(9.0).reshape(3, 3)
    ase.io.write(tmp_path / "a.xyz", atoms, format="extxyz")

    def notes(**keys: str) -> list[str]:
        (read,) = read_structures(tmp_path / "a.xyz", ReadOptions(**keys))
        return [note for note in read.notes if "reads it" in note]

    forces = "no forces read, though there is REF_force; --forces-key REF_force reads it"
    virial = "no virial read, though there is REF_virials; --virial-key REF_virials reads it"
    assert notes(energy_key="REF_energy") == [forces, virial]
    assert notes(energy_key="REF_energy", virial_key="none") == [forces]
    assert notes(energy_key="REF_energy", forces_key="REF_force", stress_key="other_stress") == []
    energy = "no energy read, though there is REF_energy; --energy-key REF_energy reads it"
    assert notes(forces_key="REF_force") == [energy, virial]
    assert notes(forces_key="REF_force", energy_key="none", virial_key="none") == []
