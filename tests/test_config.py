"""Configuration: what passes, and that errors name the key, what was got and the nearest valid one."""

from dataclasses import fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest

from megagnn.config import (
    RunConfig,
    TrainConfig,
    check_patience,
    config_from_dict,
    config_to_dict,
    flat_config,
    load_config,
)
from megagnn.objective.config import LossConfig
from megagnn.overrides import Change, Told, change_of, changes, split_overrides


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text('out_dir = "runs/x"\n[model]\nwidth = 32\n[optim]\nbetas = [0.9, 0.95]\n')
    return path


def test_file_and_overrides(file: Path) -> None:
    config = load_config(
        file,
        ["--model.width", "48", "--data.paths", "a,b", "--optim.clip_norm=none", "--loss.energy", "mae"],
    )
    assert (config.out_dir, config.model.width, config.data.paths) == ("runs/x", 48, ("a", "b"))
    assert config.optim.clip_norm is None
    assert config.optim.betas == (0.9, 0.95)
    assert config.loss.energy == "mae"


def test_several_values_of_a_list(file: Path, tmp_path: Path) -> None:
    given = ["--data.paths", "one", "two three", "a=b", "--optim.betas", "0.8", "0.9", "--model.width", "8"]
    config = load_config(file, given)
    assert config.data.paths == ("one", "two three", "a=b")
    assert (config.optim.betas, config.model.width) == ((0.8, 0.9), 8)
    assert load_config(file, ["--data.paths=a=b,c"]).data.paths == ("a=b", "c")
    assert load_config(file, ["--data.paths", '["a,b"]']).data.paths == ("a,b",)
    assert load_config(file, ["--data.paths", "a, b", "c"]).data.paths == ("a", "b", "c")
    (tmp_path / "x,y").mkdir()
    assert load_config(file, ["--data.paths", f"{tmp_path}/x,y"]).data.paths == (f"{tmp_path}/x,y",)
    with pytest.raises(ValueError, match=r"'model\.width' takes one value, got 2: 8 9"):
        load_config(file, ["--model.width", "8", "9"])


def test_names_that_look_like_numbers(file: Path) -> None:
    config = load_config(
        file, ["--out_dir", "2024", "--data.paths", "7", "true", "--optim.offload_dir", "none"]
    )
    assert (config.out_dir, config.data.paths, config.optim.offload_dir) == ("2024", ("7", "true"), None)


