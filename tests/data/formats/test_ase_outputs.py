"""Outputs of programs in ASE's own test data, read in place: right ones silently, others with a word."""

import importlib
from pathlib import Path

import ase.io
import ase.test
import numpy as np
import pytest

from megagnn.cli import main
from megagnn.data.formats import ReadOptions, read_structures
from megagnn.data.store import Store

DATA = Path(ase.test.__file__).parent / "testdata"

# file below testdata, or module of ase.test.fio : constant; ASE's format where the name misleads; number of
# frames; energy of the first, eV; largest force of the last, eV/Å
SILENT = [
    ("aims/singlepoint.out", "aims-output", 1, -2063.02072676, 7.80647674),
    ("aims/md.out", "aims-output", 5, -2067.77440862, None),
    ("aims/relax.out", "aims-output", 8, -15747.66513229, None),
    ("aims/socket.out", "aims-output", 6, -2067.77440862, None),
    ("aims/numerical_stress.out", "aims-output", 1, -947172.32444884, "none"),
    ("aims/issue_3345_spin_md_light.out", None, 1, -13.01742189, "none"),
    ("castep/md.castep", None, 3, -1351.30020607, 0.33052909),
    ("gpaw_expected_text_output", None, 1, -6.70731000, 0.44504000),
    ("test_espresso:pw_output_text", None, 2, -6936.64785426, 0.0),
    ("test_espresso:pw_output_cell", None, 3, -293.71196587, 0.0),
    ("test_gamess_us:BUF_PUNCH", "gamess-us-punch", 1, -2067.61410151, 1.87992042),
    ("test_gaussian_out:BUF_H2O_OPT", None, 2, -2079.65724002, 0.00906849),
    ("test_gaussian_out:BUF_F2_CCSD_T", None, 1, -5419.05182513, "none"),
    ("test_onetep:test_output", None, 1, -466.58254592, 0.24486751),
    ("runner.test_reader_writer:ref_outputfile", None, 2, -1480190.03749168, 1.41892074),
]
"""Right as they are: nothing is left out and nothing needs a word."""

TOLD = [
    ("vasp/OUTCAR_example_1", None, 1, -68.22868532, 2.39591441, "the energy is the free energy"),
    ("vasp/vasprun_dfpt.xml", None, 1, -6.74587304, 0.0, "the energy is the free energy"),
    ("qbox_test.xml", None, 5, -418.31914481, None, "stress left out"),
]

REFUSED = [
    ("aims/md.out", r"no structure found, .*--ase-format \(by its content perhaps aims-output\)"),
    ("aims/numerical_stress.out", r"by its content perhaps aims-output\)"),
    ("aims/polarization.out", r"by its content perhaps aims-output\)"),
    ("aims/DFPT_dielectric.out", r"by its content perhaps aims-output\)"),
    ("aims/preamble_fail.out", "no structure found"),
    ("lammpsdata_input.data", "perhaps lammps-data"),
    ("io/eon/multi.con", "no energy or forces found"),
    ("minerals/cod_1010930.cif", "no energy or forces found"),
    ("nomad-images.nomad-json", "no energy or forces found"),
    ("opls_structure_ext.xyz", "no energy or forces found"),
    ("vasp/convergence_OUTCAR_n_y", "Incomplete OUTCAR"),
    ("octopus/periodic_systems_30-stress.05-output_scf_info", "ASE knows no such file"),
]


def place(name: str, tmp_path: Path) -> Path:
    """The file, or a constant of one of ASE's test modules as a file."""
    module, colon, constant = name.partition(":")
    if not colon:
        path = DATA / name
        if not path.exists():
            pytest.skip(f"this version of ASE has no {name} among its test data")
        return path
    path = tmp_path / ("input.data" if module.startswith("runner") else "output.txt")
    path.write_text(getattr(importlib.import_module(f"ase.test.fio.{module}"), constant))
    return path


