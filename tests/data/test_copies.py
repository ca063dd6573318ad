"""Copies among structures: rounded and shifted ones are found, near ones are none."""

import dataclasses

import numpy as np
import pytest
from ase.build import bulk

from megagnn.data.copies import Copies
from megagnn.data.record import Structure


def silicon(repeats: int) -> Structure:
    atoms = bulk("Si").repeat(repeats)
    atoms.positions += np.random.default_rng(repeats).normal(scale=0.05, size=atoms.positions.shape)
    return Structure(
        atoms.numbers.astype(np.uint8), atoms.positions, atoms.cell.array, np.ones(3, bool), energy=-5.0
    )


def with_positions(structure: Structure, positions: np.ndarray) -> Structure:
    return dataclasses.replace(structure, positions=positions)


def copies(*structures: Structure) -> list[str]:
    found = Copies()
    for frame, structure in enumerate(structures):
        found.add(structure, "a.xyz", frame)
    sides = np.arange(len(structures)) > 0
    return list(found.in_training(2 * sides, np.zeros(len(structures), bool)))


@pytest.mark.parametrize("repeats", [1, 3, 8])
def test_one_moved_atom_makes_no_copy_however_large_the_cell(repeats: int) -> None:
    first, rng = silicon(repeats), np.random.default_rng(0)
    moved = []
    for _ in range(20):
        positions, step = first.positions.copy(), rng.normal(size=3)
        positions[rng.integers(1, len(positions))] += 0.01 * step / np.linalg.norm(step)
        moved.append(with_positions(first, positions))
    assert copies(first, *moved) == []


@pytest.mark.parametrize("repeats", [1, 3, 6])
def test_rounded_and_shifted_copies_are_found(repeats: int) -> None:
    first, rng = silicon(repeats), np.random.default_rng(1)
    shifted = [with_positions(first, np.round(first.positions + rng.uniform(-9, 9, 3), 4)) for _ in range(20)]
    (told,) = copies(first, *shifted)
    count = int(told.split()[1])
    assert count >= 8  # each is compared with the next eight of the order


def test_places_of_two_energies() -> None:
    first = silicon(1)
    found = Copies()
    found.add(first, "a.xyz", 7)
    found.add(dataclasses.replace(first, energy=-25.0), "b.xyz", 3)
    (told,) = found.with_two_energies()
    assert "a.xyz, frame 7 with" in told
    assert "b.xyz, frame 3 with" in told
