"""Training on direct forces first, then on conservative ones (`train.direct_steps`).

A step on direct forces costs three eighths of one on conservative forces (`family.STEP_UNITS`). The second
run lacks the parameters of the head for direct forces; all others begin where the first run ended, as in
Bigi, Langer, Ceriotti, "The dark side of the forces", ICML 2025, and Fu et al., "Learning smooth and
expressive interatomic potentials for physical property prediction", ICML 2025.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from megagnn.config import InitConfig, RunConfig
from megagnn.objective.terms import TERMS

FOLDER = "direct"
"""Of the first run, in that of the second."""
# Weights rise once, at the end of both parts: the second begins again with those of the first one's start.
_CONSTANT_WEIGHTS: dict[str, Any] = {term.factor_key: 1.0 for term in TERMS.values() if term.factor_key}


def parts_of(config: RunConfig) -> list[RunConfig]:
    """The runs that a configuration asks for: with `train.direct_steps` one on direct forces, with the loss's
    initial weights, and then the conservative one that begins with its parameters and keeps its reference
    energies."""
    if not config.train.direct_steps:
        return [config]
    first = Path(config.out_dir) / FOLDER
    direct = replace(
        config,
        out_dir=str(first),
        model=replace(config.model, forces="direct", stress=False),
        loss=replace(config.loss, stress_weight=0.0, **_CONSTANT_WEIGHTS),
        train=replace(config.train, num_steps=config.train.direct_steps, num_epochs=None, direct_steps=0),
    )
    last = str(first / "checkpoints" / "last")
    return [direct, replace(config, init_from=last, init=InitConfig(references="keep"))]