def check(name, ase_format, num_frames, energy, force, tmp_path):
    """Read a file and compare; returns its structures."""
    read = list(read_structures(place(name, tmp_path), ReadOptions(ase_format=ase_format)))
    assert len(read) == num_frames
    assert read[0].energy == pytest.approx(energy, abs=1e-6)
    assert all(s.converged for s in read)
    if force == "none":
        assert read[-1].forces is None
    elif force is not None:
        assert np.linalg.norm(read[-1].forces, axis=1).max() == pytest.approx(force, abs=1e-6)
    return read


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "ase_format", "num_frames", "energy", "force"), SILENT)
def test_right_outputs_stay_silent(tmp_path, name, ase_format, num_frames, energy, force):
    read = check(name, ase_format, num_frames, energy, force, tmp_path)
    assert [s.notes for s in read] == [()] * num_frames


@pytest.mark.filterwarnings("ignore")
def test_right_outputs_prepared_together_bring_no_warning(tmp_path):
    def sources(names):
        return [f"S{k}={place(name, tmp_path)}" for k, name in enumerate(names)]

    of_aims = [name for name, ase_format, *_ in SILENT if ase_format == "aims-output"]
    others = [name for name, ase_format, *_ in SILENT if ase_format is None and ":" not in name]
    common = ("--group-by", "file", "--split", "1,0,0", "--out")
    assert (
        main(["prepare", *sources(of_aims), *common, str(tmp_path / "a"), "--ase-format", "aims-output"]) == 0
    )
    assert main(["prepare", *sources(others), *common, str(tmp_path / "b")]) == 0
    assert Store.open(tmp_path / "a").header.warnings == ()
    assert Store.open(tmp_path / "b").header.warnings == ()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "ase_format", "num_frames", "energy", "force", "word"), TOLD)
def test_what_is_changed_is_told(tmp_path, name, ase_format, num_frames, energy, force, word):
    read = check(name, ase_format, num_frames, energy, force, tmp_path)
    assert all(any(word in note for note in s.notes) for s in read)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "message"), REFUSED)
def test_what_holds_no_labels_is_refused(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        list(read_structures(place(name, tmp_path)))


@pytest.mark.filterwarnings("ignore")
def test_charge_and_spin_of_outputs(tmp_path):
    sample = place("runner.test_reader_writer:sample_inputfile", tmp_path)
    assert [s.charge for s in read_structures(sample)] == [-0.5084291, -0.4569438]
    text = importlib.import_module("ase.test.fio.test_gaussian_out").BUF_H2O_OPT
    path = tmp_path / "run.log"
    path.write_text(text.replace("\n", "\n Charge =  1 Multiplicity = 2\n", 1))
    read = list(read_structures(path, ReadOptions(ase_format="gaussian-out")))
    assert [(s.charge, s.multiplicity) for s in read] == [(1.0, 2)] * 2


def test_atomic_units_of_qbox_are_converted():
    path = DATA / "qbox_04_md_ntc.reference.xml"
    (read,) = read_structures(path)
    assert read.energy == pytest.approx(-66.759546 * 27.211386, rel=1e-6)
    lengths = np.linalg.norm(read.cell, axis=1)
    assert lengths == pytest.approx(np.linalg.norm(ase.io.read(path).cell.array, axis=1) * 0.52917721)


def test_forces_in_other_axes_than_positions_are_left_out(tmp_path):
    """Gaussian prints forces in the axes of the input; ASE pairs them with whatever positions it finds."""
    text = importlib.import_module("ase.test.fio.test_gaussian_out").BUF_H2O_OPT
    path = tmp_path / "run.log"
    path.write_text(text.replace("Input orientation:", "Standard orientation:"))
    read = list(read_structures(path, ReadOptions(ase_format="gaussian-out")))
    assert [s.forces for s in read] == [None] * len(read)
    assert all("forces left out: they are in the axes of the input" in s.notes[0] for s in read)
