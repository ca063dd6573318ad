"""The labels of the files of tests/data/files, as tools/sample_files/hdf5.py makes them."""

from pathlib import Path

import numpy as np

FILES = Path(__file__).parents[1] / "files"
STIFFNESS = 5.0
"""eV/Å^2, of the springs that the labels are of."""


def spring(positions):
    bonds = positions[1:] - positions[0]
    lengths = np.linalg.norm(bonds, axis=1, keepdims=True)
    pulls = STIFFNESS * (lengths - 1) * bonds / lengths
    return 0.5 * STIFFNESS * ((lengths - 1) ** 2).sum() - 100 * len(positions), np.vstack(
        [pulls.sum(0), -pulls]
    )
