"""The record of one run, and the kind of its losses."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class RunRecord:
    """What a run was, what it took, and what came of it."""

    run: str
    """Name, unique in its sweep."""
    recipe: str
    """What is the same in all runs that may be compared: model family, optimizer, schedule."""
    width: int
    depth: int
    parameters: int
    structures: int
    """Training structures."""
    atoms: int
    """Atoms of the training structures."""
    seed: int
    learning_rate: float
    flops: float
    """Floating-point operations of the whole training, multiply-adds counted as 2."""
    steps: int
    epochs: float
    """Passes over the training structures."""
    losses: Mapping[str, tuple[float, str]]
    """Errors on the test split: {name: (value, unit)}."""
    seconds: float | None = None
    """Duration of the training; None where a killed run left its time behind."""
    memory_gib: float | None = None
    """Peak memory of a rank."""
    technique: str | None = None
    """How memory and time were saved, for the table of techniques."""
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """One line without its end."""
        values = {k: v for k, v in asdict(self).items() if v is not None}
        values["data"] = {"structures": values.pop("structures"), "atoms": values.pop("atoms")}
        values["losses"] = {k: {"value": v, "unit": u} for k, (v, u) in self.losses.items()}
        return json.dumps(values, ensure_ascii=False)


def squared(loss: str) -> bool | None:
    """Whether a loss is a squared error (`mse`), by its name; None for objectives of neither kind.

    A root of a mean square has the unit and the exponent of an absolute error.
    """
    last = loss.rsplit("_", 1)[-1].lower()
    return {"mse": True, "rmse": False, "mae": False}.get(last)


def describe_loss(loss: str, unit: str) -> str:
    """A loss in words, so that an exponent is never quoted without it."""
    kind = {True: "squared error", False: "absolute error", None: "training objective"}[squared(loss)]
    if loss.endswith("rmse"):
        kind = "root of the mean squared error, scales as an absolute error"
    return f"{loss} [{unit}], {kind}"
