"""Configuration of a run: typed dataclasses, TOML files, dotted overrides.

    config = load_config("examples/configs/quickstart.toml", ["--model.width", "128"])

Every section is a frozen dataclass; every key has one line of documentation beside it. A key that does not
exist, or a value that cannot be, is a `ValueError` that names the nearest valid one.
"""

import sys
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveInt,
    SerializeAsAny,
    TypeAdapter,
    ValidationError,
)
from pydantic.dataclasses import dataclass

from megagnn.data.config import DataConfig
from megagnn.models.config import ModelConfig
from megagnn.models.registry import FAMILIES, presets_of
from megagnn.objective.config import LOSS_PRESETS, LossConfig
from megagnn.optim.config import OptimConfig
from megagnn.optim.rules import rule_of
from megagnn.overrides import (
    STRICT,
    Change,
    Local,
    Pairs,
    Place,
    Refused,
    Told,
    UserPath,
    check_keys,
    explain,
    parse_overrides,
    set_dotted,
)
from megagnn.parallel.config import ParallelConfig as ParallelConfig
from megagnn.pipeline_parallel import registry

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    """Length of the run, and what is written when."""

    num_steps: Told[PositiveInt] = 10_000
    """Optimizer steps."""
    num_epochs: Told[PositiveInt | None] = None
    """Passes over the training structures, which make the number of steps instead of `num_steps`."""
    direct_steps: Refused[NonNegativeInt] = 0
    """Steps on direct forces, three eighths of the work of conservative ones, with whose weights the run
    begins; a run of its own in out_dir/direct."""
    patience: Told[PositiveInt | None] = None
    """Validations in a row without a lower loss after which the run ends; none end it if not given."""
    seed: Refused[NonNegativeInt] = 0
    """Seed of the initial weights and of the order of the data."""
    dtype: Refused[Literal["float32", "float64", "bfloat16"]] = "float32"
    """Type of parameters and activations (total energies are always float64); see docs/precision.md."""
    geometry: Refused[Literal["float32", "float64"] | None] = None
    """Type of positions and all that is made of them; float64 beside float64, else float32, if not given."""
    device: Local[Literal["auto", "cpu", "cuda"]] = "auto"
    """`auto` takes a GPU where there is one."""
    threads: Local[PositiveInt | None] = None
    """CPU threads of a rank; by default the cores divided by the ranks of this machine."""
    gradient_method: Told[Literal["one_backward", "create_graph"]] = "one_backward"
    """How the gradient of a loss on conservative forces is taken."""
    on_bad_step: Told[Literal["stop", "skip"]] = "stop"
    """Where loss or gradient is not finite or above optim.spike_factor: end, or leave the step out."""
    max_bad_steps: Told[PositiveInt] = 10
    """`skip`: so many bad steps in a row are left out; one more ends the run."""
    log_every: Annotated[PositiveInt, Change.SAME_RUN] = 10
    """Steps between two points in TensorBoard."""
    validate_every: Told[PositiveInt] = 500
    """Steps between two validations."""
    checkpoint_every: Place[PositiveInt] = 500
    """Steps between two checkpoints; one is also written when the validation loss is the lowest so far."""
    keep_checkpoints: Place[PositiveInt] = 2
    """Newest checkpoints to keep, besides the best of each."""
    async_checkpoints: Place[bool] = True
    """Copy what a checkpoint holds to host memory and write it in the background, while training goes on."""
    export_best: Place[bool] = True
    """At the end, leave the best weights and their average as one file, too, best.safetensors; the main rank
    needs the memory for both."""


@dataclass(frozen=True, config=STRICT)
class InitConfig:
    """What of the checkpoint `init_from` a new run takes over; without `init_from` it has no effect."""

    weights: Refused[Literal["average", "model"]] = "average"
    """The moving average of the checkpoint's weights, which its validation saw, or the weights themselves."""
    references: Refused[Literal["fit", "keep"]] = "fit"
    """Reference energies: fitted anew on the training split, or those of the checkpoint's source of the same
    name, where elements that it lacks are fitted beside them."""
    new_sources: Refused[Pairs] = Field(default_factory=dict)
    """`keep`: {new = old}, for a source of the data the checkpoint's source whose references it keeps."""
    new_elements: Refused[Pairs] = Field(default_factory=dict)
    """{Si = "Ge"}: an element that the checkpoint lacks begins as another does; as the mean of all if not
    given."""
    new_levels: Refused[Pairs] = Field(default_factory=dict)
    """{new = old}: the same of levels of theory."""

    def __post_init__(self) -> None:
        if self.new_sources and self.references == "fit":
            raise ValueError(
                "init.new_sources says whose references are kept, but init.references is 'fit'; set it to "
                "'keep', or leave init.new_sources out"
            )


