import numpy as np
import pytest

pytest.importorskip("rdkit", reason="needs megagnn[labels]")

from rdkit import Chem
from rdkit.Chem import rdDistGeom, rdForceFieldHelpers

from megagnn.data.labels.molecules import (
    KCAL_PER_MOL,
    VALENCE,
    displace,
    normal_modes,
    random_molecules,
    random_smiles,
)
from megagnn.data.labels.sources import MoleculeRecipe

RECIPE = MoleculeRecipe((6, 7, 8, 16, 17), (0.5, 0.15, 0.15, 0.1, 0.1), (2, 7))


def test_graphs_obey_valence_size_and_elements() -> None:
    rng = np.random.default_rng(0)
    smiles = [s for s in (random_smiles(RECIPE, rng) for _ in range(300)) if s is not None]
    assert len(smiles) > 200
    seen = set()
    for text in smiles:
        mol = Chem.AddHs(Chem.MolFromSmiles(text))
        heavy = [atom for atom in mol.GetAtoms() if atom.GetAtomicNum() > 1]
        assert 2 <= len(heavy) <= 7
        for atom in heavy:
            assert atom.GetTotalValence() == VALENCE[atom.GetAtomicNum()]
            assert atom.GetFormalCharge() == 0
            assert atom.GetNumRadicalElectrons() == 0
            seen.add(atom.GetAtomicNum())
        assert Chem.MolToSmiles(Chem.MolFromSmiles(text)) == text, "the group key is the canonical SMILES"
    assert seen == set(RECIPE.elements)
    assert any("c" in text for text in smiles), "aromatic rings appear"


def test_geometries_of_one_molecule() -> None:
    structures = list(random_molecules(RECIPE, 6, np.random.default_rng(3)))
    again = list(random_molecules(RECIPE, 6, np.random.default_rng(3)))
    assert len(structures) == 6
    for structure, same in zip(structures, again, strict=True):
        np.testing.assert_array_equal(structure.positions, same.positions)
        assert structure.group == structures[0].group
        assert not structure.pbc.any()
        smiles = structure.group.removeprefix("molecule/")
        numbers = [atom.GetAtomicNum() for atom in Chem.AddHs(Chem.MolFromSmiles(smiles)).GetAtoms()]
        assert sorted(structure.atomic_numbers) == sorted(numbers)
    distinct = {structure.positions.tobytes() for structure in structures}
    assert len(distinct) == 6


@pytest.mark.parametrize("smiles", ["CCO", "c1ccccc1", "C1CO1"])
def test_modes_are_those_of_the_energy(smiles: str) -> None:
    """Second differences of the energy alone: RDKit's gradient is only right after a call for the energy."""
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    assert rdDistGeom.EmbedMolecule(mol, randomSeed=1) == 0
    rdForceFieldHelpers.MMFFOptimizeMolecule(mol, maxIters=2000)
    minimum, stiffness, vectors = normal_modes(mol, -1)
    size = minimum.size
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(size), atol=1e-10)
    assert (np.abs(stiffness[:6]) < 1e-2).all(), "translations and rotations cost nothing"
    assert 30 < stiffness[-1] < 200, "the stiffest bond of an organic molecule, eV/Å^2"
    field = rdForceFieldHelpers.MMFFGetMoleculeForceField(
        mol, rdForceFieldHelpers.MMFFGetMoleculeProperties(mol)
    )
    start, step = minimum.ravel(), 1e-2
    for k in (6, size // 2, size - 1):
        above, below = (field.CalcEnergy((start + sign * step * vectors[:, k]).tolist()) for sign in (1, -1))
        curvature = (above + below - 2 * field.CalcEnergy(start.tolist())) / step**2 * KCAL_PER_MOL
        assert curvature == pytest.approx(stiffness[k], rel=0.02, abs=1e-3)


def test_displacement_follows_temperature_and_caps() -> None:
    rng = np.random.default_rng(1)
    minimum, stiffness, vectors = np.zeros((2, 3)), np.array([1e-3, 4.0, 9.0, 25.0, 36.0, 50.0]), np.eye(6)
    samples = np.array(
        [displace(RECIPE, minimum, stiffness, vectors, 300.0, rng) for _ in range(4000)]
    ).reshape(-1, 6)
    expected = np.sqrt(8.617333262e-5 * 300.0 / stiffness)
    np.testing.assert_allclose(samples[:, 1:].std(axis=0), expected[1:], rtol=0.05)
    assert (samples[:, 0] == 0).all(), "soft modes stay still"
    hot = np.array([displace(RECIPE, minimum, stiffness, vectors, 1e6, rng) for _ in range(500)])
    assert np.abs(hot).max() <= RECIPE.atom_cap + 1e-12
    assert (displace(RECIPE, minimum, stiffness, vectors, 0.0, rng) == 0).all()
