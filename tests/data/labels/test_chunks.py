from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from megagnn.data.labels import run as run_module
from megagnn.data.labels.chunks import GROUPS_PER_CHUNK, as_stored, load_chunk, make_chunk, save_chunk
from megagnn.data.labels.engines import EffectiveMedium, LabelError, Labels
from megagnn.data.labels.run import Tally
from megagnn.data.labels.sources import SOURCES, Source
from megagnn.data.record import Structure

SLABS = SOURCES["slabs-emt"]


class FakeEngine(EffectiveMedium):
    """Fails, explodes or gives NaN by the first coordinate of the structure."""

    def label(self, structure: Structure) -> Labels:
        kind = structure.positions[0, 0]
        if kind == 1:
            raise LabelError("not_converged")
        force = {2: 1e3, 3: np.nan}.get(kind, 1.0)
        return Labels(-1.0, np.full((structure.num_atoms, 3), force))


@dataclass(frozen=True)
class FakeRecipe:
    """One atom whose first coordinate runs through `kinds`, in one of `num_groups` groups."""

    num_groups: int
    kinds: tuple[int, ...]

    def generate(self, count: int, rng: np.random.Generator) -> Iterator[Structure]:
        group = f"molecule/{rng.integers(self.num_groups)}"
        for i in range(count):
            positions = np.array([[float(self.kinds[i % len(self.kinds)]), 0.0, 0.0]])
            yield Structure(np.ones(1, np.uint8), positions, np.zeros((3, 3)), np.zeros(3, bool), group=group)


def fake_source(num_groups: int, kinds: tuple[int, ...], repeats: bool = False) -> Source:
    return Source("fake", 9, "", FakeEngine(), FakeRecipe(num_groups, kinds), ("ase",), repeats)


def test_chunks_depend_on_seed_and_index_only() -> None:
    first, same = make_chunk(SLABS, 0, 3, 1), make_chunk(SLABS, 0, 3, 1)
    assert len(first.structures) > 15
    for a, b in zip(first.structures, same.structures, strict=True):
        np.testing.assert_array_equal(a.positions, b.positions)
        assert a.energy == b.energy
        assert (a.source, a.level) == ("slabs-emt", "EMT")
    for other in (make_chunk(SLABS, 1, 3, 1), make_chunk(SLABS, 0, 4, 1)):
        assert first.structures[0].group != other.structures[0].group
        assert {s.energy for s in first.structures}.isdisjoint({s.energy for s in other.structures})
    twin = replace(SLABS, number=7)
    assert make_chunk(twin, 0, 3, 1).structures[0].energy != first.structures[0].energy


def test_labels_belong_to_the_stored_positions(tmp_path: Path) -> None:
    save_chunk(tmp_path / "chunk.npz", make_chunk(SLABS, 0, 0, 1))
    chunk = load_chunk(tmp_path / "chunk.npz", SLABS)
    assert chunk is not None
    for structure in chunk.structures[:5]:
        stored = replace(structure, positions=structure.positions.astype(np.float32).astype(np.float64))
        labels = SLABS.engine.label(stored)
        assert labels.energy == structure.energy
        np.testing.assert_array_equal(labels.forces, structure.forces)


def test_rounding_to_the_store_is_done_once() -> None:
    structure = next(iter(SLABS.recipe.generate(1, np.random.default_rng(0))))
    once = as_stored(structure)
    assert np.abs(once.positions - structure.positions).max() < 6e-5
    np.testing.assert_array_equal(as_stored(once).positions, once.positions)
    np.testing.assert_array_equal(once.cell, once.cell.astype(np.float32))


def test_rejections_are_counted_by_reason(tmp_path: Path) -> None:
    source = fake_source(num_groups=10**9, kinds=(0, 1, 2, 3))
    save_chunk(tmp_path / "chunk.npz", make_chunk(source, 0, 0, 4))
    chunk = load_chunk(tmp_path / "chunk.npz", source)
    assert chunk is not None
    assert chunk.rejected == dict.fromkeys(("not_converged", "max_force", "not_finite"), GROUPS_PER_CHUNK)
    assert (chunk.num_labelled, len(chunk.structures)) == (4 * GROUPS_PER_CHUNK, GROUPS_PER_CHUNK)


def test_a_chunk_of_rejections_only_is_kept(tmp_path: Path) -> None:
    source = fake_source(num_groups=10**9, kinds=(2,))
    save_chunk(tmp_path / "chunk.npz", make_chunk(source, 0, 0, 2))
    chunk = load_chunk(tmp_path / "chunk.npz", source)
    assert chunk is not None
    assert chunk.structures == []
    assert chunk.num_labelled == 2 * GROUPS_PER_CHUNK


def test_damaged_chunks_count_as_missing(tmp_path: Path) -> None:
    path = tmp_path / "chunk.npz"
    assert load_chunk(path, SLABS) is None
    save_chunk(path, make_chunk(SLABS, 0, 0, 1))
    path.write_bytes(path.read_bytes()[:-200])
    assert load_chunk(path, SLABS) is None
    path.write_bytes(b"")
    assert load_chunk(path, SLABS) is None
    assert [p.name for p in tmp_path.iterdir()] == ["chunk.npz"], "no temporary file stays"


def test_molecules_are_taken_once_and_slabs_again() -> None:
    for repeats in (False, True):
        source = fake_source(num_groups=30, kinds=(0,), repeats=repeats)
        tally = Tally(source, num=10**6)
        added = [s for k in range(4) for s in tally.accept(make_chunk(source, 0, k, 2))]
        drawn = 4 * 2 * GROUPS_PER_CHUNK
        assert tally.num_structures == len(added)
        if repeats:
            assert (len(added), tally.num_duplicates) == (drawn, 0)
        else:
            assert len(added) == 2 * len({s.group for s in added}) <= 60
            assert tally.num_duplicates == drawn - len(added) > 0


def test_tally_stops_at_num_and_says_when_molecules_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "STALL_CHUNKS", 3)
    source = fake_source(num_groups=5, kinds=(0,))
    tally = Tally(source, num=7)
    assert len(tally.accept(make_chunk(source, 0, 0, 4))) == 7
    assert tally.done
    hungry = Tally(source, num=100)
    for k in range(3):
        hungry.accept(make_chunk(source, 0, k, 4))
    assert hungry.num_structures == 20, "all five molecules came with the first chunk"
    with pytest.raises(ValueError, match="after 20 of 100 structures: its molecules are used up"):
        hungry.accept(make_chunk(source, 0, 3, 4))


def test_a_stress_and_its_absence_are_kept(tmp_path: Path) -> None:
    chunk = make_chunk(SLABS, 0, 3, 1)
    stress = np.arange(9.0).reshape(3, 3)
    chunk.structures[1] = replace(chunk.structures[1], stress=stress)
    save_chunk(tmp_path / "chunk.npz", chunk)
    loaded = load_chunk(tmp_path / "chunk.npz", SLABS)
    assert loaded is not None
    assert loaded.structures[0].stress is None
    np.testing.assert_array_equal(loaded.structures[1].stress, stress)
    with np.load(tmp_path / "chunk.npz") as file:
        earlier = {name: array for name, array in file.items() if name != "stress"}
    np.savez(tmp_path / "earlier.npz", **earlier)
    before = load_chunk(tmp_path / "earlier.npz", SLABS)
    assert before is not None
    assert {s.stress is None for s in before.structures} == {True}
