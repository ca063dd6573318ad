"""Random organic molecules: valence-correct graph -> conformer -> thermal displacement along normal modes.

The recipe stands for ANI-1x (Smith et al., J. Chem. Phys. 148, 241733, 2018; CHNO) and QM7-X (Hoja et al.,
Sci. Data 8, 43, 2021; CHNOSCl): many small molecules, few geometries of each, away from equilibrium.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from rdkit import Chem, rdBase
from rdkit.Chem import rdDistGeom, rdForceFieldHelpers

from megagnn.data.record import Structure

if TYPE_CHECKING:
    from megagnn.data.labels.sources import MoleculeRecipe

VALENCE = {6: 4, 7: 3, 8: 2, 16: 2, 17: 1}
HETERO = (7, 8, 16, 17)

# Rings a molecule may start from: random growth alone almost never makes an aromatic ring.
AROMATIC_RINGS = ("c1ccccc1", "c1ccncc1", "c1cncnc1", "c1cc[nH]c1", "c1ccoc1", "c1c[nH]cn1", "c1ccsc1")
OTHER_RINGS = ("C1CCCCC1", "C1CCCC1", "C1CCNCC1", "C1CCOC1", "C1CC1", "C1CO1", "C1CCC1")
RING_SEEDS = (*AROMATIC_RINGS, *OTHER_RINGS)

BOLTZMANN = 8.617333262e-5  # eV/K
KCAL_PER_MOL = 0.0433641153087705  # eV
HESSIAN_STEP = 5e-3  # Å
SOFT_MODE = 0.05  # eV/Å^2: translations, rotations and torsions too soft for the harmonic picture


def random_molecules(
    recipe: MoleculeRecipe, num_geometries: int, rng: np.random.Generator
) -> Iterator[Structure]:
    """Yield `num_geometries` displaced geometries of one new random molecule, spread over a few conformers.

    The group of a geometry is the canonical SMILES without stereochemistry, so mirror images and cis/trans
    isomers of one graph count as the same molecule.
    """
    smiles, mol, conformers = embedded_molecule(recipe, rng)
    numbers = np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()], dtype=np.uint8)
    modes = [normal_modes(mol, conformer) for conformer in conformers]
    for i in range(num_geometries):
        minimum, stiffness, vectors = modes[i % len(modes)]
        temperature = rng.uniform(0.0, recipe.max_temperature)
        positions = displace(recipe, minimum, stiffness, vectors, temperature, rng)
        yield Structure(
            numbers, positions, np.zeros((3, 3)), np.zeros(3, dtype=bool), group=f"molecule/{smiles}"
        )


def embedded_molecule(recipe: MoleculeRecipe, rng: np.random.Generator) -> tuple[str, Chem.Mol, list[int]]:
    """Draw random graphs until one embeds in space (ETKDG) and relaxes under MMFF94.

    Returns its SMILES, the molecule with hydrogen, and the ids of its conformers.
    """
    quiet = rdBase.BlockLogs()  # as long as it lives: RDKit reports every graph that does not embed
    embed = rdDistGeom.EmbedMultipleConfs
    while True:
        smiles = random_smiles(recipe, rng)
        seed = int(rng.integers(2**30))
        if smiles is None:
            continue
        mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
        ids = list(embed(mol, recipe.conformers, randomSeed=seed, maxAttempts=3, numThreads=1))
        if not ids or not rdForceFieldHelpers.MMFFHasAllMoleculeParams(mol):
            continue
        relaxed = rdForceFieldHelpers.MMFFOptimizeMoleculeConfs(mol, numThreads=1, maxIters=500)
        # -1: the force field could not be set up. 1 (not fully converged) will do for a starting point.
        ids = [conformer for conformer, (status, _) in zip(ids, relaxed, strict=True) if status >= 0]
        if ids:
            del quiet
            return smiles, mol, ids


def random_smiles(recipe: MoleculeRecipe, rng: np.random.Generator) -> str | None:
    """Canonical SMILES of one random valence-correct graph, or None where this draw led nowhere."""
    num_heavy = int(rng.integers(recipe.num_heavy[0], recipe.num_heavy[1] + 1))
    mol = _seed_graph(recipe, num_heavy, rng)
    free = [VALENCE[atom.GetAtomicNum()] - _bond_order(atom) for atom in mol.GetAtoms()]
    while mol.GetNumAtoms() < num_heavy:
        number = int(rng.choice(recipe.elements, p=recipe.probabilities))
        # Chains of heteroatoms (peroxides, azo sulphides) are rare in real molecules: few bonds are offered.
        rare = number in HETERO and rng.random() < 0.85
        hosts = [i for i, left in enumerate(free)
                 if left > 0 and not (rare and mol.GetAtomWithIdx(i).GetAtomicNum() in HETERO)]  # fmt: skip
        if not hosts:
            return None
        host = int(rng.choice(hosts))
        order = min(int(rng.choice([1, 2, 3], p=[0.78, 0.17, 0.05])), free[host], VALENCE[number])
        new = mol.AddAtom(Chem.Atom(number))
        free.append(VALENCE[number])
        _bond(mol, free, host, new, order)
    _close_rings(mol, free, rng)
    try:
        parsed = Chem.MolFromSmiles(Chem.MolToSmiles(mol))
    except Chem.MolSanitizeException:
        return None
    return None if parsed is None else Chem.MolToSmiles(parsed, isomericSmiles=False)


def _seed_graph(recipe: MoleculeRecipe, num_heavy: int, rng: np.random.Generator) -> Chem.RWMol:
    """One carbon atom, or with probability `ring_fraction` a ring of known elements that leaves room."""
    if rng.random() < recipe.ring_fraction:
        ring = Chem.MolFromSmiles(str(rng.choice(RING_SEEDS)))
        known = all(atom.GetAtomicNum() in recipe.elements for atom in ring.GetAtoms())
        if ring.GetNumAtoms() <= num_heavy and known:
            Chem.Kekulize(ring, clearAromaticFlags=True)
            for atom in ring.GetAtoms():
                atom.SetNoImplicit(False)
                atom.SetNumExplicitHs(0)
            return Chem.RWMol(ring)
    mol = Chem.RWMol()
    mol.AddAtom(Chem.Atom(6))
    return mol


def _bond_order(atom: Chem.Atom) -> int:
    return int(sum(bond.GetBondTypeAsDouble() for bond in atom.GetBonds()))


def _bond(mol: Chem.RWMol, free: list[int], a: int, b: int, order: int) -> None:
    free[a] -= order
    free[b] -= order
    assert min(free[a], free[b]) >= 0
    mol.AddBond(a, b, (Chem.BondType.SINGLE, Chem.BondType.DOUBLE, Chem.BondType.TRIPLE)[order - 1])


def _close_rings(mol: Chem.RWMol, free: list[int], rng: np.random.Generator) -> None:
    for _ in range(int(rng.choice([0, 1, 2], p=[0.45, 0.42, 0.13]))):
        distance = Chem.GetDistanceMatrix(mol, force=True)
        pairs = [(i, j) for i in range(len(free)) for j in range(i)
                 if free[i] > 0 and free[j] > 0 and 4 <= distance[i, j] <= 5]  # fmt: skip
        if not pairs:
            return
        i, j = pairs[int(rng.integers(len(pairs)))]
        _bond(mol, free, i, j, 1)


def normal_modes(mol: Chem.Mol, conformer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cartesian modes of the MMFF94 energy at a conformer, without masses, by differences of its gradient.

    Returns positions (N, 3) in Å, stiffness (3N,) in eV/Å^2 ascending, and modes (3N, 3N) as columns.
    """
    properties = rdForceFieldHelpers.MMFFGetMoleculeProperties(mol)
    field = rdForceFieldHelpers.MMFFGetMoleculeForceField(mol, properties, confId=conformer)
    start = np.array(field.Positions()).ravel()
    hessian = np.empty((len(start), len(start)))
    for k in range(len(start)):
        step = np.zeros_like(start)
        step[k] = HESSIAN_STEP
        hessian[k] = (_gradient(field, start + step) - _gradient(field, start - step)) / (2 * HESSIAN_STEP)
    stiffness, vectors = np.linalg.eigh((hessian + hessian.T) / 2)
    return start.reshape(-1, 3), stiffness, vectors


def _gradient(field: Any, positions: np.ndarray) -> np.ndarray:
    coordinates = positions.tolist()
    # CalcGrad takes distances between atoms from a table that only CalcEnergy brings up to date (seen with
    # RDKit 2026.9.1): without this call it mixes two geometries.
    field.CalcEnergy(coordinates)
    return np.array(field.CalcGrad(coordinates)) * KCAL_PER_MOL


def displace(
    recipe: MoleculeRecipe,
    minimum: np.ndarray,
    stiffness: np.ndarray,
    vectors: np.ndarray,
    temperature: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Sample the harmonic distribution at `temperature` (K), with the recipe's caps; positions (N, 3) in Å.

    The amplitude of a mode is sqrt(kT / stiffness). Masses do not enter the distribution of positions.
    """
    hard = stiffness > SOFT_MODE
    amplitude = np.zeros_like(stiffness)
    amplitude[hard] = np.minimum(np.sqrt(BOLTZMANN * temperature / stiffness[hard]), recipe.mode_cap)
    shift = (vectors @ (amplitude * rng.normal(size=len(stiffness)))).reshape(-1, 3)
    return minimum + shift * min(1.0, recipe.atom_cap / max(float(np.abs(shift).max()), 1e-12))
