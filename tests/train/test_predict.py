"""`megagnn predict`: files of predictions against the calculator, and what becomes of labels and errors."""

import re
from pathlib import Path

import ase.db
import ase.io
import ase.test
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms

from megagnn.calculator import MegaGNNCalculator
from megagnn.cli import main
from megagnn.data.formats import ReadOptions, parse_units, read_structures
from megagnn.data.formats.ase_files import read_frames
from megagnn.train.predicted_frames import with_predictions


def frames() -> list[Atoms]:
    """A labelled crystal with a fixed atom, a slab, one atom, and more crystals."""
    crystal = bulk("Cu", cubic=True)
    crystal.rattle(0.1, seed=1)
    crystal.set_constraint(FixAtoms([0]))
    slab = crystal.copy()
    slab.pbc = [True, True, False]
    slab.info["dft_energy"] = 7.0
    labels = {"energy": 5.0, "forces": np.full((4, 3), 9.0), "stress": np.arange(6.0), "free_energy": 6.0}
    crystal.calc = SinglePointCalculator(crystal, **labels)
    crystals = [bulk("Ag", cubic=True) for _ in range(5)]
    for seed, atoms in enumerate(crystals):
        atoms.rattle(0.05, seed=seed)
    return [crystal, slab, Atoms("Cu"), *crystals]


def predict(checkpoint: Path, file: Path, out: Path, *arguments: str) -> int:
    return main(
        ["predict", str(checkpoint), str(file), "--out", str(out), "--source", "crystals", *arguments]
    )


def predicted(checkpoint: Path, images: list[Atoms], folder: Path, name: str, *arguments: str) -> list[Atoms]:
    ase.io.write(folder / "in.traj", images)
    assert predict(checkpoint, folder / "in.traj", folder / name, *arguments) == 0
    if name.endswith((".db", ".json")):
        with ase.db.connect(folder / name) as database:
            return [row.toatoms(add_additional_information=True) for row in database.select()]
    return ase.io.read(folder / name, index=":")


def atomic_energies(atoms: Atoms) -> np.ndarray:
    """From wherever the format keeps them."""
    if "atomic_energies" in atoms.arrays:
        return atoms.arrays["atomic_energies"]
    if "data" in atoms.info:
        return np.array(atoms.info["data"]["atomic_energies"])
    return atoms.calc.results["energies"]


@pytest.mark.parametrize("name", ["out.extxyz", "out.xyz.gz", "out.traj", "out.db", "out.json"])
def test_predictions_are_those_of_the_calculator(checkpoint: Path, tmp_path: Path, name: str) -> None:
    """Frame by frame, in order, in batches of two; the forces of fixed atoms are not zeroed."""
    given = frames()
    found = predicted(checkpoint, given, tmp_path, name, "--max-atoms", "8")
    assert [len(atoms) for atoms in found] == [4, 4, 1, 4, 4, 4, 4, 4]
    calculator = MegaGNNCalculator(checkpoint, source="crystals")
    for atoms, expected in zip(found, given, strict=True):
        results, bare = atoms.calc.results, expected.copy()
        calculator.calculate(bare)
        assert np.abs(atoms.positions - expected.positions).max() < 1e-7
        assert results["energy"] == pytest.approx(calculator.results["energy"], abs=1e-9)
        assert np.abs(results["forces"] - calculator.results["forces"]).max() < 1e-7
        assert np.abs(atomic_energies(atoms) - calculator.results["energies"]).max() < 1e-7
        assert ("stress" in results) == expected.pbc.all()
        if expected.pbc.all():
            assert np.abs(results["stress"] - calculator.results["stress"]).max() < 1e-9
    assert np.abs(found[0].calc.results["forces"][0]).max() > 1e-3
    assert found[0].constraints[0].index.tolist() == [0]
    assert not list(tmp_path.glob(".*")), "nothing half written is left"


