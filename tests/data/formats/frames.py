"""Small extended XYZ files as other programs write them, for tests of readers and of `megagnn prepare`."""

from pathlib import Path

import numpy as np

CELL = np.diag([4.0, 4.2, 4.4])
VOLUME = float(np.linalg.det(CELL))
STRESS = np.array([[-0.03, 0.001, 0.002], [0.001, -0.04, 0.003], [0.002, 0.003, -0.05]])
"""eV/Å^3, tension positive."""


def text_of(array) -> str:
    return " ".join(f"{x:.10f}" for x in np.ravel(array))


def crystal(
    seed: int = 0, comment: str = "", species: tuple[str, ...] = ("Cu", "Pt", "Ni"), **keys: object
) -> str:
    """One periodic frame of three atoms with energy and forces; other keys of the comment line by name."""
    rng = np.random.default_rng(seed)
    positions = np.array([[0, 0, 0], [2, 2, 0], [2, 0, 2.2]]) + rng.uniform(-0.1, 0.1, (3, 3))
    forces = rng.normal(0, 0.5, (3, 3))
    keys = {"energy": -10.0 + 0.1 * seed, **keys}
    said = " ".join(f'{name}="{value}"' for name, value in keys.items() if value is not None)
    lines = [
        "3",
        f'Lattice="{text_of(CELL)}" Properties=species:S:1:pos:R:3:forces:R:3 {said} pbc="T T T" {comment}',
    ]
    lines += [
        f"{name} {text_of(x)} {text_of(f)}" for name, x, f in zip(species, positions, forces, strict=True)
    ]
    return "\n".join(lines) + "\n"


def write(path: Path, *frames: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(frames))
    return path
