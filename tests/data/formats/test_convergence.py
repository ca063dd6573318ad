"""Frames whose electronic steps did not converge, program by program, and the energy that forces belong to.

Outputs of programs are those of ASE's own test data, in place, changed as a run that failed would have them.
"""

import importlib
from pathlib import Path

import ase.test
import numpy as np
import pytest
from ase.test.fio.test_espresso import pw_output_text

from megagnn.data.formats import ReadOptions, ase_formats, read_structures
from tests.data.formats.frames import crystal, write

DATA = Path(ase.test.__file__).parent / "testdata"
REACHED = "aborting loop because EDIFF is reached"


def outcar(tmp_path, change=lambda text: text, num_frames=2):
    """An OUTCAR of several equal steps, the last of them changed."""
    text = (DATA / "vasp/OUTCAR_example_1").read_text()
    start = text.index("Iteration    1(   1)")
    start = text.rindex("\n", 0, start) + 1
    end = text.index("FREE ENERGIE OF THE ION-ELECTRON SYSTEM")
    end = text.index("energy  without entropy", end)
    end = text.index("\n", end) + 1
    step = text[start:end]
    path = tmp_path / "OUTCAR"
    path.write_text(text[:start] + step * (num_frames - 1) + change(step) + text[end:])
    return path


def converged(path, **options):
    return [s.converged for s in read_structures(path, ReadOptions(**options))]


def test_outcar(tmp_path):
    assert converged(outcar(tmp_path)) == [True, True]
    failed = outcar(
        tmp_path, lambda s: s.replace(REACHED, "aborting loop EDIFF was not reached (unconverged)")
    )
    assert converged(failed) == [True, False]


def test_outcar_of_an_older_vasp_says_it_by_the_number_of_steps(tmp_path):
    silent = outcar(tmp_path, lambda s: s.replace(REACHED, ""))
    assert converged(silent) == [True, True]  # 63 of 120 steps: stopped by something else
    silent.write_text(silent.read_text().replace("NELM   =    120", "NELM   =     63"))
    assert converged(silent) == [True, False]


def test_energy_of_outcar_is_the_one_forces_belong_to(tmp_path):
    path = DATA / "vasp/OUTCAR_example_1"
    (read,) = read_structures(path)
    assert read.energy == pytest.approx(-68.22868532, abs=1e-8)
    assert read.notes == ("the energy is the free energy, whose derivative the forces are",)
    (other,) = read_structures(path, ReadOptions(energy_key="energy"))
    assert other.energy == pytest.approx(-68.23102426, abs=1e-8)
    assert np.array_equal(other.forces, read.forces)
    assert other.notes == ()


def vasprun(tmp_path, num_allowed, tolerance):
    text = (DATA / "vasp/vasprun_pstress.xml").read_text()
    assert 'name="NELM">    60<' in text
    path = tmp_path / "vasprun.xml"
    path.write_text(
        text.replace('name="NELM">    60<', f'name="NELM">{num_allowed}<').replace(
            '<i name="EDIFF">      0.00010000</i>', f'<i name="EDIFF">{tolerance}</i>'
        )
    )
    return path


def test_vasprun(tmp_path):
    num_steps = (DATA / "vasp/vasprun_pstress.xml").read_text().count("<scstep>")
    assert converged(vasprun(tmp_path, 60, 1e-4)) == [True]
    assert converged(vasprun(tmp_path, num_steps, 1e-12)) == [False]
    assert converged(vasprun(tmp_path, num_steps, 1.0)) == [True]  # at the last step allowed, but reached
    (free,) = read_structures(DATA / "vasp/vasprun_pstress.xml")
    (zero,) = read_structures(DATA / "vasp/vasprun_pstress.xml", ReadOptions(energy_key="energy"))
    assert (free.energy, zero.energy) == pytest.approx((-20.24695937, -20.24720098), abs=1e-7)


def test_quantum_espresso(tmp_path):
    path = tmp_path / "run.pwo"
    path.write_text(pw_output_text)
    assert converged(path) == [True, True]
    first, second = pw_output_text.split("ATOMIC_POSITIONS", 1)
    failed = second.replace(
        "!    total energy", "convergence NOT achieved after 100 iterations\n     total energy"
    )
    assert failed != second
    path.write_text(first + "ATOMIC_POSITIONS" + failed)
    assert converged(path) == [True, False]
    assert [s.energy is None for s in read_structures(path)] == [False, True]


def test_fhi_aims(tmp_path):
    text = (DATA / "aims/md.out").read_text()
    path = tmp_path / "aims.out"
    last = text.rindex("Self-consistency cycle converged.")
    word = "* WARNING! SELF-CONSISTENCY CYCLE DID NOT CONVERGE\n  "
    path.write_text(text[:last] + word + text[last:])
    assert converged(path, ase_format="aims-output") == [True] * 4 + [False]
    cut = text[: text.index("Have a nice day")]  # killed before its end: what is there counts
    path.write_text(cut)
    assert converged(path, ase_format="aims-output") == [True] * 5


def test_orca(tmp_path):
    path = tmp_path / "orca.out"
    path.write_text(
        " * O   R   C   A *\nNumber of atoms   ... 2\nCARTESIAN COORDINATES (ANGSTROEM)\n---\n"
        "  H  0.0 0.0 0.0\n  H  0.0 0.0 0.7\n\n"
        "FINAL SINGLE POINT ENERGY (Wavefunction not fully converged!) -1.1\nORCA TERMINATED NORMALLY\n"
    )
    assert converged(path, ase_format="orca-output") == [False]


def test_gaussian(tmp_path):
    text = importlib.import_module("ase.test.fio.test_gaussian_out").BUF_H2O_OPT
    path = tmp_path / "run.log"
    last = text.rindex("SCF Done:")
    path.write_text(text[:last] + ">>>>>>>>>> Convergence criterion not met.\n " + text[last:])
    assert converged(path) == [True, False]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("converged", "F", False),
        ("scf_converged", "False", False),
        ("converged", "T", True),
        ("convergence", 0, True),
    ],
)
def test_what_extended_xyz_says(tmp_path, key, value, expected):
    assert converged(write(tmp_path / "a.xyz", crystal(**{key: value}))) == [expected]


def test_rules_by_their_lines():
    end = "  FREE ENERGIE OF THE ION-ELECTRON SYSTEM (eV)"
    steps = ["   NELM   =      2;", "--- Iteration    1(   1)  ---", "--- Iteration    1(   2)  ---"]
    assert ase_formats.outcar([*steps, end]) == [False]
    assert ase_formats.outcar([*steps, REACHED, end, "--- Iteration    2(   1)  ---", end]) == [True, True]
    assert ase_formats.espresso(["Program PWSCF", "End of self-consistent calculation"]) == [True]
    assert ase_formats.espresso(["Program PWSCF", "ATOMIC_POSITIONS", "!    total energy"]) == [True]
    assert ase_formats.converged_frames(Path("nowhere"), "vasp-out") == []
