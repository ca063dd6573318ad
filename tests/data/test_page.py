"""`megagnn inspect STORE --html PAGE`: numbers of a survey by hand, pictures, and the page itself."""

import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from ase.data import covalent_radii

from megagnn.cli import main
from megagnn.data.inspect import baseline_of
from megagnn.data.page import place_of
from megagnn.data.picture import MAX_ATOMS, _principal, picture
from megagnn.data.store import Store, write_store
from megagnn.data.survey import DISTANCE_BINS, FORCE_BINS, survey
from tests.data.conftest import make_crystal, make_structure


def surveys(path, cutoff=5.0, num_sampled=1000):
    store = Store.open(path)
    return list(survey(store, baseline_of(store, store.isolated_atoms()), cutoff, num_sampled))


def hydrogen(k, length, force):
    return make_structure(
        2,
        k,
        atomic_numbers=np.array([1, 1], np.uint8),
        positions=np.array([[0.0, 0.0, 0.0], [0.0, 0.0, length]]),
        energy=-30.0,
        forces=np.array([[0.0, 0.0, force], [0.0, 0.0, -force]]),
        group=f"H2 {k}",
    )


def test_numbers_by_hand(tmp_path):
    structures = [hydrogen(k, 0.74, 1.0) for k in range(9)] + [replace(hydrogen(9, 1.4, 20.0), energy=-26.0)]
    structures[0] = replace(structures[0], forces=None)
    write_store(tmp_path / "s", structures, splits=np.array([0] * 9 + [2], np.uint8))
    (found,) = surveys(tmp_path / "s")
    assert (found.source, found.num_structures, len(found.rows)) == ("A", 10, 10)
    assert found.atoms[1] == 20
    assert found.structures.sum() == 10
    assert found.values["atoms"].tolist() == [2.0] * 10
    assert found.values["edges"].tolist() == [1.0] * 10
    assert found.values["energy"] == pytest.approx([0.0] * 9 + [2.0], abs=1e-6)
    assert np.isnan(found.values["force"][0])
    assert found.values["force"][1:] == pytest.approx([1.0] * 8 + [20.0])
    assert found.values["distance"] == pytest.approx(np.array([0.74] * 9 + [1.4]) / (2 * covalent_radii[1]))
    assert found.force_counts.sum() == 18
    assert found.force_counts[np.searchsorted(FORCE_BINS, 20.0) - 1] == 2
    assert found.distance_counts.sum() == 20
    assert found.distance_counts[np.searchsorted(DISTANCE_BINS, 0.74 / 0.62) - 1] == 18
    assert [row for row, *_ in found.farthest("energy", 1)] == [9]
    assert [row for row, *_ in found.farthest("force", 1)] == [9]
    assert found.farthest("distance", 1)[0][0] != 9  # the shortest are meant
    (near,) = surveys(tmp_path / "s", cutoff=1.0)
    assert near.values["edges"].tolist() == [1.0] * 9 + [0.0]
    assert np.isnan(near.values["distance"][9])


def test_samples_are_even_and_of_each_source(tmp_path):
    structures = [
        make_structure(3, k, source="rare" if k % 20 == 0 else "A", group=str(k)) for k in range(60)
    ]
    write_store(tmp_path / "s", structures, splits=np.zeros(60, np.uint8))
    rare, common = surveys(tmp_path / "s", num_sampled=20)
    assert rare.rows.tolist() == [0, 20, 40]
    assert (common.num_structures, len(common.rows)) == (57, 19)
    assert np.diff(common.rows).max() <= 4
    with pytest.raises(
        ValueError, match=r"--cutoff and --sample must be positive, got 0 Å and 20 structures"
    ):
        surveys(tmp_path / "s", cutoff=0, num_sampled=20)


def test_places_of_elements():
    places = {z: place_of(z) for z in range(1, 119)}
    assert len(set(places.values())) == 118
    assert [places[z] for z in (1, 2, 5, 14, 26, 57, 71, 72, 86, 118)] == [
        *((0, 0), (0, 17), (1, 12), (2, 13), (3, 7)),
        *((7, 2), (7, 16), (5, 3), (5, 17), (6, 17)),
    ]


