"""OC20's extended XYZ with the lines beside it: systems, references, fixed atoms, files that do not match."""

import lzma

import numpy as np
import pytest

from megagnn.data.formats import ReadOptions, read_structures

FRAME = """3
Lattice="4.0 0.0 0.0 0.0 4.0 0.0 0.0 0.0 20.0" \
Properties=species:S:1:pos:R:3:move_mask:L:1:tags:I:1:forces:R:3 \
energy=-181.{k} free_energy=-181.9 pbc="T T T"
Cu 0.00000000 0.00000000 5.00000000 F 0 0.50000000 0.00000000 -0.25000000
Cu 2.00000000 2.00000000 6.00000000 T 1 0.10000000 0.00000000 0.00000000
O 2.00000000 2.00000000 7.80000000 T 2 -0.60000000 0.00000000 0.25000000
""".replace("\\\n", "")


def archive(folder, num_lines=3, xz=True, damage=None):
    frames = [FRAME.format(k=k) for k in range(3)]
    if damage is not None:
        frames[damage] = frames[damage].replace("4.0 0.0 0.0 0.0", "4.0 0.0")
    lines = "".join(f"random{7 + k // 2},frame{10 * k},-{100 + k}.5\n" for k in range(num_lines))
    for name, text in (("0.extxyz", "".join(frames)), ("0.txt", lines)):
        path = folder / f"{name}.xz" if xz else folder / name
        path.write_bytes(lzma.compress(text.encode()) if xz else text.encode())
    return folder / ("0.extxyz.xz" if xz else "0.extxyz")


@pytest.mark.parametrize("xz", [True, False])
def test_frames_systems_and_fixed_atoms(tmp_path, xz):
    found = list(read_structures(archive(tmp_path, xz=xz)))
    assert [s.energy for s in found] == [
        -181.0,
        -181.1,
        -181.2,
    ]  # not the free energy, not less the reference
    assert [s.group for s in found] == ["OC20 7", "OC20 7", "OC20 8"]
    assert found[0].fixed.tolist() == [True, False, False]
    assert found[0].forces[0].tolist() == [0.5, 0, -0.25]
    assert found[0].level == "RPBE"
    assert found[0].pbc.all()


def test_energies_of_adsorption(tmp_path):
    options = ReadOptions(energy_key="adsorption_energy", forces_key="forces")
    found = list(read_structures(archive(tmp_path), options))
    assert [s.energy for s in found] == pytest.approx([-80.5, -79.6, -78.7])
    by_frame = read_structures(archive(tmp_path), ReadOptions(group_by="info:fid"))
    assert [s.group for s in by_frame] == ["frame0", "frame10", "frame20"]


@pytest.mark.parametrize(
    ("num_lines", "said"),
    [
        (2, "frame 2: 0.txt.xz has no system for it, but ''"),
        (4, "goes on after frame 2, the last of 0.extxyz.xz"),
    ],
)
def test_files_that_do_not_match_are_refused(num_lines, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        list(read_structures(archive(tmp_path, num_lines)))


def test_a_frame_that_cannot_be_read_shifts_no_line(tmp_path):
    told = []
    found = list(read_structures(archive(tmp_path, damage=1), ReadOptions(on_unreadable=told.append)))
    assert len(told) == 1
    assert [s.group for s in found] == ["OC20 7", "OC20 8"]


def test_other_files_of_the_name_are_left_alone(tmp_path):
    path = archive(tmp_path)
    (tmp_path / "0.txt.xz").write_bytes(lzma.compress(b"notes on the set\n"))
    found = list(read_structures(path))
    assert [s.group for s in found] == ["OCu2"] * 3
    assert np.isfinite(found[0].forces).all()
