"""`megagnn prepare` on published formats: what the store then holds, and what it says of where it is from."""

from pathlib import Path

import pytest

from megagnn.cli import main
from megagnn.data.store import Store

FILES = Path(__file__).parent / "files"


def prepare(out, *arguments):
    assert main(["prepare", *map(str, arguments), "--out", str(out)]) == 0
    return Store.open(out)


def test_sources_of_several_formats(tmp_path):
    pytest.importorskip("h5py", reason="h5py is not installed")
    files = [f"ani={FILES / 'ani1x.h5'}", f"spice={FILES / 'spice.h5'}", f"dp={FILES / 'deepmd'}"]
    store = prepare(tmp_path / "store", *files, "--split", "0,0,1")
    assert store.header.sources == ("ani", "spice", "dp")
    assert store.header.levels == ("wB97X/6-31G(d)", "wB97M-D3BJ/def2-TZVPPD", "unknown")
    assert len(store) == 12 + 8 + 5
    assert store.header.provenance["spice"]["num_read"] == 8
    names = store.group_names()
    assert {names[g] for g in store.group[store.source == 1]} == {"SPICE methane", "SPICE water"}
    first = store.structure(0)
    assert first["energy"] == pytest.approx(-500, abs=0.1)


def test_a_wrong_unit_is_found(tmp_path, capsys):
    arguments = [
        "prepare",
        str(FILES / "rmd17_water.npz"),
        "--out",
        str(tmp_path / "s"),
        "--group-by",
        "frame",
    ]
    assert main([*arguments, "--units", "energy=eV"]) == 2
    assert "energy" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_a_damaged_file_among_others(tmp_path):
    pytest.importorskip("lmdb", reason="lmdb is not installed")
    broken = tmp_path / "broken.lmdb"
    broken.write_bytes((FILES / "oc22.lmdb").read_bytes()[:8192])
    good = FILES / "oc20.lmdb"
    store = prepare(
        tmp_path / "store", good, broken, "--on-bad", "skip", "--group-by", "frame", "--source", "oc"
    )
    assert len(store) == 3
    assert store.header.provenance["oc"]["rejected"] == {"unreadable": 1}
    assert any("broken.lmdb: nothing could be read" in line for line in store.header.warnings)