def test_home(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """~ in a file or behind an equals sign, where no shell has replaced it."""
    monkeypatch.setenv("HOME", "/home/me")
    file.write_text('out_dir = "~/runs/x"\n[data]\npaths = ["~/a", "b~"]\n')
    config = load_config(file, ["--optim.offload=disk", "--optim.offload_dir=~/moments"])
    assert (config.out_dir, config.data.paths) == ("/home/me/runs/x", ("/home/me/a", "b~"))
    assert config.optim.offload_dir == "/home/me/moments"
    assert load_config(file, ["--data.paths", "~/c,~/d"]).data.paths == ("/home/me/c", "/home/me/d")


def test_overrides_among_arguments(tmp_path: Path) -> None:
    """A list ends at the next option and at the configuration, whatever its name."""
    other = tmp_path / "settings"
    other.touch()
    for config in ("run.toml", str(other)):
        for given in (
            ["train", "--data.paths", "a", "b", config, "--resume"],
            ["train", config, "--resume", "--data.paths", "a", "b"],
            ["train", config, "--data.paths", "a", "b", "--resume"],
        ):
            rest, overrides = split_overrides(RunConfig, given, ("--resume",))
            assert sorted(rest) == sorted(["train", config, "--resume"])
            assert overrides == ["--data.paths", "a", "b"]
    rest, overrides = split_overrides(RunConfig, ["train", "--model.width", "8", "c"], ())
    assert (rest, overrides) == (["train", "c"], ["--model.width", "8"])


def test_round_trip(file: Path) -> None:
    config = load_config(file, ["--model.preset", "study", "--model.stress", "true"])
    assert config_from_dict(config_to_dict(config)) == config


def test_layout(file: Path) -> None:
    given = ["--parallel.data", "2", "--parallel.tensor", "4", "--parallel.plan", "edge"]
    parallel = load_config(file, [*given, "--parallel.bucket_megabytes", "0.5"]).parallel
    assert (parallel.data, parallel.pipeline, parallel.tensor) == (2, 1, 4)
    assert (parallel.plan, parallel.bucket_megabytes) == ("edge", 0.5)
    assert load_config(file, ["--parallel.data", "none"]).parallel.data is None


def test_flat_configuration(file: Path) -> None:
    flat = flat_config(load_config(file))
    assert (flat["out_dir"], flat["model.width"], flat["optim.betas"]) == ("runs/x", 32, [0.9, 0.95])
    assert not any(isinstance(value, dict) for value in flat.values())


def test_preset_sets_defaults_that_the_file_can_change() -> None:
    plain = config_from_dict({"model": {"preset": "satorras"}}).model
    assert (plain.distance_feature, plain.direction_sign, plain.envelope) == ("squared", -1, False)
    changed = config_from_dict({"model": {"preset": "satorras", "coordinate_aggregation": "sum"}}).model
    assert changed.coordinate_aggregation == "sum"


DIRECT = ["--model.forces", "direct"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--model.widht", "8"], "unknown configuration key 'model.widht'; nearest valid key: 'model.width'"),
        (["--widht", "8"], "unknown configuration key 'widht'; nearest valid key: 'model.width'"),
        (["--optimizer.learning_rate", "1"], "unknown configuration key 'optimizer'; nearest valid key"),
        (["--model.width", "-3"], "'model.width': input should be greater than 0, got -3"),
        (["--model.width", "wide"], "'model.width': input should be a valid integer.* got 'wide'"),
        (["--model.forces", "conservativ"], "got 'conservativ'; nearest: 'conservative'"),
        (["--optim.ema_decay", "1.0"], "'optim.ema_decay': input should be less than 1, got 1.0"),
        (["--model", "big"], "'model' is a section"),
        (["--model.width"], "override --model.width has no value"),
        (["--optim.warmup_steps", "10000"], "must be below train.num_steps .*use at most 9999"),
        (["--loss.stress_weight", "1"], "set model.stress = true or loss.stress_weight = 0"),
        (["--model.forces", "none"], "set loss.force_weight = 0 or model.forces = 'conservative'"),
        (["--model.stress", "true", "--model.forces", "direct"], "model.stress needs model.forces"),
        (["--parallel.tensor", "0"], "'parallel.tensor': input should be greater than 0, got 0"),
        (["--parallel.plan", "chann"], "got 'chann'; nearest: 'channel'"),
        (["--parallel.schedule", "zbh1"], "schedule is called 'zbh1'.*did you mean 'zb-h1'.*or one of gpipe"),
        (["--parallel.schedule", "1f1b"], "schedule = '1f1b' needs parallel.pipeline above 1"),
        (
            ["--parallel.pipeline", "2", "--parallel.schedule", "1f1b"],
            "'1f1b' is not for model.forces = 'conservative'; use one of two-pass, conservative",
        ),
        (
            [*DIRECT, "--parallel.pipeline", "2", "--parallel.schedule", "two-pass"],
            "'two-pass' is not for model.forces = 'direct'; use one of gpipe, 1f1b",
        ),
        (
            ["--parallel.pipeline", "2", "--train.gradient_method", "create_graph"],
            "parallel.pipeline above 1 needs train.gradient_method = 'one_backward'",
        ),
        (["--parallel.pipeline", "5", "--model.num_layers", "4"], "num_layers 4 are fewer than the 5 stages"),
        (
            [*DIRECT, "--parallel.pipeline", "2", "--parallel.schedule", "interleaved"],
            "over 2 pipeline ranks does not take 1 micro-batches .optim.accumulate_steps.; use 2",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_impossible_values(file: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(file, overrides)


def test_patience_that_can_never_act() -> None:
    steps = {"validate_every": 100, "num_steps": 200}
    with pytest.raises(
        ValueError, match=r"patience 2 times .*validate_every 100 is not below .*num_steps 200"
    ):
        check_patience(TrainConfig(patience=2, **steps))
    check_patience(TrainConfig(patience=1, **steps))
    check_patience(TrainConfig(patience=2, num_epochs=3, **steps))
    check_patience(TrainConfig(**steps))


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no configuration file at"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[model\nwidth = 3")
    with pytest.raises(ValueError, match="is not valid TOML"):
        load_config(tmp_path / "bad.toml")


def test_every_key_is_documented() -> None:
    """One line per key: `megagnn` users read config.py as its reference."""
    import ast
    import inspect

    import megagnn.config as module

    for node in ast.parse(inspect.getsource(module)).body:
        if not isinstance(node, ast.ClassDef) or node.name == "RunConfig":
            continue
        for field, following in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign):
                assert isinstance(following, ast.Expr), f"{node.name}.{field.target.id} lacks its line"


def test_precision() -> None:
    """bfloat16 and geometry of its own pass; what would lose steps, sums or digits is refused."""
    train = config_from_dict({"train": {"dtype": "bfloat16"}}).train
    assert (train.dtype, train.geometry) == ("bfloat16", None)
    config_from_dict({"train": {"dtype": "float32", "geometry": "float64"}})
    config_from_dict({"train": {"dtype": "float64", "geometry": "float64"}})
    half = {"train": {"dtype": "bfloat16"}}
    with pytest.raises(ValueError, match=r"geometry must be at least as wide .* float32 beside float64"):
        config_from_dict({"train": {"dtype": "float64", "geometry": "float32"}})
    with pytest.raises(ValueError, match=r"needs float32 master weights.* = 'torch'.*use 'own'"):
        config_from_dict({**half, "optim": {"implementation": "torch"}})
    with pytest.raises(ValueError, match="'torch_sparse', which adds bfloat16 in bfloat16; use 'own'"):
        config_from_dict({**half, "model": {"aggregation_backend": "torch_sparse"}})
    with pytest.raises(ValueError, match="input should be 'float32', 'float64' or 'bfloat16', got 'float16'"):
        config_from_dict({"train": {"dtype": "float16"}})


def test_schedules_of_pipelines() -> None:
    """`auto` is a schedule that suits the forces; a name of each kind is accepted."""
    values: dict[str, Any] = {"parallel": {"pipeline": 2}}
    assert config_from_dict(values).schedule == "conservative"
    direct = {**values, "model": {"forces": "direct"}}
    assert config_from_dict(direct).schedule == "1f1b"
    direct["parallel"] = {"pipeline": 2, "schedule": "interleaved"}
    assert config_from_dict({**direct, "optim": {"accumulate_steps": 4}}).schedule == "interleaved"


def test_every_key_says_what_another_value_means() -> None:
    """A new key without a class would be refused or passed over by resumed runs and sweeps as it happens."""
    found = changes(RunConfig)
    assert set(flat_config(RunConfig())) - set(found) == set(), "tables without entries have no flat key"
    assert found["train.seed"] is Change.REFUSED
    assert found["model.recompute_layers"] is found["optim.learning_rate"] is Change.TOLD
    assert {key for key, change in found.items() if Change.LOCAL in change} == {
        "train.device",
        "train.threads",
    }
    assert {key for key, change in found.items() if Change.JUDGED in change} == {
        "data.source_weights",
        "data.config_type_weights",
        *(f"loss.{field.name}" for field in fields(LossConfig)),
    }
    assert {key for key, change in found.items() if Change.FREE in change} == {
        f"model.{key}"
        for key in ("preset", "stress", "initialisation", "parametrisation", "base_width", "base_layers")
    }
    assert Change.REFUSED in change_of(RunConfig, "init.new_elements.Si"), (
        "entries are classed as their table"
    )
    assert change_of(RunConfig, "init") is change_of(RunConfig, "no.such") is Change.TOLD


KINDS = {"One": Told[int], "Other": Annotated[int, Change.REFUSED]}


def test_a_key_has_one_class_in_all_variants() -> None:
    one, other = (make_dataclass(name, [("new", hint)]) for name, hint in KINDS.items())
    section = type("Section", (), {"variants": {"one": one, "other": other}})
    with pytest.raises(TypeError, match=r"field new of Other is Change.* elsewhere Change.*; give it that"):
        changes(section)


@pytest.mark.parametrize("hint", [int, Annotated[int, Change.JUDGED, Change.TOLD]])
def test_a_key_without_a_class_is_found(hint: Any) -> None:
    section = make_dataclass("Section", [("named", Told[int]), ("new", hint)])
    root = make_dataclass("Root", [("section", section)])
    with pytest.raises(TypeError, match="field new of Section needs one class of Change, got"):
        changes(root)
