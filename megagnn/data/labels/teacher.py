"""A trained neural potential as a labelling engine: labels of a network, not of a calculation."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from ase import Atoms, units

from megagnn.data.labels.engines import Labels
from megagnn.data.record import Structure


@dataclass(frozen=True)
class Teacher:
    """CHGNet (Deng et al., Nat. Mach. Intell. 5, 1031, 2023), trained on MPtrj: PBE(+U), 89 elements.

    Its labels are smooth and free of noise, and a network learns them as far as its own reach allows: an
    exponent measured on them is one of distillation. Single precision.
    """

    method: str = "neural teacher CHGNet 0.3.0"
    package: str = "chgnet"

    @property
    def settings(self) -> dict[str, float]:
        """Marks the labels as those of a network."""
        return {"is_neural_network": 1.0}

    def label(self, structure: Structure) -> Labels:
        """Label a crystal, with its stress."""
        found = self._predict(structure, "efs")
        energy = float(found["e"]) * structure.num_atoms
        return Labels(energy, found["f"].astype(np.float64), found["s"].astype(np.float64) * units.GPa)

    def energy(self, structure: Structure) -> float:
        """Total energy, eV, alone."""
        return float(self._predict(structure, "e")["e"]) * structure.num_atoms

    def _predict(self, structure: Structure, task: str) -> dict[str, Any]:
        from pymatgen.io.ase import AseAtomsAdaptor  # type: ignore[import-not-found,unused-ignore]

        s = structure
        atoms = Atoms(s.atomic_numbers, s.positions, cell=s.cell, pbc=True)
        found: dict[str, Any] = _network().predict_structure(AseAtomsAdaptor.get_structure(atoms), task=task)
        return found


@cache
def _network() -> Any:
    import torch
    from chgnet.model import CHGNet  # type: ignore[import-not-found,unused-ignore]

    torch.set_num_threads(1)
    return CHGNet.load(model_name="0.3.0", use_device="cpu", verbose=False)