@pytest.mark.parametrize("name", ["out.extxyz", "out.traj", "out.db"])
def test_labels_of_the_input_are_kept_apart(checkpoint: Path, tmp_path: Path, name: str) -> None:
    crystal, slab, *_ = predicted(checkpoint, frames(), tmp_path, name)
    places = {**crystal.info, **crystal.info.get("data", {}), **crystal.arrays}
    assert places["REF_energy"] == 5.0
    assert places["REF_free_energy"] == 6.0
    assert np.array_equal(places["REF_forces"], np.full((4, 3), 9.0)), "of the fixed atom, too"
    assert np.ravel(places["REF_stress"])[[0, 4, 8, 5, 2, 1]].tolist() == [0, 1, 2, 3, 4, 5]
    assert crystal.calc.results["energy"] != 5.0
    assert "free_energy" not in crystal.calc.results or crystal.calc.results["free_energy"] != 6.0
    if name != "out.db":  # a database has no place for what is neither a result nor data
        assert slab.info["dft_energy"] == 7.0
    assert not any(key.startswith("REF_") for key in [*slab.info, *slab.arrays])


def test_labels_under_the_new_name_stay() -> None:
    """A file that has REF_energy of its own keeps it; a usual label beside it is left out, not mixed in."""
    atoms = frames()[0]
    atoms.info |= {"REF_energy": -1.0, "forces": "none"}
    atoms.arrays["atomic_energies"] = np.arange(4.0)
    results = {"energy": 2.0, "forces": np.zeros((4, 3)), "energies": np.full(4, 0.5)}
    found = with_predictions(atoms, results)
    assert found.info["REF_energy"] == -1.0
    assert "forces" not in found.info
    assert np.array_equal(found.arrays["REF_forces"], np.full((4, 3), 9.0))
    assert found.arrays["REF_atomic_energies"].tolist() == [0, 1, 2, 3]
    assert found.arrays["atomic_energies"].tolist() == [0.5] * 4
    assert found.calc.results["energy"] == 2.0
    assert atoms.calc.results["energy"] == 5.0, "the frame given stays as it is"
    assert "atomic_energies" in atoms.arrays


def test_other_formats_in(checkpoint: Path, tmp_path: Path) -> None:
    """What prepare reads: a dump of LAMMPS with types named, a file whose ending says nothing, a database."""
    atoms = frames()[3]
    expected = predicted(checkpoint, [atoms], tmp_path, "out.traj")[0].calc.results
    x, y, z = atoms.cell.lengths()
    rows = [f"{i + 1} 7 {a} {b} {c}" for i, (a, b, c) in enumerate(atoms.positions)]
    bounds = [f"0 {length}" for length in (x, y, z)]
    head = ["ITEM: TIMESTEP", "0", "ITEM: NUMBER OF ATOMS", "4", "ITEM: BOX BOUNDS pp pp pp", *bounds]
    lines = [*head, "ITEM: ATOMS id type x y z", *rows]
    (tmp_path / "dump").write_text("\n".join(lines) + "\n")
    ase.io.write(tmp_path / "in.lammpstrj@1", atoms, format="extxyz")
    ase.io.write(tmp_path / "in.db", atoms)
    for file, flags in (
        ("dump", ["--species", "7=Ag", "--ase-format", "lammps-dump-text"]),
        ("in.lammpstrj@1", ["--ase-format", "extxyz"]),
        ("in.db", []),
    ):
        out = tmp_path / f"of {file}.extxyz"
        assert predict(checkpoint, tmp_path / file, out, *flags) == 0
        results = ase.io.read(out, do_not_split_by_at_sign=True).calc.results
        assert results["energy"] == pytest.approx(expected["energy"], abs=1e-6)
        assert np.abs(results["stress"] - expected["stress"]).max() < 1e-6


QBOX = Path(ase.test.__file__).parent / "testdata/qbox_test.xml"
HARTREE, BOHR = 27.211386, 0.52917721