@dataclass(frozen=True, config=STRICT)
class RunConfig:
    """A whole run."""

    out_dir: Place[UserPath] = "runs/default"
    """Folder of checkpoints, TensorBoard events and metrics."""
    init_from: Refused[UserPath | None] = None
    """A checkpoint with whose weights a new run begins; the keys of [model] that are not given are its."""
    init: InitConfig = InitConfig()
    model: SerializeAsAny[ModelConfig] = FAMILIES["egnn"].config()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()

    def __post_init__(self) -> None:
        if self.init_from is None and self.init != InitConfig():
            raise ValueError(
                "keys of [init] say what a run takes of a checkpoint, but init_from names none; name it, or "
                "leave them out"
            )
        if self.loss.stress_weight > 0 and not self.model.stress:
            raise ValueError(
                f"loss.stress_weight is {self.loss.stress_weight:g} but model.stress is false; "
                "set model.stress = true or loss.stress_weight = 0"
            )
        if self.loss.force_weight > 0 and self.model.forces == "none":
            raise ValueError(
                f"loss.force_weight is {self.loss.force_weight:g} but model.forces is 'none'; "
                "set loss.force_weight = 0 or model.forces = 'conservative'"
            )
        if self.train.direct_steps and self.model.forces != "conservative":
            raise ValueError(
                f"train.direct_steps is {self.train.direct_steps}, steps on direct forces before others on "
                f"conservative ones, but model.forces is '{self.model.forces}'; set model.forces = "
                "'conservative' or leave train.direct_steps out"
            )
        if self.train.num_epochs is None:  # else the steps are not known before the data are
            self.check_warmup()
        self._check_sharding()
        self._check_precision()
        self._check_pipeline()

    def check_warmup(self) -> None:
        """Raises ValueError if the warm-up does not fit the steps."""
        steps, epochs = self.train.num_steps, self.train.num_epochs
        direct = self.train.direct_steps or steps
        if self.optim.warmup_steps >= min(direct, steps):
            number = f"train.num_steps ({steps})"
            if direct < steps:
                steps, number = direct, f"train.direct_steps ({direct})"
            elif epochs is not None:
                number = f"the {steps} steps of train.num_epochs = {epochs}"
            raise ValueError(
                f"optim.warmup_steps ({self.optim.warmup_steps}) must be below {number}; use at most "
                f"{steps - 1}"
            )

    @property
    def schedule(self) -> str:
        """`parallel.schedule` without `auto`."""
        if self.parallel.schedule != "auto":
            return self.parallel.schedule
        return "conservative" if self.model.forces == "conservative" else "1f1b"

    def _check_pipeline(self) -> None:
        ranks, schedule, batches = self.parallel.pipeline, self.schedule, self.optim.accumulate_steps
        if self.parallel.schedule != "auto":
            registry.find(schedule)
        if ranks == 1 and self.parallel.schedule != "auto":
            raise ValueError(
                f"parallel.schedule = '{schedule}' needs parallel.pipeline above 1; set it, or leave the "
                "schedule out"
            )
        if ranks == 1 and (self.parallel.stage_costs != "modelled" or self.parallel.stages is not None):
            raise ValueError(
                "parallel.stage_costs and parallel.stages need parallel.pipeline above 1; set it, or leave "
                "them out"
            )
        if ranks == 1:
            return
        conservative = self.model.forces == "conservative"
        entry = registry.find(schedule, self.model.forces)
        if conservative and self.train.gradient_method != "one_backward":
            raise ValueError(
                "parallel.pipeline above 1 needs train.gradient_method = 'one_backward', got "
                f"'{self.train.gradient_method}': a graph through the gradient cannot cross stages"
            )
        stages = ranks * entry.stages_per_rank
        if stages > self.model.num_layers:
            raise ValueError(
                f"model.num_layers {self.model.num_layers} are fewer than the {stages} stages of "
                f"parallel.pipeline {ranks} with schedule '{schedule}'; use more layers or fewer ranks"
            )
        sizes = self.parallel.stages
        if sizes is not None and (len(sizes) != stages or sum(sizes) != self.model.num_layers):
            raise ValueError(
                f"parallel.stages = {list(sizes)} must be {stages} numbers that add up to model.num_layers "
                f"{self.model.num_layers}; got {len(sizes)} that add up to {sum(sizes)}"
            )
        entry.check(ranks, batches)

    def _check_sharding(self) -> None:
        stage, optim = self.parallel.zero_stage, self.optim
        rule_of(optim.rule)
        if optim.implementation != "own" and optim.rule != "adamw":
            raise ValueError(
                f"optim.rule = '{optim.rule}' needs optim.implementation = 'own', got "
                f"'{optim.implementation}', which is one of AdamW; set one of the two to match"
            )
        if (stage > 0 or optim.offload != "none") and optim.implementation != "own":
            raise ValueError(
                f"optim.implementation = '{optim.implementation}' cannot be sharded or offloaded; set it to "
                "'own', or parallel.zero_stage = 0 and optim.offload = 'none'"
            )
        if (
            stage == 3
            and self.model.forces == "conservative"
            and self.train.gradient_method != "one_backward"
        ):
            raise ValueError(
                "parallel.zero_stage = 3 needs train.gradient_method = 'one_backward', got "
                f"'{self.train.gradient_method}': a graph through the gradient would need parameters that "
                "are gone; set one of the two to match"
            )
        if (optim.offload == "disk") != (optim.offload_dir is not None):
            raise ValueError(
                f"optim.offload is '{optim.offload}' and optim.offload_dir is {optim.offload_dir!r}; 'disk' "
                "and no other needs a folder"
            )

    def _check_precision(self) -> None:
        if self.train.dtype == "float64" and self.train.geometry == "float32":
            raise ValueError(
                "train.geometry must be at least as wide as train.dtype, got float32 beside float64; leave "
                "train.geometry out, or set train.dtype = 'float32'"
            )
        self.model.check_dtype(self.train.dtype)
        if self.train.dtype != "bfloat16":
            return
        if self.optim.implementation != "own":
            raise ValueError(
                "train.dtype = 'bfloat16' needs float32 master weights, or small steps are rounded away, got "
                f"optim.implementation = '{self.optim.implementation}', which keeps none; use 'own'"
            )