def test_pictures_are_whole_and_in_their_frame():
    for s in (
        make_structure(7),
        make_crystal(8),
        make_structure(1),
        make_crystal(4, pbc=np.array([1, 1, 0], bool)),
    ):
        svg = ElementTree.fromstring(picture(s.atomic_numbers, s.positions, s.cell, s.pbc))
        circles = svg.findall("circle")
        assert len(circles) == s.num_atoms
        assert len([line for line in svg.findall("line") if line.get("stroke-dasharray")]) == 12 * bool(
            s.pbc.all()
        )
        for circle in circles:
            x, y, r = (float(circle.get(name)) for name in ("cx", "cy", "r"))
            assert r <= x <= 206 - r
            assert r <= y <= 206 - r
    many = make_structure(MAX_ATOMS + 1)
    assert picture(many.atomic_numbers, many.positions, many.cell, many.pbc) == ""


def test_a_picture_is_no_mirror_image():
    """A left hand stays one from wherever it is seen: the turn of a molecule has determinant 1."""
    for seed in range(8):
        positions = np.random.default_rng(seed).normal(size=(5, 3))
        turn = _principal(positions - positions.mean(axis=0))
        assert np.linalg.det(turn) == pytest.approx(1.0)
        spread = np.var(positions @ turn, axis=0)
        assert spread[0] >= spread[1] >= spread[2]


def test_names_of_one_structure_are_those_of_all(tmp_path):
    structures = [
        make_structure(3, k, group=str(k), file=f"{k % 2}.xyz", config_type="bulk" * (k % 3 == 0))
        for k in range(6)
    ]
    write_store(tmp_path / "s", structures, splits=np.zeros(6, np.uint8))
    store = Store.open(tmp_path / "s")
    assert [store.file_of(k) for k in range(6)] == store.files().tolist()
    assert [store.config_type_of(k) for k in range(6)] == store.config_types().tolist()
    write_store(tmp_path / "t", [make_structure(3)], splits=np.zeros(1, np.uint8))
    plain = Store.open(tmp_path / "t")
    assert (plain.file_of(0), plain.config_type_of(0)) == ("", "")


def test_the_page(tmp_path, capsys, monkeypatch):
    for name in ("files", "config_types"):  # of all structures, 1e8 names; memory is that of the sample
        monkeypatch.setattr(Store, name, lambda _: pytest.fail("names of all structures were made"))
    structures = [make_structure(4, k, group=str(k)) for k in range(12)]
    structures += [make_crystal(4, k, source="<B>", group=f"c{k}") for k in range(12)]
    write_store(tmp_path / "s", structures, splits=np.zeros(24, np.uint8))
    page = tmp_path / "pages" / "s.html"
    assert main(["inspect", str(tmp_path / "s"), "--html", str(page), "--sample", "6", "--cutoff", "3"]) == 0
    assert f"wrote {page}" in capsys.readouterr().out
    text = page.read_text()
    assert "<h2>A</h2>" in text
    assert "<h2>&lt;B&gt;</h2>" in text
    assert "12 structures, of which a sample of 6, evenly over all, are shown" in text
    assert "Edges within 3 Å" in text
    links, cards = re.findall(r'href="#([^"]+)"', text), re.findall(r'<div class="frame" id="([^"]+)"', text)
    assert set(links) == set(cards)
    assert len(cards) == len(set(cards))
    assert not re.search(r'(src|href)="(?!#|data:)', text)  # nothing is fetched


def test_pages_are_of_stores(tmp_path, capsys):
    (tmp_path / "a.xyz").write_text("1\nenergy=-1\nH 0 0 0\n")
    assert main(["inspect", str(tmp_path / "a.xyz"), "--html", "p.html"]) == 2
    assert "--html draws a packed store" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "a.xyz"), "--sample", "5"]) == 2
    assert "add --html PAGE" in capsys.readouterr().err