def test_labels_of_a_format_with_units_of_its_own_are_converted() -> None:
    """Qbox's atomic units, which ASE leaves as they are; its momenta are in units of nobody's."""
    raw = ase.io.read(QBOX, index=0)
    (_, found), *_ = read_frames(QBOX, ReadOptions())
    assert found.calc.results["energy"] == pytest.approx(raw.calc.results["energy"] * HARTREE, rel=1e-6)
    forces = raw.calc.results["forces"] * HARTREE / BOHR
    assert np.abs(forces).max() > 0.01
    assert np.allclose(found.calc.results["forces"], forces, rtol=1e-6, atol=0)
    assert np.allclose(found.positions, raw.positions * BOHR, rtol=1e-6, atol=0)
    assert "momenta" in raw.arrays
    assert "momenta" not in found.arrays
    kept = with_predictions(found, {"energy": 1.0, "forces": forces * 0, "energies": np.zeros(len(raw))})
    assert kept.info["REF_energy"] == found.calc.results["energy"]
    assert np.array_equal(kept.arrays["REF_forces"], found.calc.results["forces"])


def test_units_of_the_input_are_declared(checkpoint: Path, tmp_path: Path) -> None:
    """The prediction is that of the frame in Å, and its labels are those that prepare would read."""
    crystal = frames()[0]
    expected = predicted(checkpoint, [crystal], tmp_path, "out.extxyz")[0]
    other = crystal.copy()
    other.set_cell(crystal.cell.array / BOHR)
    other.positions = crystal.positions / BOHR
    other.set_momenta(np.ones((4, 3)))
    labels = crystal.calc.results
    units = {"energy": labels["energy"] / HARTREE / 4, "forces": -labels["forces"] / HARTREE * BOHR}
    units |= {"stress": -labels["stress"] * 1602.1766, "energies": np.full(4, 2.0)}
    other.calc = SinglePointCalculator(other, **units)
    other.info |= {"virial": np.full(9, 2.0), "my_energy": 2.0}
    declared = "length=bohr,energy=Ha/atom,forces=-Ha/bohr,stress=-kBar,virial=Ha"
    found = predicted(checkpoint, [other], tmp_path, "other.extxyz", "--units", declared)[0]
    assert np.allclose(found.positions, crystal.positions, atol=1e-6)
    assert found.calc.results["energy"] == pytest.approx(expected.calc.results["energy"], abs=1e-5)
    assert found.info["REF_energy"] == pytest.approx(5.0, rel=1e-6)
    assert np.allclose(found.arrays["REF_forces"], 9.0, rtol=1e-6)
    assert np.allclose(found.info["REF_stress"], expected.info["REF_stress"], rtol=1e-6)
    assert np.allclose(found.arrays["REF_energies"], 2 * HARTREE, rtol=1e-6)
    assert np.allclose(found.info["virial"], 2 * HARTREE, rtol=1e-6)
    assert found.info["my_energy"] == 2.0, "of a name of its own nobody said what it is"
    assert "momenta" not in found.arrays
    ase.io.write(tmp_path / "one.extxyz", other)
    (read,) = read_structures(tmp_path / "one.extxyz", ReadOptions(units=parse_units(declared)))
    assert found.info["REF_energy"] == pytest.approx(read.energy, rel=1e-9)
    assert np.allclose(found.arrays["REF_forces"], read.forces, rtol=1e-6)
    assert np.allclose(np.reshape(found.info["REF_stress"], (3, 3)), read.stress, rtol=1e-6)


def test_units_that_a_database_declares_are_those_of_its_labels(tmp_path: Path) -> None:
    with ase.db.connect(tmp_path / "s.db") as database:
        database.metadata = {"_property_unit_dict": {"energy": "Hartree"}, "_distance_unit": "Ang"}
        database.write(Atoms("H2", positions=[[0, 0, 0], [0, 0, 1]]), data={"energy": np.array([-1.0])})
    ((_, found),) = read_frames(tmp_path / "s.db", ReadOptions())
    assert found.info["energy"] == pytest.approx(-HARTREE, rel=1e-6)


def test_float32_is_near(checkpoint: Path, tmp_path: Path) -> None:
    exact = predicted(checkpoint, frames(), tmp_path, "a.traj")
    near = predicted(checkpoint, frames(), tmp_path, "b.traj", "--dtype", "float32", "--max-edges", "1")
    for one, other in zip(exact, near, strict=True):
        difference = np.abs(one.calc.results["forces"] - other.calc.results["forces"]).max()
        assert difference < 1e-4
    assert one.calc.results["energy"] != other.calc.results["energy"]


