"""`megagnn prepare` on data that are not as they should be: told, refused or put right."""

import numpy as np
import pytest
from ase import Atoms, units

from megagnn.cli import main
from megagnn.data.dataset import StructureDataset
from megagnn.data.store import Store
from tests.data.trajectories import crystals, isolated, labelled, molecules, scaled, write

KBAR = 1e3 * units.bar


def prepare(folder, *arguments):
    """Exit code of `megagnn prepare ... --out FOLDER/out`."""
    return main(["prepare", *map(str, arguments), "--out", str(folder / "out")])


def sides(store):
    return [len(store.indices(split)) for split in ("train", "valid", "test")]


def last_lines(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]


def test_right_data_are_silent(tmp_path, capsys):
    files = [write(tmp_path / "m.xyz", molecules()), write(tmp_path / "c.xyz", crystals())]
    for file in files:
        assert prepare(tmp_path, file, "--group-by", "frame", "--overwrite", "--source", "s") == 0
    assert prepare(tmp_path, f"a={files[0]}", f"b={files[1]}", "--split", "1,0,0", "--overwrite") == 0
    printed = capsys.readouterr()
    assert "do not determine" in printed.out  # one composition
    assert [line for line in last_lines(capsys) if "do not determine" not in line] == []
    header = Store.open(tmp_path / "out").header
    assert header.warnings == ()


def test_isolated_atoms_stay_in_train_and_fix_references(tmp_path, capsys):
    """One trajectory and atoms: the atoms alone used to be valid and test, with H at -723 eV."""
    atoms = [isolated("H", -13.6), isolated("C", -1029.5), isolated("O", -2042.0)]
    md, iso = write(tmp_path / "md.xyz", molecules()), write(tmp_path / "iso.xyz", atoms)
    assert prepare(tmp_path, md, iso) == 2
    assert "--group-by frame" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert prepare(tmp_path, md, iso, "--group-by", "frame") == 0
    store = Store.open(tmp_path / "out")
    assert sides(store) == [22, 3, 2]  # 24 frames by 8 : 1 : 1, and the atoms
    assert (store.split[store.isolated_atoms()] == 0).all()
    printed = capsys.readouterr().out
    assert "out: 3 isolated atoms" in printed
    assert "reference energies, eV, fixed: H -13.6, C -1029.5, O -2042" in printed
    assert "do not determine" not in printed


@pytest.mark.parametrize(
    ("atom", "found"),
    [
        (isolated("H", -13.6, cell=3 * [8.0], pbc=True), True),
        (isolated("H", -13.6, cell=3 * [3.0], pbc=True), False),
        (isolated("H", -13.6, cell=[9.0, 9.0, 0.0], pbc=(True, True, False)), True),
    ],
)
def test_what_an_isolated_atom_is(tmp_path, atom, found):
    assert prepare(tmp_path, write(tmp_path / "a.xyz", [atom]), "--split", "1,0,0") == 0
    assert Store.open(tmp_path / "out").isolated_atoms().tolist() == [found]


def test_the_distance_of_isolated_atoms_is_the_users(tmp_path, capsys):
    file = write(tmp_path / "a.xyz", [isolated("H", -13.6, cell=3 * [5.0], pbc=True), *molecules("H2", 5)])
    assert prepare(tmp_path, file, "--isolated-distance", "4", "--split", "1,0,0") == 0
    store = Store.open(tmp_path / "out")
    assert store.isolated_atoms().tolist() == [True] + 5 * [False]
    assert "fixed: H -13.6" in capsys.readouterr().out
    assert prepare(tmp_path, file, "--isolated-distance", "0", "--overwrite") == 2
    assert "isolated_distance must be a positive number" in capsys.readouterr().err


@pytest.mark.parametrize(("distance", "found"), [("9", False), ("7", True), ("6", True)])
def test_the_distance_of_isolated_atoms_reaches_training(tmp_path, capsys, distance, found):
    file = write(tmp_path / "a.xyz", [isolated("H", -13.6, cell=3 * [8.0], pbc=True), *molecules("H2", 5)])
    assert prepare(tmp_path, file, "--isolated-distance", distance, "--split", "1,0,0") == 0
    assert ("1 isolated atoms" in capsys.readouterr().out) is found
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert ("1 isolated atoms" in capsys.readouterr().out) is found
    dataset = StructureDataset([tmp_path / "out"], "train", 4.0)
    assert dataset.isolated_atoms().tolist() == [found] + 5 * [False]
    assert dataset.baseline().fixed.any() == found


