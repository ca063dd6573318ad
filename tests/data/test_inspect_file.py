"""`megagnn inspect FILE`: what is told of files before they are prepared."""

from pathlib import Path

import numpy as np
import pytest

from megagnn.cli import main
from tests.data.formats.frames import crystal, write

FILES = Path(__file__).parent / "files"


def said_of(path, capsys):
    assert main(["inspect", str(path)]) == 0
    return capsys.readouterr().out


def test_of_hdf5(capsys):
    pytest.importorskip("h5py", reason="h5py is not installed")
    said = said_of(FILES / "ani1x.h5", capsys)
    assert "format hdf5 (ANI-1x)" in said
    assert "structures   12 in 2 groups of the file; 12 were read" in said
    assert "ccsd(t)_cbs.energy" in said
    assert "units there  energy Ha, forces Ha/Å" in said
    assert "levels       wB97X/6-31G(d)" in said
    assert "elements     H 36, C 6, O 6" in said
    assert "groups       2: H4C, H2O" in said
    assert "energy       12 of 12, -100 to -99.9" in said
    assert "forces       12 of 12, root mean square 0." in said


def test_of_lmdb(capsys):
    pytest.importorskip("lmdb", reason="lmdb is not installed")
    said = said_of(FILES / "slabs.aselmdb", capsys)
    assert "format lmdb (ASE)" in said
    assert "structures   2; 2 were read" in said
    assert "periodic     2 along 3 axes" in said
    assert "stress       2 of 2" in said


def test_of_any_other_file(tmp_path, capsys):
    path = write(tmp_path / "some.xyz", *(crystal(k) for k in range(201)), "3\n")
    said = said_of(path, capsys)
    assert "structures   at least 200; 200 were read" in said
    broken = write(tmp_path / "few.xyz", crystal(0), "3\nLattice=1\n")
    assert "unreadable   1 of them; the first: cannot read" in said_of(broken, capsys)


@pytest.mark.parametrize("text", ["hello", ""])
def test_of_a_file_that_is_nothing(text, tmp_path, capsys):
    write(tmp_path / "none.xyz", text)
    assert main(["inspect", str(tmp_path / "none.xyz")]) == 2
    assert "none.xyz is neither a checkpoint nor data that can be read: " in capsys.readouterr().err


def test_of_an_archive_of_units_that_are_not_known(tmp_path, capsys):
    with np.load(FILES / "sgdml_water.npz") as file:
        np.savez(tmp_path / "a.npz", **{**file, "e_unit": "furlong"})
    said = said_of(tmp_path / "a.npz", capsys)
    assert "units there  energy furlong, forces furlong/" in said
    assert "give them with --units of megagnn prepare" in said
    (tmp_path / "a.npz").write_bytes((FILES / "sgdml_water.npz").read_bytes()[:-40])
    assert main(["inspect", str(tmp_path / "a.npz")]) == 2
    assert "frame 0: File is not a zip file; is the file whole?" in capsys.readouterr().err
