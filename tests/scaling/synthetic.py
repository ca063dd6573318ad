"""Runs of a study that was never made: a known law, and noise."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megagnn.scaling.laws.record import RunRecord

LAW = {"L_inf": 0.012, "A": 6.0, "a": 0.40, "B": 2.0, "b": 0.45}


def law(size: float, data: float) -> float:
    return LAW["L_inf"] + LAW["A"] * size ** -LAW["a"] + LAW["B"] * data ** -LAW["b"]


def study(
    widths: Sequence[int] = (16, 32, 64, 128, 256),
    depths: Sequence[int] = (3,),
    data: Sequence[int] = (500, 2000, 8000, 32000),
    seeds: int = 2,
    noise: float = 0.03,
) -> list[RunRecord]:
    """C = 6 x 20 x N x atoms, 18 atoms a structure."""
    rng = np.random.default_rng(4)
    records = []
    for depth, width, structures, seed in itertools.product(depths, widths, data, range(seeds)):
        parameters, atoms = 7 * depth * width**2, 18 * structures
        loss = law(parameters, structures) * float(np.exp(noise * rng.normal()))
        records.append(
            RunRecord(
                run=f"w{width}-l{depth}-n{structures}-s{seed}",
                recipe="synthetic",
                width=width,
                depth=depth,
                parameters=parameters,
                structures=structures,
                atoms=atoms,
                seed=seed,
                learning_rate=3e-3,
                flops=120.0 * parameters * atoms,
                steps=1000,
                epochs=20.0,
                losses={"force_mae": (loss, "eV/Å"), "energy_mse": (loss**2, "(eV/atom)^2")},
                seconds=1e-9 * parameters * atoms,
            )
        )
    return records


def write(path: Path, records: Sequence[RunRecord]) -> Path:
    path.write_text("".join(record.to_json() + "\n" for record in records), encoding="utf-8")
    return path