@pytest.mark.parametrize("name", ["IsolatedAtom", "isolated_atom"])
def test_a_file_may_say_that_an_atom_is_isolated(tmp_path, name):
    atom = isolated("H", -13.6, cell=3 * [4.0], pbc=True)
    atom.info["config_type"] = name
    frames = [atom, *molecules("H2")]
    assert prepare(tmp_path, write(tmp_path / "a.xyz", frames), "--group-by", "frame") == 0
    store = Store.open(tmp_path / "out")
    assert store.isolated_atoms().tolist() == [True] + 24 * [False]
    assert store.split[0] == 0
    names = store.group_names()
    assert names is not None
    assert names[store.group[0]] == "isolated atom H"


def test_a_hydrogen_atom_and_its_molecule_may_part(tmp_path):
    """Their empirical formulas are one, and groups are never torn."""
    frames = [isolated("H", -13.6), *molecules("H2", 4)]
    others = [f for name in ("CH4", "H2O", "NH3", "CO2") for f in molecules(name, 4)]
    for seed in range(8):
        arguments = ["--seed", seed, "--overwrite"]
        assert prepare(tmp_path, write(tmp_path / "a.xyz", frames + others), *arguments) == 0
        store = Store.open(tmp_path / "out")
        if store.split[1] != 0:
            assert store.split[0] == 0
            return
    pytest.fail("no seed put H2 on another side")


