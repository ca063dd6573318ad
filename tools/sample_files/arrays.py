"""Writes the test files of arrays: `python tools/sample_files/arrays.py DIR`, with dpdata installed.

Labels are those of hdf5.py.
"""

import sys
from pathlib import Path

import dpdata
import numpy as np
from hdf5 import conformations

KCAL = 4184 / 96485.33212  # eV, of 1 kcal/mol (CODATA 2018)


def rmd17(path: Path) -> None:
    """As figshare 12672038 has it: compressed, in kcal/mol."""
    x, e, f = conformations(3, 5, 1)
    np.savez_compressed(
        path,
        nuclear_charges=np.array([8, 1, 1], dtype=np.uint8),
        coords=x,
        energies=e / KCAL,
        forces=f / KCAL,
        old_indices=np.arange(5),
        old_energies=e / KCAL + 1,
        old_forces=0.9 * f / KCAL,
    )


def sgdml(path: Path) -> None:
    """As sgdml's own converters write it."""
    x, e, f = conformations(3, 5, 1)
    np.savez_compressed(
        path,
        type="d",
        name="water",
        theory="CCSD",
        z=np.array([8, 1, 1], dtype=np.uint8),
        R=x,
        E=e[:, None],
        F=f,
        e_unit="eV",
        r_unit="Ang",
    )


def deepmd(path: Path) -> None:
    """A periodic system of two sets with virials."""
    x, e, f = conformations(3, 5, 1)
    system = dpdata.LabeledSystem(
        data={
            "atom_names": ["O", "H"],
            "atom_numbs": [1, 2],
            "atom_types": np.array([0, 1, 1]),
            "orig": np.zeros(3),
            "cells": np.repeat(8.0 * np.eye(3)[None], 5, axis=0),
            "coords": x + 2,
            "energies": e,
            "forces": f,
            "virials": np.repeat(np.diag([5.12, 10.24, 0])[None], 5, axis=0),
        }
    )
    system.to("deepmd/npy", str(path), set_size=3, prec=np.float64)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    rmd17(folder / "rmd17_water.npz")
    sgdml(folder / "sgdml_water.npz")
    deepmd(folder / "deepmd")
