"""ASE calculator: a trained model in structure relaxation and molecular dynamics."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes

from megagnn.checkpoint.folder import FolderCheckpoint
from megagnn.checkpoint.single_file import Checkpoint
from megagnn.train.predictor import Predictor, has_volume


class MegaGNNCalculator(Calculator):
    """Energy (eV), forces (eV/Å) and stress (eV/Å^3, tension positive, Voigt) of a checkpoint, for ASE.

    `energies` (N,) are the atoms' shares, eV, and sum to the energy: constants of the elements and what the
    network adds. Works within `torch.no_grad` and `torch.inference_mode`, too.

    Arguments and errors are those of `train.predictor.Predictor`; others are of ASE's Calculator.
    """

    implemented_properties: ClassVar[list[str]] = [  # type: ignore[misc] # as every ASE calculator does
        "energy",
        "energies",
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
        self.predictor = Predictor(checkpoint, source, level, dtype, device)
        self.potential = self.predictor.potential

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
        # the stress always, where there is one: cell filters ask for it at every step, after the forces
        (results,) = self.predictor.results([self.predictor.graph(self.atoms)])
        self.results = {**results, "free_energy": results["energy"]}

    def _check(self, atoms: Atoms, properties: Sequence[str]) -> None:
        if "forces" in properties and not self.predictor.has_forces:
            raise PropertyNotImplementedError(
                "this model was trained with model.forces = 'none': it gives energies only"
            )
        if "stress" in properties:
            if not self.predictor.has_stress:
                raise PropertyNotImplementedError(
                    "stress is a derivative of the energy, and this model has no such forces"
                )
            if not has_volume(atoms.cell.array, atoms.pbc):
                raise PropertyNotImplementedError(
                    "stress needs a cell that is periodic in three directions, got pbc "
                    f"{atoms.pbc.tolist()} and a cell of rank {atoms.cell.rank}"
                )