def test_isolated_atoms_with_several_energies_are_told(tmp_path, capsys):
    frames = [isolated("H", -13.6), isolated("H", -12.9), isolated("O", -2042.0), *molecules("H2O")]
    assert prepare(tmp_path, write(tmp_path / "a.xyz", frames), "--group-by", "frame") == 0
    assert any("from -13.6 to -12.9 eV; the lowest" in line for line in last_lines(capsys))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("H = -13.6\nC = -1029.5\nO = -2042.0\n", "e.toml"),
        ('{"1": -13.6, "6": -1029.5, "8": -2042.0}', "e.json"),
        ("{1: -13.6, 6: -1029.5, 8: -2042.0}", "E0s.txt"),
        ("element,energy\nH,-13.6\nC,-1029.5\nO,-2042.0\n", "e.csv"),
        ("[mols]\nH = -13.6\nC = -1029.5\nO = -2042.0\n", "e.toml"),
    ],
)
def test_given_reference_energies(tmp_path, capsys, text, name):
    (tmp_path / name).write_text(text)
    file = write(tmp_path / "a.xyz", molecules())
    assert (
        prepare(
            tmp_path, file, "--source", "mols", "--group-by", "frame", "--reference-energies", tmp_path / name
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "fixed: H -13.6, C -1029.5, O -2042" in printed
    assert "warning: mols" not in printed
    again = ["prepare", str(tmp_path / "out"), "--out", str(tmp_path / "again"), "--seed", "3"]
    assert main(again) == 0
    assert Store.open(tmp_path / "again").header.references == {
        "mols": {"H": -13.6, "C": -1029.5, "O": -2042.0}
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Hx = -13.6", "unknown element 'Hx'"),
        ("H = true", "must be a number in eV, got True"),
        ("H = -13.6\n[other]\nH = -1.0", "a table for 'other', which is no source; sources are a"),
        ("nothing", "is no table of reference energies"),
        ("[" * 3000, "is no table of reference energies"),
    ],
)
def test_refused_reference_energies(tmp_path, capsys, text, message):
    (tmp_path / "e.toml").write_text(text)
    file = write(tmp_path / "a.xyz", molecules())
    assert prepare(tmp_path, file, "--group-by", "frame", "--reference-energies", tmp_path / "e.toml") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_odd_reference_energies_are_told(tmp_path, capsys):
    (tmp_path / "e").write_text("H -13.6\nO -55556\n")  # oxygen in another unit
    frames = [isolated("H", -13.0), *molecules()]
    file = write(tmp_path / "a.xyz", frames)
    assert prepare(tmp_path, file, "--group-by", "frame", "--reference-energies", tmp_path / "e") == 0
    lines = "\n".join(last_lines(capsys))
    assert "given for H, -13.6 eV, is not that of its isolated atom, -13 eV" in lines
    assert "none for C, which are fitted" in lines
    assert "the reference energy of O, -55556 eV, is not that of any atom" in lines


def test_undetermined_references_are_told(tmp_path, capsys):
    """Water alone says nothing of hydrogen apart from oxygen."""
    assert prepare(tmp_path, write(tmp_path / "w.xyz", molecules("H2O")), "--group-by", "frame") == 0
    (line,) = last_lines(capsys)
    assert "do not determine the reference energies of H, O" in line
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert line in capsys.readouterr().out


def test_sure_faults_stop_and_can_be_accepted(tmp_path, capsys):
    file = write(tmp_path / "k.extxyz", scaled(crystals(), stress=KBAR))
    assert prepare(tmp_path, file, "--group-by", "frame") == 2
    message = capsys.readouterr().err
    assert "--units stress=kBar" in message
    assert "--accept-labels writes them" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k.extxyz"]
    assert prepare(tmp_path, file, "--group-by", "frame", "--accept-labels") == 0
    lines = last_lines(capsys)
    assert any("GPa" in line for line in lines)
    warnings = Store.open(tmp_path / "out").header.warnings
    assert [f"warning: {line}" for line in warnings] == lines[: len(warnings)]
    assert prepare(tmp_path, file, "--group-by", "frame", "--units", "stress=kBar", "--overwrite") == 0
    assert Store.open(tmp_path / "out").header.warnings == ()


def test_the_size_of_the_stress_is_shown(tmp_path, capsys):
    assert prepare(tmp_path, write(tmp_path / "c.xyz", crystals()), "--group-by", "frame") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    header = next(row for row in rows if row[:2] == ["source", "split"])
    row = next(row for row in rows if row[:2] == ["c", "train"])
    store = Store.open(tmp_path / "out")
    stress = store.arrays["stress"][store.indices("train")].astype(float)
    assert header[-2:] == ["S", "rms"]
    assert float(row[-1]) == pytest.approx(np.sqrt(np.mean(stress**2)), rel=5e-3)


@pytest.mark.parametrize(("fractions", "expected"), [("0,0,1", [0, 0, 24]), ("0,1,0", [0, 24, 0])])
def test_stores_for_evaluation_only(tmp_path, capsys, fractions, expected):
    frames = [isolated("O", -2042.0), *molecules()]
    assert prepare(tmp_path, write(tmp_path / "t.xyz", frames[1:]), "--split", fractions) == 0
    assert sides(Store.open(tmp_path / "out")) == expected
    (tmp_path / "c.toml").write_text(
        f"out_dir = '{tmp_path / 'run'}'\n[data]\npaths = ['{tmp_path / 'out'}']\n"
    )
    assert main(["train", str(tmp_path / "c.toml")]) == 2
    assert "the train split of" in capsys.readouterr().err


def test_own_validation_and_test_files(tmp_path):
    files = [write(tmp_path / f"{name}.xyz", molecules(seed=k, num_frames=6)) for k, name in enumerate("abc")]
    assert prepare(tmp_path, files[0], "--valid", files[1], "--test", files[2]) == 0
    store = Store.open(tmp_path / "out")
    assert store.split.tolist() == 6 * [0] + 6 * [2] + 6 * [1]  # in the order of reading
    assert store.header.split["valid_files"] == ["b.xyz"]
    assert prepare(tmp_path, files[0], "--valid", files[1], "--group-by", "frame", "--overwrite") == 0
    assert Store.open(tmp_path / "out").split[6:].tolist() == 6 * [1]
    assert sides(Store.open(tmp_path / "out")) == [5, 6, 1]


def test_the_split_keeps_every_element_in_train(tmp_path, capsys):
    """A single frame with gold: some seeds would draw it to test, and no model could be evaluated there."""
    frames = list(crystals(30, strain=0.0))
    gold = frames[7].copy()
    gold.symbols[1] = "Au"
    frames[7] = labelled(gold, **frames[7].calc.results)
    file = write(tmp_path / "rare.xyz", frames)
    for seed in range(12):
        assert prepare(tmp_path, file, "--group-by", "frame", "--seed", seed, "--overwrite") == 0
        store = Store.open(tmp_path / "out")
        assert store.split[7] == 0
        assert min(sides(store)) >= 2
    write(tmp_path / "plain.xyz", crystals(30, strain=0.0))
    assert prepare(tmp_path, tmp_path / "plain.xyz", "--group-by", "frame", "--seed", 11, "--overwrite") == 0
    assert sides(Store.open(tmp_path / "out")) == [24, 3, 3]


def test_unknown_elements_of_a_test_file_are_told(tmp_path, capsys):
    train, test = (
        write(tmp_path / "a.xyz", molecules("CH4")),
        write(tmp_path / "b.xyz", molecules("CH3OH", 5)),
    )
    assert prepare(tmp_path, train, "--test", test, "--group-by", "frame") == 0
    assert any("0 validation and 5 test structures hold O," in line for line in last_lines(capsys))


def test_missed_fractions_are_told(tmp_path, capsys):
    frames = [*molecules("CH3CH2OH", 40), *molecules("CH4", 20), *molecules("H2O", 2)]
    assert prepare(tmp_path, write(tmp_path / "few.xyz", frames)) == 0
    (line,) = [line for line in last_lines(capsys) if "was asked for" in line]
    assert "0.8 / 0.1 / 0.1 of 62 was asked for" in line
    assert "--group-by" in line


def test_copies_of_training_frames_given_as_test_are_told(tmp_path, capsys):
    frames = molecules(num_frames=20)
    shifted = []
    for atoms in frames[:7]:
        moved = atoms.copy()
        moved.positions += [3.0, -1.0, 2.0]
        shifted.append(labelled(moved, **atoms.calc.results))
    train = write(tmp_path / "train.xyz", frames)
    test = write(tmp_path / "test.xyz", [*shifted, *molecules(seed=1, num_frames=3)])
    assert prepare(tmp_path, train, "--test", test, "--group-by", "frame") == 0
    lines = [line for line in last_lines(capsys) if "copies of training" in line]
    assert len(lines) == 1
    # a tenth of the training file is drawn to valid, so not all seven originals need be in train
    assert "of 10 test structures are copies of training structures" in lines[0]
    only = write(tmp_path / "new.xyz", molecules(seed=1, num_frames=3))
    assert prepare(tmp_path, train, "--test", only, "--group-by", "frame", "--overwrite") == 0
    assert not [line for line in last_lines(capsys) if "copies" in line]


def test_one_structure_with_two_energies_is_told(tmp_path, capsys):
    frames = list(crystals(12))
    wrong = labelled(
        frames[3], **{**frames[3].calc.results, "energy": frames[3].calc.results["energy"] + 9.0}
    )
    assert prepare(tmp_path, write(tmp_path / "a.xyz", [*frames, wrong]), "--group-by", "frame") == 0
    (line,) = [line for line in last_lines(capsys) if "pairs of copies" in line]
    assert "frame 3 with" in line
    assert "frame 12 with" in line


def test_a_molecule_beside_its_image_is_no_copy_of_another(tmp_path, capsys):
    """Frames of a slow trajectory are near each other, and not copies."""
    atoms = Atoms("CO", positions=[[0, 0, 0], [0, 0, 1.13]])
    frames = []
    for k in range(30):
        atoms.positions[1, 2] = 1.13 + 0.002 * k
        frames.append(labelled(atoms, energy=-3070.0 + (0.002 * k) ** 2))
    assert prepare(tmp_path, write(tmp_path / "slow.xyz", frames), "--group-by", "frame") == 0
    assert not [line for line in last_lines(capsys) if "copies" in line]


def test_single_atoms_in_a_small_box_are_told(tmp_path, capsys):
    box = isolated("Cu", 0.1, cell=[5.0] * 3, pbc=True)
    file = write(tmp_path / "a.xyz", [*crystals(20), box])
    assert prepare(tmp_path, file, "--group-by", "frame") == 0
    assert any("--isolated-distance 4.5" in line and "IsolatedAtom" in line for line in last_lines(capsys))
    options = ("--group-by", "frame", "--isolated-distance", "4.5", "--overwrite")
    assert prepare(tmp_path, file, *options) == 0
    assert not any("IsolatedAtom" in line for line in last_lines(capsys))
