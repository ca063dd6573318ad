"""NequIP, trained by its own command `nequip-train` on nequip.yaml; for an environment that has nequip.

Options are overrides of that configuration, as `training_module.model.l_max=2`, and --final-rate R: the rate
then falls exponentially from its first value to R times that in the last epoch, instead of waiting for a
plateau.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import ase.io
import torch
from nequip.integrations.ase import NequIPCalculator
from nequip.scripts import train

from tools.peers.contract import Result, parser, predict, versions
from tools.peers.nequip_clock import EpochClock


def calculator(folder: Path) -> NequIPCalculator:
    """That of a finished training, compiled once by `nequip-compile` for ASE; a matter of minutes."""
    compiled = folder / "best.nequip.pt2"
    if not compiled.exists():
        command = [str(Path(sys.executable).with_name("nequip-compile")), str(folder / "best.ckpt")]
        options = ["--mode", "aotinductor", "--device", "cpu", "--target", "ase"]
        subprocess.run([*command, str(compiled), *options], check=True)
    return NequIPCalculator.from_compiled_model(str(compiled), chemical_species_to_atom_type_map=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, and predict with the averaged weights of the checkpoint of the lowest validation error."""
    arguments = parser(__doc__)
    arguments.add_argument("--final-rate", type=float, help="last learning rate by the first")
    known, options = arguments.parse_known_args(argv)
    torch.set_num_threads(known.threads)
    EpochClock.steps.profiled = known.profile_step
    frames = ase.io.read(known.frames / "train.xyz", index=":")
    elements = sorted({symbol for frame in frames for symbol in frame.symbols})
    if known.final_rate is not None:
        gamma = known.final_rate ** (1 / max(known.epochs - 1, 1))
        falling = f"{{_target_: torch.optim.lr_scheduler.ExponentialLR, gamma: {gamma}}}"
        schedule = f"{{scheduler: {falling}, interval: epoch, frequency: 1}}"
        options += ["~training_module.lr_scheduler", f"+training_module.lr_scheduler={schedule}"]
    sys.argv = ["nequip-train", f"--config-path={Path(__file__).parent}", "--config-name=nequip"]
    sys.argv += [
        f"hydra.run.dir={known.out / 'hydra'}",
        f"+out={known.out}",
        f"+frames={known.frames}",
        f"+epochs={known.epochs}",
        f"+seed={known.seed}",
        f"model_type_names=[{','.join(elements)}]",
        *options,
    ]
    train.main()
    trained = NequIPCalculator._from_saved_model(
        str(known.out / "best.ckpt"), chemical_species_to_atom_type_map=True
    )
    predict(trained, known.frames, known.out)
    parameters = sum(p.numel() for p in trained.model.parameters())
    used = EpochClock.seconds, EpochClock.steps
    Result.of(*used, parameters, versions("nequip", "e3nn", "torch")).save(known.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
