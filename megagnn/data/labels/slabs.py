"""Metal slabs with adsorbates: random fcc alloy slab -> adsorbate at a drawn distance -> thermal noise.

The recipe stands for OC20 (Chanussot et al., ACS Catal. 11, 6059, 2021): many slabs, several poses of small
adsorbates on each, off equilibrium.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
from ase import Atoms
from ase.build import fcc100, fcc110, fcc111, fcc211, molecule
from ase.data import covalent_radii

from megagnn.data.record import Structure

if TYPE_CHECKING:
    from megagnn.data.labels.sources import SlabRecipe

# Cubic lattice constants at room temperature, Å. An alloy takes the mean over its atoms (Vegard's rule).
LATTICE = {"Al": 4.05, "Ni": 3.52, "Cu": 3.615, "Pd": 3.89, "Ag": 4.09, "Pt": 3.92, "Au": 4.08}
FACETS = {"fcc111": fcc111, "fcc100": fcc100, "fcc110": fcc110, "fcc211": fcc211}
SIZES = {
    "fcc111": ((2, 2, 3), (2, 2, 4), (3, 2, 3), (3, 2, 4), (3, 3, 3), (4, 2, 4), (3, 3, 4)),
    "fcc100": ((2, 2, 3), (2, 2, 4), (3, 2, 3), (3, 2, 4), (3, 3, 3), (4, 2, 4), (3, 3, 4)),
    "fcc110": ((2, 2, 3), (2, 2, 4), (3, 2, 3), (3, 2, 4), (3, 3, 3), (4, 2, 4), (2, 3, 4)),
    "fcc211": ((3, 2, 3), (3, 2, 4), (3, 3, 3), (3, 3, 4)),
}
ATOMS = ("H", "O", "N", "C")
MOLECULES = ("CO", "OH", "CH3", "NH2", "CH2_s1A1d", "H2O", "NH3", "CH4", "H2", "O2", "N2", "CO2")
LARGER = ("HCN", "H2CO", "C2H2", "C2H4", "CH3O", "CH3OH")
ADSORBATES = (*ATOMS, *MOLECULES, *LARGER)  # names of ase.build.molecule
VACUUM = 7.5  # Å on either side; more than the reach of EMT


def random_slabs(recipe: SlabRecipe, num_poses: int, rng: np.random.Generator) -> Iterator[Structure]:
    """Yield `num_poses` geometries of one random slab, each with an adsorbate, a site and noise of its own.

    The group is facet, size and composition. That is coarser than the slab (it leaves out where the atoms of
    an alloy sit), so slabs that differ by a symmetry or only by their random pattern stay on one side of a
    split too.
    """
    slab, group = random_slab(recipe, rng)
    for _ in range(num_poses):
        pose = slab.copy()
        if rng.random() >= recipe.bare_fraction:
            adsorbate = molecule(_fitting_adsorbate(recipe.max_atoms - len(slab), rng))
            pose += placed(adsorbate, slab, float(rng.uniform(*recipe.contact)), rng)
        noise = float(rng.choice(recipe.noise))
        positions = pose.positions + rng.normal(0.0, noise, pose.positions.shape)
        numbers = pose.numbers.astype(np.uint8)
        pbc = np.array([True, True, False])
        yield Structure(numbers, positions, pose.cell.array.copy(), pbc, group=group)


def random_slab(recipe: SlabRecipe, rng: np.random.Generator) -> tuple[Atoms, str]:
    """A random fcc slab of one metal or two, and its group key, for example `slab/fcc111/3x2x4/Cu17Pd7`."""
    facet = str(rng.choice(list(FACETS)))
    size = SIZES[facet][int(rng.integers(len(SIZES[facet])))]
    host, guest = (str(metal) for metal in rng.choice(list(LATTICE), 2, replace=False))
    # The composition is drawn first: the cell is built at the alloy's lattice constant.
    num_atoms = len(FACETS[facet](host, size, a=LATTICE[host], vacuum=VACUUM))
    num_guest = 0
    if rng.random() >= recipe.pure_fraction:
        num_guest = int(rng.integers(1, int(recipe.max_minority * num_atoms) + 1))
    lattice = LATTICE[host] + (LATTICE[guest] - LATTICE[host]) * num_guest / num_atoms
    slab = FACETS[facet](host, size, a=lattice, vacuum=VACUUM)
    slab.symbols[rng.permutation(num_atoms)[:num_guest]] = guest
    counts = sorted(((host, num_atoms - num_guest), (guest, num_guest)))
    composition = "".join(f"{metal}{count}" for metal, count in counts if count)
    return slab, f"slab/{facet}/{'x'.join(map(str, size))}/{composition}"


def _fitting_adsorbate(max_atoms: int, rng: np.random.Generator) -> str:
    while True:
        name = str(rng.choice(ADSORBATES))
        if len(molecule(name)) <= max_atoms:
            return name


def placed(adsorbate: Atoms, slab: Atoms, contact: float, rng: np.random.Generator) -> Atoms:
    """The adsorbate, turned at random above a random point of the surface, lowered until its first contact.

    Contact is where some distance d_ij equals `contact` times the sum of covalent radii. An atom pair with
    lateral distance rho < c_ij = contact (R_i + R_j) demands a height difference of at least sqrt(c_ij^2 -
    rho^2): the largest lift any pair demands is the height sought. Periodic images in the plane are included.
    """
    turned = adsorbate.copy()
    turned.positions = (turned.positions - turned.positions.mean(axis=0)) @ _random_rotation(rng).T
    turned.positions[:, :2] += rng.random(2) @ slab.cell.array[:2, :2]
    images = np.array([[i, j, 0] for i, j in product((-1, 0, 1), repeat=2)]) @ slab.cell.array
    ground = (slab.positions[None] + images[:, None]).reshape(-1, 3)
    radii = np.tile(covalent_radii[slab.numbers], len(images))
    reach = contact * (covalent_radii[turned.numbers][:, None] + radii)
    delta = turned.positions[:, None] - ground
    gap = reach**2 - (delta[..., :2] ** 2).sum(-1)
    lift = np.where(gap > 0, np.sqrt(np.maximum(gap, 0.0)) - delta[..., 2], -np.inf).max()
    if not np.isfinite(lift):  # it would fall through a hole of an open surface
        return placed(adsorbate, slab, contact, rng)
    turned.positions[:, 2] += lift
    return turned


def _random_rotation(rng: np.random.Generator) -> np.ndarray:
    """Uniform rotation matrix: QR of a Gaussian matrix, signs fixed (Mezzadri, Notices AMS 54, 592, 2007)."""
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return q if np.linalg.det(q) > 0 else -q