def check_patience(train: TrainConfig) -> None:
    """Raises ValueError where patience can never end a run.

    It is for a run that begins, for checkpoints of such runs can be used all the same; steps of epochs are
    known with the data alone, and are not looked at.
    """
    if train.patience is None or train.num_epochs is not None:
        return
    if train.patience * train.validate_every >= train.num_steps:
        raise ValueError(
            f"train.patience {train.patience} times train.validate_every {train.validate_every} is not below "
            f"train.num_steps {train.num_steps}, so it can never end the run; validate more often, or leave "
            "train.patience out"
        )


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> RunConfig:
    """Read a TOML file and apply `--section.field value` overrides; raises as `read_values` and
    `config_from_dict`."""
    return config_from_dict(read_values(path, overrides))


def read_values(path: str | Path, overrides: typing.Sequence[str] = ()) -> dict[str, Any]:
    """The keys that a TOML file and `--section.field value` overrides give, as nested dictionaries.

    Raises:
        ValueError: unreadable TOML, or an override that is none.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no configuration file at {path}")
    try:
        values = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    for key, texts in parse_overrides(overrides):
        set_dotted(RunConfig, values, key, texts)
    return values


def config_from_dict(values: dict[str, Any]) -> RunConfig:
    """Nested dictionaries, as TOML gives them, to a complete RunConfig.

    Raises:
        ValueError: an unknown key, or a value that cannot be; names the key and the nearest valid one.
    """
    check_keys(RunConfig, values)
    model = values.get("model", {})
    for section, presets in (("model", presets_of(model)), ("loss", LOSS_PRESETS)):
        given = values.get(section, {})
        preset = given.get("preset") if isinstance(given, dict) else None
        if isinstance(preset, str) and preset in presets:
            values = {**values, section: {**presets[preset], **given}}
    errors, kind = [], ModelConfig.choose(model)
    try:
        values = {**values, "model": TypeAdapter(kind).validate_python(values.get("model", {}))}
    except ValidationError as error:
        errors = [{**e, "loc": ("model", *e["loc"])} for e in error.errors()]
        values = {**values, "model": kind()}
    try:
        config = TypeAdapter(RunConfig).validate_python(values)
    except ValidationError as error:
        # rules between sections say nothing where one of them is not known
        errors += [{**e} for e in error.errors() if e["loc"] or not errors]
    if errors:
        raise ValueError("\n".join(explain(e) for e in errors))
    return config


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Nested plain dictionaries, ready for JSON; `config_from_dict` gives the same configuration back."""
    values: dict[str, Any] = TypeAdapter(RunConfig).dump_python(config, mode="json")
    return values


def with_num_steps(config: RunConfig, num_steps: int) -> RunConfig:
    """The configuration with this number of steps; raises ValueError where it does not fit the other keys."""
    values = config_to_dict(config)
    found = config_from_dict({**values, "train": {**values["train"], "num_steps": num_steps}})
    found.check_warmup()
    return found


def flat_config(config: RunConfig) -> dict[str, Any]:
    """{"model.width": 128, ...}: every key of a configuration by its dotted name, in plain values."""
    return _flat(config_to_dict(config))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
