"""Trajectories of CP2K: units, forces and cells of the same step, files that are missing or cut short."""

import numpy as np
import pytest

from megagnn.data.formats import ReadOptions, detect_format, parse_units, read_structures

HA, HA_PER_BOHR = 27.211386245988, 51.42206747632596
"""eV, eV/Å."""


def xyz(steps, rows):
    """Frames of three atoms with CP2K's comment lines, `rows(step)` beside the names."""
    text = ""
    for step in steps:
        text += f"       3\n i = {step:8d}, time = {0.5 * step:12.3f}, E = {-17.25 - 0.001 * step:20.10f}\n"
        text += "".join(
            f"  {name} {x:20.10f} {y:20.10f} {z:20.10f}\n"
            for name, (x, y, z) in zip(("O", "H", "H"), rows(step), strict=True)
        )
    return text


def water(step):
    return [(0.0, 0.0, 0.12 + 0.01 * step), (0.0, 0.76, -0.48), (0.0, -0.76, -0.48)]


def forces(step):
    return [(0.0, 0.0, 0.02 * step), (0.0, 0.0, -0.01 * step), (0.0, 0.0, -0.01 * step)]


def trajectory(folder, steps=(0, 1, 2), force_steps=(0, 1, 2), cells=((0, 8.0), (2, 9.0))):
    lines = ["#   Step   Time [fs]       Ax [Angstrom]       Ay [Angstrom] ...    Volume [Angstrom^3]"]
    lines += [f"{step} {0.5 * step} {a} 0 0 0 {a} 0 1 0 {a} {a**3}" for step, a in cells]
    (folder / "w-pos-1.xyz").write_text(xyz(steps, water))
    (folder / "w-frc-1.xyz").write_text(xyz(force_steps, forces))
    (folder / "w-1.cell").write_text("\n".join(lines) + "\n")
    return folder / "w-pos-1.xyz"


def test_labels_and_cells_of_each_step(tmp_path):
    path = trajectory(tmp_path)
    assert detect_format(path) == "cp2k"
    found = list(read_structures(path))
    assert [s.energy / HA for s in found] == pytest.approx([-17.25, -17.251, -17.252])
    assert [s.forces[0, 2] / HA_PER_BOHR for s in found] == pytest.approx([0, 0.02, 0.04])
    assert found[1].positions[0].tolist() == [0, 0, 0.13]
    assert [s.cell[0, 0] for s in found] == [8, 8, 9]
    assert found[0].cell[2].tolist() == [1, 0, 8]
    assert found[0].pbc.all()
    assert found[0].group == "H2O"


def test_forces_of_fewer_steps(tmp_path):
    found = list(read_structures(trajectory(tmp_path, force_steps=(1, 3))))
    assert [s.forces is None for s in found] == [True, False, True]
    assert found[1].forces[1, 2] == pytest.approx(-0.01 * HA_PER_BOHR)
    (tmp_path / "w-frc-1.xyz").unlink()
    assert all(s.forces is None for s in read_structures(tmp_path / "w-pos-1.xyz"))


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("w-pos-1.xyz", {"steps": (1, 2, 3, 2, 3)}),
        ("w-frc-1.xyz", {"force_steps": (1, 2, 3, 2, 3)}),
        ("w-1.cell", {"cells": [(step, 8.0) for step in (1, 2, 3, 2, 3)]}),
    ],
)
def test_steps_that_come_again_are_refused(file, change, tmp_path):
    path = trajectory(
        tmp_path, **{"steps": (1, 2, 3), "force_steps": (1, 2, 3), "cells": [(1, 8.0)], **change}
    )
    with pytest.raises(ValueError, match=rf"{file}: step 2 comes after step 3, .*; cut the files .* there"):
        list(read_structures(path))


def test_empty_lines_at_the_end_are_no_frames(tmp_path):
    path = trajectory(tmp_path)
    path.write_text(path.read_text() + "\n\n")
    assert len(list(read_structures(path))) == 3


def test_units_of_the_user_come_first(tmp_path):
    found = next(read_structures(trajectory(tmp_path), ReadOptions(units=parse_units("energy=eV"))))
    assert found.energy == -17.25


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("w-1.cell", None, "there is no w-1.cell beside it, so the cell is not known; print it"),
        ("w-1.cell", lambda text: "# nothing\n", "w-1.cell: it holds no cell"),
        ("w-1.cell", lambda text: text.replace("8.0", "x"), "w-1.cell: could not convert string to float"),
        (
            "w-pos-1.xyz",
            lambda text: text[:-80],
            r"frame 2: it is cut short, or a line of its 3 atoms is; is",
        ),
        (
            "w-pos-1.xyz",
            lambda text: text.replace("i =        1", "j = 1"),
            "frame 1: its comment has no step",
        ),
        ("w-frc-1.xyz", lambda text: text[:-80], "w-frc-1.xyz, frame 2: it is cut short"),
        (
            "w-pos-1.xyz",
            lambda text: text.replace("       3\n i =        1", "\n       3\n i =        1"),
            "w-pos-1.xyz: an empty line after frame 0, and more after it; remove",
        ),
        ("w-pos-1.xyz", lambda text: text.replace(" O ", " OW "), "unknown species OW; say which elements"),
    ],
)
def test_broken_files_are_refused(name, change, said, tmp_path):
    path = trajectory(tmp_path)
    if change is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(change((tmp_path / name).read_text()))
    with pytest.raises(ValueError, match=said):
        list(read_structures(path))


def test_species_are_named_by_the_user(tmp_path):
    path = trajectory(tmp_path)
    path.write_text(path.read_text().replace(" O ", " OW "))
    assert np.array_equal(
        next(read_structures(path, ReadOptions(species={"OW": "O"}))).atomic_numbers, [8, 1, 1]
    )
