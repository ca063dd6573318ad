"""A checkpoint's potential applied to structures of ASE: what the calculator and `megagnn predict` share."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.stress import full_3x3_to_voigt_6_stress

from megagnn.checkpoint.folder import FolderCheckpoint
from megagnn.checkpoint.single_file import Checkpoint, load_potential
from megagnn.data import keys
from megagnn.data.batch import Graph, build_graph, collate
from megagnn.launch.context import named_device
from megagnn.models.potential import Potential

Results = dict[str, Any]
"""What is predicted of a structure, by ASE's names: energy (eV), energies (N,) eV, forces (N, 3) eV/Å, stress
(6,) eV/Å^3 in Voigt order, tension positive."""


class Predictor:
    """The potential of a checkpoint for one source and one level of theory, in eval use.

    Args:
        checkpoint: path of a checkpoint, such as `runs/quickstart/checkpoints/best.safetensors` or the folder
            `runs/quickstart/checkpoints/best`, or one loaded.
        source: name of the training source whose reference energies to use; needed if the model has several.
        level: name of the level of theory; needed if the training data of `source` had several.
        dtype: "float64" (forces are then derivatives of the energy to rounding) or "float32", of weights and
            geometry; of a bfloat16 model, too, whose energy would otherwise rise in steps.
        device: "cpu", "cuda", "cuda:NUMBER", or "auto" for a GPU where there is one.

    Raises:
        ValueError: an unknown source or level, with the known ones; a type or a device that there is not.
    """

    def __init__(
        self,
        checkpoint: str | Path | Checkpoint | FolderCheckpoint,
        source: str | None = None,
        level: str | None = None,
        dtype: str = "float64",
        device: str = "cpu",
    ) -> None:
        if dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be 'float32' or 'float64', got '{dtype}'")
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.device = named_device(device)
        with torch.inference_mode(False):  # in which the weights could be part of no derivative
            self.potential: Potential = load_potential(checkpoint, self.dtype).to(self.device)
        self.potential.requires_grad_(False)
        self.potential.model.wants_atomic_energies = True
        config, self.statistics = self.potential.model.config, self.potential.statistics
        self.source_index = self.statistics.source_index(source)
        self.level_index = self.statistics.level_index(level, source)
        self.cutoff, self.self_edges = config.cutoff, config.has_self_edges
        self.has_forces = config.forces != "none"
        # the stress is a derivative of the energy, so every conservative model can give it
        self.has_stress = config.forces == "conservative"
        self._warned: set[str] = set()  # compositions whose energy was said to mean little

    def graph(self, atoms: Atoms, where: str = "the structure", way_out: str | None = None) -> Graph:
        """The structure with its neighbours, for `results`.

        Args:
            where: how messages call it.
            way_out: what messages advise where the model does not know an element.

        Raises:
            ValueError: no atoms, an element that the model has not seen in its source, positions that are not
                finite, or a lattice that is none.
        """
        if len(atoms) == 0:
            raise ValueError(f"{where} has no atoms; give at least one")
        self.statistics.check_elements(atoms.numbers, self.source_index, where, way_out)
        self._check_span(atoms)
        try:
            graph = build_graph(
                atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc, self.cutoff, self.self_edges
            )
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        return {**graph, keys.SOURCE: self.source_index, keys.LEVEL: self.level_index}

    def _check_span(self, atoms: Atoms) -> None:
        """Warn, once for each composition, of an energy that the training energies do not determine."""
        formula = atoms.get_chemical_formula()
        if formula in self._warned:
            return
        self._warned.add(formula)
        fault = self.statistics.span_fault(atoms.numbers, self.source_index)
        if fault:
            warnings.warn(f"{formula}: {fault}", stacklevel=3)

    def results(self, graphs: Sequence[Graph]) -> list[Results]:
        """Predictions for structures in one batch; forces and stress where the model has them, stress of
        structures with a volume."""
        with_stress = [self.has_stress and has_volume(g[keys.CELL], g[keys.PBC]) for g in graphs]
        self.potential.stress = any(with_stress)
        batch = collate(graphs, self.dtype)
        outputs = self.potential({key: value.to(self.device) for key, value in batch.items()})
        arrays = {key: value.double().cpu().numpy() for key, value in outputs.items()}
        found: list[Results] = []
        for k, has_stress in enumerate(with_stress):
            atoms = slice(*batch[keys.GRAPH_PTR][k : k + 2].tolist())
            result: Results = {"energy": float(arrays[keys.ENERGY][k])}
            result["energies"] = arrays[keys.ATOMIC_ENERGIES][atoms].copy()
            if self.has_forces:
                result["forces"] = arrays[keys.FORCES][atoms].copy()
            if has_stress:
                result["stress"] = full_3x3_to_voigt_6_stress(arrays[keys.STRESS][k])
            found.append(result)
        return found


def has_volume(cell: Any, pbc: Any) -> bool:
    """Whether a cell (3, 3) is periodic in three directions, so that a stress is per its volume."""
    return bool(np.all(pbc)) and int(np.linalg.matrix_rank(np.asarray(cell))) == 3
