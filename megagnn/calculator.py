"""ASE calculator: a trained model in structure relaxation and molecular dynamics."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from megagnn.data import keys
from megagnn.data.batch import batch_from_atoms
from megagnn.models.potential import Potential
from megagnn.train.checkpoint import Checkpoint, load_potential
from megagnn.train.checkpoint_folder import FolderCheckpoint


class MegaGNNCalculator(Calculator):
    """Energy (eV), forces (eV/Å) and stress (eV/Å^3, tension positive, Voigt) of a checkpoint, for ASE.

    Args:
        checkpoint: path of a checkpoint, such as `runs/quickstart/checkpoints/best.safetensors` or the folder
            `runs/quickstart/checkpoints/best`, or one loaded.
        source: name of the training source whose reference energies to use; needed if the model has several.
        level: name of the level of theory to predict; needed only if the training data of `source` had
            several.
        dtype: "float64" (default: forces are then derivatives of the energy to rounding) or "float32";
            also of a model that was trained in bfloat16, whose energy would otherwise rise in steps.
        device: "cpu" or "cuda".

    Raises:
        ValueError: an unknown source, level or element, with the known ones.
    """

    implemented_properties: ClassVar[list[str]] = [  # type: ignore[misc] # as every ASE calculator does
        "energy",
        "free_energy",
        "forces",
        "stress",
    ]

    def __init__(
        self,
        checkpoint: str | Path | Checkpoint | FolderCheckpoint,
        source: str | None = None,
        level: str | None = None,
        dtype: str = "float64",
        device: str = "cpu",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be 'float32' or 'float64', got '{dtype}'")
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.potential: Potential = load_potential(checkpoint, self.dtype).to(device)
        self.potential.requires_grad_(False)
        self.device = torch.device(device)
        config, statistics = self.potential.model.config, self.potential.statistics
        self.source_index = statistics.source_index(source)
        self.level_index = statistics.level_index(level, source)
        self.cutoff, self.self_edges = config.cutoff, config.self_edges
        self.has_forces = config.forces != "none"
        # the stress is a derivative of the energy, so every conservative model can give it
        self.has_stress = config.forces == "conservative"

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Called by ASE; fills `self.results`."""
        super().calculate(atoms, properties, system_changes)
        assert self.atoms is not None
        self._check(self.atoms, properties)
        # always, where there is one: cell filters ask for it at every step, after the forces
        wants_stress = self.has_stress and _has_volume(self.atoms)
        self.potential.stress = wants_stress
        batch = batch_from_atoms([self.atoms], self.cutoff, self.dtype, self.self_edges)
        batch[keys.SOURCE].fill_(self.source_index)
        batch[keys.LEVEL].fill_(self.level_index)
        outputs = self.potential({key: value.to(self.device) for key, value in batch.items()})
        energy = float(outputs[keys.ENERGY][0])
        self.results = {"energy": energy, "free_energy": energy}
        if self.has_forces:
            self.results["forces"] = outputs[keys.FORCES].cpu().numpy().astype(np.float64)
        if wants_stress:
            stress_33 = outputs[keys.STRESS][0].cpu().numpy().astype(np.float64)
            self.results["stress"] = full_3x3_to_voigt_6_stress(stress_33)

    def _check(self, atoms: Atoms, properties: Sequence[str]) -> None:
        if len(atoms) == 0:
            raise ValueError("the structure has no atoms; give at least one")
        self.potential.statistics.check_elements(atoms.numbers, self.source_index, "the structure")
        if "forces" in properties and not self.has_forces:
            raise PropertyNotImplementedError(
                "this model was trained with model.forces = 'none': it gives energies only"
            )
        if "stress" in properties:
            if not self.has_stress:
                raise PropertyNotImplementedError(
                    "stress is a derivative of the energy, and this model has no such forces"
                )
            if not _has_volume(atoms):
                raise PropertyNotImplementedError(
                    "stress needs a cell that is periodic in three directions, got pbc "
                    f"{atoms.pbc.tolist()} and a cell of rank {atoms.cell.rank}"
                )


def _has_volume(atoms: Atoms) -> bool:
    return bool(atoms.pbc.all()) and atoms.cell.rank == 3
