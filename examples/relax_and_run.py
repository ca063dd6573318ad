"""A trained model in ASE: relax a structure, then run it at constant energy and watch the drift.

python examples/relax_and_run.py                       ethanol, by the quickstart's model
python examples/relax_and_run.py CHECKPOINT --structure silicon       64 atoms, by a model of silicon
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.md.velocitydistribution import Stationary
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS, FIRE
from tqdm import trange

from megagnn.calculator import MegaGNNCalculator

DEFAULT = Path(__file__).resolve().parent.parent / "runs/quickstart/checkpoints/best.safetensors"
TIMESTEP_FS = {"ethanol": 0.5, "silicon": 1.0}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", nargs="?", default=str(DEFAULT))
    parser.add_argument("--structure", choices=list(TIMESTEP_FS), default="ethanol")
    parser.add_argument("--source", help="source of the training data (default for ethanol: molecules-gfn2)")
    parser.add_argument("--picoseconds", type=float, default=1.0, help="length of the run (default 1)")
    parser.add_argument("--temperature", type=float, default=300.0, help="K, about (default 300)")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Relax, then run at constant energy."""
    options = parse_args(argv)
    atoms = molecule("CH3CH2OH") if options.structure == "ethanol" else bulk("Si", cubic=True).repeat(2)
    atoms.rattle(0.05, seed=0)
    source = options.source or ("molecules-gfn2" if options.structure == "ethanol" else None)
    atoms.calc = MegaGNNCalculator(options.checkpoint, source=source, dtype=options.dtype)
    relax(atoms, BFGS if options.structure == "ethanol" else FIRE)
    if options.structure == "ethanol":
        print(f"C-C {atoms.get_distance(0, 1):.3f} Å, C-O {atoms.get_distance(1, 2):.3f} Å")
    run(atoms, options.picoseconds, TIMESTEP_FS[options.structure], options.temperature)


def relax(atoms: Atoms, optimizer_class: type) -> None:
    """Move the atoms until no force is above 0.01 eV/Å."""
    before = atoms.get_potential_energy()
    optimizer = optimizer_class(atoms, logfile=None)
    converged = optimizer.run(fmax=0.01, steps=300)
    change = atoms.get_potential_energy() - before
    print(f"relaxed: {optimizer.nsteps} steps, converged {converged}, energy {change:+.3f} eV")


def run(atoms: Atoms, picoseconds: float, timestep_fs: float, temperature_K: float) -> None:
    """Dynamics at constant energy; the drift is that of a straight line through the total energies."""
    # of a relaxed structure half of the kinetic energy goes into the bonds
    spread = np.sqrt(atoms.get_masses() * units.kB * 2 * temperature_K)[:, None]
    atoms.set_momenta(spread * np.random.default_rng(0).normal(size=(len(atoms), 3)))
    Stationary(atoms)
    dynamics = VelocityVerlet(atoms, timestep=timestep_fs * units.fs)
    num_steps = round(1e3 * picoseconds / timestep_fs)
    energies, temperatures = np.empty(num_steps), np.empty(num_steps)
    for step in trange(num_steps, desc="dynamics", unit="step", mininterval=5):
        dynamics.run(1)
        energies[step] = atoms.get_total_energy() / len(atoms)
        temperatures[step] = atoms.get_temperature()
    drift = 1e3 * np.polyfit(np.linspace(0, 1, num_steps), energies, 1)[0]
    print(
        f"dynamics: {num_steps} steps of {timestep_fs} fs at {np.mean(temperatures):.0f} K: total energy "
        f"drifts by {drift:+.4f} meV/atom and stays within {1e3 * np.ptp(energies):.4f} meV/atom"
    )


if __name__ == "__main__":
    main()
