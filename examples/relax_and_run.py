"""The quickstart's model in ASE: relax ethanol, then run it at constant energy and watch the drift.

python examples/relax_and_run.py [CHECKPOINT]
"""

import sys
from pathlib import Path

import numpy as np
from ase import units
from ase.build import molecule
from ase.md.velocitydistribution import Stationary
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS
from tqdm import tqdm

from megagnn.calculator import MegaGNNCalculator

DEFAULT = Path(__file__).resolve().parent.parent / "runs/quickstart/checkpoints/best.safetensors"
NUM_STEPS, TIMESTEP_FS, TEMPERATURE_K = 2000, 0.5, 300


def main() -> None:
    """Relax, then run at constant energy."""
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=0)
    atoms.calc = MegaGNNCalculator(sys.argv[1] if len(sys.argv) > 1 else DEFAULT, source="molecules-gfn2")

    before = atoms.get_potential_energy()
    optimizer = BFGS(atoms, logfile=None)
    converged = optimizer.run(fmax=0.01, steps=300)
    change = atoms.get_potential_energy() - before
    print(
        f"relaxed: {optimizer.nsteps} steps, converged {converged}, energy {change:+.3f} eV, "
        f"C-C {atoms.get_distance(0, 1):.3f} Å, C-O {atoms.get_distance(1, 2):.3f} Å"
    )

    # in a relaxed molecule half of the kinetic energy goes into the bonds
    spread = np.sqrt(atoms.get_masses() * units.kB * 2 * TEMPERATURE_K)[:, None]
    atoms.set_momenta(spread * np.random.default_rng(0).normal(size=(len(atoms), 3)))
    Stationary(atoms)
    dynamics = VelocityVerlet(atoms, timestep=TIMESTEP_FS * units.fs)
    energies, temperatures = [], []
    for _ in tqdm(range(NUM_STEPS), desc="dynamics", unit="step"):
        dynamics.run(1)
        energies.append(atoms.get_total_energy() / len(atoms))
        temperatures.append(atoms.get_temperature())
    drift = 1e3 * np.polyfit(np.linspace(0, 1, NUM_STEPS), energies, 1)[0]
    print(
        f"dynamics: {NUM_STEPS} steps of {TIMESTEP_FS} fs at {np.mean(temperatures):.0f} K: total energy "
        f"drifts by {drift:+.4f} meV/atom and stays within {1e3 * np.ptp(energies):.4f} meV/atom"
    )


if __name__ == "__main__":
    main()
