"""The record of one run, and the kind of its losses."""

import json
from collections.abc import Mapping
from dataclasses import asdict, field
from typing import Annotated, NamedTuple

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Error(NamedTuple):
    """One loss of a run."""

    value: Positive
    unit: str


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class RunRecord:
    """Settings, cost and losses of a run; raises pydantic's ValidationError."""

    run: str
    """Name, unique in its sweep."""
    recipe: str
    """What is the same in all runs that may be compared: model family, optimizer, schedule."""
    width: PositiveInt
    depth: PositiveInt
    parameters: PositiveInt
    structures: PositiveInt
    """Training structures."""
    atoms: PositiveInt
    """Atoms of the training structures."""
    seed: NonNegativeInt
    learning_rate: Positive
    flops: Positive
    """Floating-point operations of the whole training, multiply-adds counted as 2."""
    steps: PositiveInt
    epochs: Positive
    """Passes over the training structures."""
    losses: Annotated[Mapping[str, Error], Field(min_length=1)]
    """Errors on the test split: {name: (value, unit)}."""
    seconds: Positive | None = None
    """Duration of the training; None where a killed run left its time behind."""
    memory_gib: Positive | None = None
    """Peak memory of a rank."""
    technique: str | None = None
    """How memory and time were saved, for the table of techniques."""
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        values = {k: v for k, v in asdict(self).items() if v is not None}
        values["data"] = {"structures": values.pop("structures"), "atoms": values.pop("atoms")}
        values["losses"] = {name: loss._asdict() for name, loss in self.losses.items()}
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
