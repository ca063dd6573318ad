"""Named losses: kinds and weights of the terms, as other programs have them.

Of MACE (`mace_run_train --loss NAME`, with its default weights 1 and 100): `mace-weighted`, `mace-stress`
(for models with stress), `mace-huber`, `mace-universal` (smaller deltas for larger forces), `mace-l1l2` (its
`l1l2energyforces`). Of NequIP: `nequip`, its EnergyForceLoss. Energies are per atom in all of them. Our Huber
losses are theirs divided by delta, which moves no minimum, nor a step of AdamW where nothing is clipped.
"""

from typing import Any

_CONSTANT: dict[str, Any] = {"final_energy_factor": 1.0}
_MACE: dict[str, Any] = {"energy_weight": 1.0, "force_weight": 100.0, **_CONSTANT}
_SQUARES: dict[str, Any] = {"energy": "mse", "forces": "mse", "stress": "mse"}

LOSS_PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "mace-weighted": {**_SQUARES, **_MACE},
    "mace-stress": {**_SQUARES, **_MACE, "stress_weight": 1.0},
    "mace-huber": {"energy": "huber", "forces": "huber", "stress": "huber", "huber_delta": 0.01, **_MACE},
    "mace-universal": {
        "energy": "huber",
        "forces": "stratified_huber",
        "stress": "huber",
        "huber_delta": 0.01,
        **_MACE,
    },
    "mace-l1l2": {"energy": "mae", "forces": "norm", **_MACE},
    "nequip": {**_SQUARES, "energy_weight": 1.0, "force_weight": 1.0, **_CONSTANT},
}
