from itertools import product

import numpy as np
import pytest
from ase.build import molecule
from ase.data import chemical_symbols, covalent_radii
from ase.formula import Formula

from megagnn.data.labels.slabs import LATTICE, placed, random_slab, random_slabs
from megagnn.data.labels.sources import SlabRecipe


def test_slabs_are_what_their_group_says() -> None:
    rng = np.random.default_rng(0)
    groups, facets, sizes = set(), set(), []
    for _ in range(60):
        structures = list(random_slabs(SlabRecipe(), 3, rng))
        assert len({s.group for s in structures}) == 1
        _, facet, _, composition = structures[0].group.split("/")
        for s in structures:
            assert s.num_atoms <= SlabRecipe().max_atoms
            assert s.pbc.tolist() == [True, True, False]
            symbols = [chemical_symbols[z] for z in s.atomic_numbers]
            metals = {m: symbols.count(m) for m in LATTICE if m in symbols}
            assert metals == Formula(composition).count()
            sizes.append(s.num_atoms)
        groups.add(structures[0].group)
        facets.add(facet)
    assert len(groups) > 50
    assert facets == {"fcc111", "fcc100", "fcc110", "fcc211"}
    assert 20 < np.mean(sizes) < 32


def test_some_poses_are_bare() -> None:
    rng = np.random.default_rng(1)
    for share, expected in ((0.0, 0), (1.0, 5)):
        poses = list(random_slabs(SlabRecipe(bare_fraction=share), 5, rng))
        bare = sum(all(chemical_symbols[z] in LATTICE for z in s.atomic_numbers) for s in poses)
        assert bare == expected


@pytest.mark.parametrize("name", ["H", "CO", "CH3OH"])
@pytest.mark.parametrize("contact", [0.9, 1.5])
def test_adsorbate_touches_at_the_distance_asked_for(name: str, contact: float) -> None:
    rng = np.random.default_rng(2)
    for _ in range(10):
        slab, _ = random_slab(SlabRecipe(), rng)
        adsorbate = placed(molecule(name), slab, contact, rng)
        nearest = np.inf
        for i, j in product((-2, -1, 0, 1, 2), repeat=2):
            delta = adsorbate.positions[:, None] - slab.positions - np.array([i, j, 0]) @ slab.cell.array
            sums = covalent_radii[adsorbate.numbers][:, None] + covalent_radii[slab.numbers]
            nearest = min(nearest, (np.linalg.norm(delta, axis=2) / sums).min())
        assert nearest == pytest.approx(contact, abs=1e-9)
        assert adsorbate.positions[:, 2].min() > slab.positions[:, 2].mean(), (
            "above, not below (a step is deep)"
        )