def test_unknown_elements(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [frames()[3], Atoms("Au"), frames()[4], Atoms("OCu", positions=[[0, 0, 0], [0, 0, 2]])]
    ase.io.write(tmp_path / "in.extxyz", images)
    out = tmp_path / "out.extxyz"
    assert predict(checkpoint, tmp_path / "in.extxyz", out) == 2
    message = (
        r"in\.extxyz, frame 1 holds Au, which .* there it knows Cu, Ag: leave such frames out with --skip"
    )
    assert re.search(message, capsys.readouterr().err)
    assert not out.exists()
    assert predict(checkpoint, tmp_path / "in.extxyz", out, "--skip-unknown") == 0
    assert "left out 2 frame(s) with elements that the model does not know: Au, O" in capsys.readouterr().out
    assert [atoms.info["input_frame"] for atoms in ase.io.read(out, index=":")] == [0, 2]
    ase.io.write(tmp_path / "gold.extxyz", [Atoms("Au")])
    assert predict(checkpoint, tmp_path / "gold.extxyz", tmp_path / "gold.traj", "--skip-unknown") == 2
    assert "holds no frames that the model knows, of 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out.cif", "'cif' hold no energies and no forces, so .*out.cif would not hold the predictions"),
        ("out.png", "hold no energies and no forces|cannot write"),
        ("out.nonsense", "ASE knows no format of .*out.nonsense.*use an ending such as .extxyz"),
        ("out", "ASE knows no format of"),
    ],
)
def test_formats_that_cannot_hold_predictions(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    ase.io.write(tmp_path / "in.extxyz", frames())
    assert predict(checkpoint, tmp_path / "in.extxyz", tmp_path / name) == 2
    assert re.search(message, capsys.readouterr().err)
    assert [file.name for file in tmp_path.iterdir()] == ["in.extxyz"]


def test_a_format_that_holds_some(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = predicted(checkpoint, frames()[3:], tmp_path, "out.xsf")
    assert "format 'xsf' do not hold: energy, atomic energies, stress" in capsys.readouterr().err
    assert all(np.abs(atoms.calc.results["forces"]).max() > 0 for atoms in found)


def test_what_predict_refuses(
    checkpoint: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out, other = tmp_path / "in.extxyz", tmp_path / "out.extxyz", tmp_path / "bad.extxyz"
    ase.io.write(file, frames())
    out.write_text("mine")

    def refused(message: str, *arguments: str, of: Path = file, to: Path = tmp_path / "new.extxyz") -> None:
        before = sorted(tmp_path.iterdir())
        assert predict(checkpoint, of, to, *arguments) == 2
        assert re.search(message, capsys.readouterr().err)
        assert sorted(tmp_path.iterdir()) == before

    refused("exists; add --overwrite", to=out)
    assert out.read_text() == "mine"
    refused("is the input file", "--overwrite", to=file)
    refused("packed store; `megagnn evaluate` takes stores", of=store)
    refused(r"sources \['clusters', 'crystals'\], got 'slabs'", "--source", "slabs")
    refused(r"levels of theory \['EMT'\], got 'PBE'", "--level", "PBE")
    refused("does not exist", of=tmp_path / "absent.xyz")
    refused("--max-atoms must be at least 1", "--max-atoms", "0")
    refused("--units: unknown unit 'foot' of length", "--units", "length=foot")
    other.write_text("")
    refused("file is empty", of=other)
    other.write_text("0\n\n")
    refused("frame 0 has no atoms", of=other)
    other.write_text('1\npbc="T T T" Lattice="1 0 0 2 0 0 0 0 1"\nCu 0 0 0\n')
    refused("bad.extxyz, frame 0: lattice vectors of periodic directions", of=other)
    ase.io.write(other, [frames()[0], Atoms("Cu2", positions=[[0, 0, np.nan], [0, 0, 0]])])
    refused("bad.extxyz, frame 1: positions must be finite", of=other)
    other.write_text("2\n\nCu 0 0 0\nCu 0 0 2\n4\n\nCu 0 0 0\n")
    refused("cannot read .*bad.extxyz, frame 1", of=other)
    assert predict(checkpoint, file, out, "--overwrite") == 0
    assert len(ase.io.read(out, index=":")) == len(frames())
