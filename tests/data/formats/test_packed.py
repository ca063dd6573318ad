"""Archives of stores: the same bytes every time, safe to unpack, damage told."""

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from megagnn.data.formats import ReadOptions, detect_format, read_structures
from megagnn.data.formats.packed import store_header, unpack_store
from megagnn.data.store import Store
from tools.pack_store import pack_store

TOOL = Path(__file__).parents[3] / "tools" / "pack_store.py"


@pytest.fixture
def archive(structures, make_store, tmp_path):
    pack_store(make_store(structures), tmp_path / "sample.tar.xz")
    return tmp_path / "sample.tar.xz"


def test_round_trip(structures, archive, tmp_path):
    store = unpack_store(archive, tmp_path / "back")
    original = tmp_path / "store"
    for file in original.iterdir():
        assert file.read_bytes() == (tmp_path / "back" / file.name).read_bytes()
    assert len(store) == len(structures)
    assert store_header(archive) == store_header(original)
    assert store.header.provenance == {"A": {"engine": "toy"}}


def test_same_bytes_every_time(archive, tmp_path):
    first = archive.read_bytes()
    store = tmp_path / "store"
    (store / "num_edges-5.0.npy").write_bytes(b"a cache, which is not packed")
    for file in store.iterdir():
        file.touch()
    pack_store(store, tmp_path / "again.tar.xz")
    assert (tmp_path / "again.tar.xz").read_bytes() == first


def test_tool(archive, tmp_path):
    result = subprocess.run(
        [sys.executable, TOOL, tmp_path / "store", tmp_path / "tool.tar.xz"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "tool.tar.xz").read_bytes() == archive.read_bytes()
    result = subprocess.run(
        [sys.executable, TOOL, tmp_path, tmp_path / "x.tar.xz"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "is not a store" in result.stderr


@pytest.mark.parametrize("from_archive", [True, False])
def test_read_back_as_structures(structures, archive, tmp_path, from_archive):
    path = archive if from_archive else tmp_path / "store"
    assert detect_format(path) == "store"
    back = list(read_structures(path))
    assert [s.source for s in back] == [s.source for s in structures]
    assert [s.level for s in back] == [s.level for s in structures]
    assert [s.energy for s in back] == [s.energy for s in structures]
    assert [s.group for s in back] == [s.group for s in structures]
    assert [s.split for s in back] == Store.open(tmp_path / "store").split.tolist()
    for old, new in zip(structures, back, strict=True):
        assert np.allclose(old.positions, new.positions, atol=1e-6)
        assert (old.forces is None) == (new.forces is None)
        assert (old.stress is None) == (new.stress is None)
        assert (old.fixed is None) == (new.fixed is None)
    renamed = list(read_structures(path, ReadOptions(source="mine", level="GFN2")))
    assert {(s.source, s.level) for s in renamed} == {("mine", "GFN2")}


def forge(path, *members):
    with tarfile.open(path, "w:xz") as tar:
        for name, kind in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            info.linkname = "/etc/passwd"
            info.size = 4 if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(b"evil"))


@pytest.mark.parametrize(
    "member",
    [
        ("../evil.npy", tarfile.REGTYPE),
        ("/tmp/evil.npy", tarfile.REGTYPE),
        ("a/../../header.json", tarfile.REGTYPE),
        ("sub/header.json", tarfile.REGTYPE),
        ("evil.py", tarfile.REGTYPE),
        ("header.json", tarfile.SYMTYPE),
        ("header.json", tarfile.LNKTYPE),
        ("header.json", tarfile.DIRTYPE),
        ("header.json", tarfile.FIFOTYPE),
    ],
)
def test_refuses_anything_but_the_files_of_a_store(tmp_path, member):
    forge(tmp_path / "evil.tar.xz", member)
    with pytest.raises(ValueError, match="not a plain file of a store; refused"):
        unpack_store(tmp_path / "evil.tar.xz", tmp_path / "deep" / "out")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["deep", "evil.tar.xz"]


def test_refuses_a_file_given_twice(tmp_path):
    forge(tmp_path / "evil.tar.xz", ("energy.npy", tarfile.REGTYPE), ("energy.npy", tarfile.REGTYPE))
    with pytest.raises(ValueError, match="refused"):
        unpack_store(tmp_path / "evil.tar.xz", tmp_path / "out")


@pytest.mark.parametrize("left", [0, 100, -500])
def test_truncated_archive(archive, tmp_path, left):
    archive.write_bytes(archive.read_bytes()[:left])
    with pytest.raises(ValueError, match=r"cannot unpack .*sample.tar.xz|lacks|is not a store"):
        unpack_store(archive, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sample.tar.xz", "store"]


def test_archive_of_a_changed_store_fails_its_checksum(archive, tmp_path):
    store = tmp_path / "store"
    data = bytearray((store / "energy.npy").read_bytes())
    data[-2] ^= 1
    (store / "energy.npy").write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        pack_store(store, tmp_path / "bad.tar.xz")
    with tarfile.open(tmp_path / "bad.tar.xz", "w:xz") as tar:
        for file in store.iterdir():
            tar.add(file, file.name)
    with pytest.raises(ValueError, match=r"energy.npy does not match its checksum"):
        unpack_store(tmp_path / "bad.tar.xz", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refuses_names_and_places(archive, tmp_path):
    with pytest.raises(ValueError, match=r"named \*\.tar\.xz"):
        pack_store(tmp_path / "store", tmp_path / "sample.zip")
    with pytest.raises(ValueError, match="exists already"):
        unpack_store(archive, tmp_path / "store")
    with pytest.raises(ValueError, match="is not a file"):
        unpack_store(tmp_path / "nowhere.tar.xz", tmp_path / "out")
    assert len(Store.open(tmp_path / "store")) > 0
