"""Runs that begin with a checkpoint: what they keep, what they add, and what they refuse."""

import dataclasses
import re
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from megagnn.checkpoint.single_file import load_checkpoint, load_potential
from megagnn.cli import main
from megagnn.config import config_from_dict
from megagnn.data import keys
from megagnn.data.dataset import StructureDataset
from megagnn.models.potential import Potential
from megagnn.parallel.context import ParallelContext
from megagnn.train.fine_tune import run_config
from megagnn.train.trainer import Trainer
from tests import runs

FEW = ("--train.num_steps", "4", "--optim.warmup_steps", "1", "--train.validate_every", "4")
DOUBLE = ("--train.dtype", "float64")


@pytest.fixture(scope="module")
def new_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_gold(tmp_path_factory.mktemp("gold") / "store")


def tune(checkpoint: Path, data: Path, out: Path, *more: str) -> int:
    return runs.train(data, out, "--init_from", str(checkpoint), *FEW, *more)


def predicted(potential: Potential, store: Path, split: str = "test") -> dict[str, torch.Tensor]:
    """Energies without references, and forces, of structures of a store."""
    statistics = potential.statistics
    data = StructureDataset([store], split, potential.model.config.cutoff)
    source = [statistics.sources.index(s) if s in statistics.sources else 0 for s in data.sources]
    level = [statistics.levels.index(name) for name in data.levels]
    batch = data.batch(range(len(data)), potential.model.precision.geometry)
    batch[keys.SOURCE] = torch.tensor(source)[batch[keys.SOURCE]]
    batch[keys.LEVEL] = torch.tensor(level)[batch[keys.LEVEL]]
    found = potential(batch)
    return {
        "energy": found[keys.ENERGY] - potential.model.reference_energy(batch),
        "forces": found[keys.FORCES],
    }


@pytest.mark.parametrize("form", ["folder", "file", "run"])
def test_the_function_is_kept(run_dir: Path, store: Path, new_store: Path, tmp_path: Path, form: str) -> None:
    """Energies without references and forces of old structures are the checkpoint's; the run is new."""
    place = {"folder": "checkpoints/best", "file": "checkpoints/best.safetensors", "run": "checkpoints/last"}
    path = run_dir / place[form]
    trainer = runs.make_trainer(new_store, tmp_path / "run", *DOUBLE, "--init_from", str(path))
    assert trainer.progress.step == 0
    assert trainer.statistics.elements == (29, 47, 79)
    assert trainer.statistics.sources == ("gold",)
    old = load_potential(path, torch.float64)
    before, after = predicted(old, store), predicted(trainer.potential, store)
    for name, values in before.items():
        assert (values - after[name]).abs().max() <= 1e-10, name
    with trainer.average.applied():
        averaged = predicted(trainer.potential, store)
    assert (before["energy"] - averaged["energy"]).abs().max() <= 1e-10, "the average begins with them"
    own = predicted(load_potential(path, torch.float64, average=False), store)
    assert (own["energy"] - after["energy"]).abs().max() > 1e-6, "the weights themselves are others"
    gold_row = dict(trainer.potential.model.named_parameters())["element_embedding.weight"][2]
    table = dict(old.model.named_parameters())["element_embedding.weight"]
    assert torch.allclose(gold_row, table.mean(0), rtol=0, atol=1e-12)


def test_new_elements_begin_as_others(folder: Path, new_store: Path, tmp_path: Path) -> None:
    """Gold as silver: a crystal of gold has the forces that the checkpoint gives to silver in its place."""
    options = ("--init_from", str(folder), "--init.new_elements", "Au=Ag", "--init.weights", "model")
    trainer = runs.make_trainer(new_store, tmp_path / "run", *DOUBLE, *options)
    silver = [
        dataclasses.replace(
            s, atomic_numbers=np.where(s.atomic_numbers == 79, 47, s.atomic_numbers).astype("u1")
        )
        for s in runs.gold()
    ]
    as_silver = runs.write_gold(tmp_path / "silver", silver)
    old = load_potential(folder, torch.float64, average=False)
    before, after = predicted(old, as_silver), predicted(trainer.potential, new_store)
    for name, values in before.items():
        assert (values - after[name]).abs().max() <= 1e-10, name


def test_train_resume_and_evaluate(
    folder: Path, new_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """4 steps in one go and in two, which need the checkpoint only to begin, are the same bits."""
    copy = tmp_path / "base.safetensors"
    assert main(["export", str(folder), str(copy)]) == 0
    settings = ("--optim.freeze", "layers.0", "--optim.rates", "energy_head=1,layers=0.1")
    every = ("--train.checkpoint_every", "2", "--init.new_elements.Au", "Ag")
    assert tune(copy, new_store, tmp_path / "whole", *settings, *every) == 0
    told = capsys.readouterr().err
    assert "begins with the averaged weights of" in told
    assert "new elements: Au (as Ag)" in told
    options = ("--init_from", str(copy), "--train.threads", "1", *FEW, *settings, *every)
    stopped = runs.make_trainer(new_store, tmp_path / "parts", *options)
    original = stopped._step

    def step(*arguments: Any) -> bool:
        return original(*arguments) or stopped.progress.step == 2

    stopped._step = step  # type: ignore[method-assign]
    assert stopped.run(), "stopped after step 2, as by a signal"
    copy.unlink()
    assert tune(copy, new_store, tmp_path / "parts", *settings, *every, "--resume") == 0
    a, b = (load_checkpoint(tmp_path / f"{name}/checkpoints/last") for name in ("whole", "parts"))
    assert a.tensors.keys() == b.tensors.keys()
    assert all(torch.equal(tensor, b.tensors[name]) for name, tensor in a.tensors.items())
    assert a.config.init_from == str(copy)
    assert main(["evaluate", str(tmp_path / "parts/checkpoints/best"), str(new_store)]) == 0


def test_the_model_is_the_checkpoint_s(folder: Path, new_store: Path, tmp_path: Path) -> None:
    """Keys of [model] that are not set are those of the checkpoint; what is set and differs is refused."""
    (tmp_path / "empty.toml").write_text("[train]\nnum_steps = 200\n")
    from_it = ["--init_from", str(folder), "--data.paths", str(new_store)]
    found = run_config(tmp_path / "empty.toml", from_it).model
    assert (found.width, found.num_layers, found.cutoff, found.stress) == (16, 2, 4.0, True)
    found = run_config(tmp_path / "empty.toml", [*from_it, "--model.stress", "false"]).model
    assert (found.width, found.stress) == (16, False)
    for key, value in (("width", "32"), ("cutoff", "5.0"), ("preset", "study")):
        named = "depth_scaling" if key == "preset" else key
        with pytest.raises(ValueError, match=rf"model\.{named} is .* in the configuration and .* in .*last"):
            run_config(tmp_path / "empty.toml", [*from_it, f"--model.{key}", value])
    bare = config_from_dict({"init_from": str(folder), "data": {"paths": [str(new_store)]}})
    with pytest.raises(ValueError, match=r"model\.width is 128 in the configuration and 16 in"):
        Trainer(bare, ParallelContext())


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (("--model.width", "24"), r"model\.width is 24 in the configuration and 16 in .*; leave it out"),
        (("--init.new_elements", "Pt=Ag"), "names the element 'Pt', which the training data do not hold"),
        (
            ("--init.new_elements", "Au=Si"),
            "begins the element 'Au' as 'Si', which .* does not know; it knows",
        ),
        (("--init.new_elements", "Cu=Ag"), "names the element 'Cu', whose row .* holds already"),
        (("--init.new_levels", "EMT=EMT"), "names the level of theory 'EMT', whose row .* holds already"),
        (("--init.references", "keep"), "has no source 'gold', it has clusters, crystals; name one by"),
        (("--init.references", "keep", "--init.new_sources", "gold=all"), "as 'all', which .* does not know"),
        (
            ("--optim.freeze", "layer.0"),
            "optim.freeze names 'layer.0', .* the nearest is 'layers.0', the parts",
        ),
        (
            ("--optim.rates", "layers.2=0.1"),
            "optim.rates names 'layers.2', .*layers.0, layers.1, energy_head",
        ),
        (("--optim.rates", "layers"), "pairs are written NAME=VALUE"),
        (("--optim.rates", "layers=-1"), "'optim.rates.layers': input should be greater than or equal to 0"),
        (("--optim.freeze", "element_embedding,layers,energy_head"), "leave no part of the model to train"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(
    folder: Path,
    new_store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    rule: str,
) -> None:
    assert tune(folder, new_store, tmp_path / "run", *options) == 2
    assert re.search(rule, capsys.readouterr().err)
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "run" / "config.json").exists()


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(ValueError, match=r"keys of \[init\] .* but init_from names none"):
        config_from_dict({"init": {"references": "keep"}})
    with pytest.raises(ValueError, match=r"but init.references is 'fit'; set it to 'keep'"):
        config_from_dict({"init_from": "base", "init": {"new_sources": {"a": "b"}}})
    config_from_dict({"init_from": "base", "init": {"new_sources": {"a": "b"}, "references": "keep"}})


def test_what_is_no_checkpoint(
    run_dir: Path, new_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that holds one, a text, a damaged file, nothing."""
    text, damaged = tmp_path / "text.safetensors", tmp_path / "damaged.safetensors"
    text.write_text("no checkpoint")
    content = bytearray((run_dir / "checkpoints/best.safetensors").read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(bytes(content))
    for path, rule in (
        (run_dir, "is a folder, not a checkpoint; did you mean .*checkpoints/best"),
        (text, "is truncated or not a safetensors file"),
        (damaged, "is damaged: its checksum"),
        (tmp_path / "none", "no checkpoint at"),
    ):
        assert tune(path, new_store, tmp_path / "run") == 2
        assert re.search(rule, capsys.readouterr().err), path
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_references(folder: Path, new_store: Path, tmp_path: Path) -> None:
    """Fitted anew, of the data alone; or kept, with all elements of the old source, and gold fitted."""
    base = ("--init_from", str(folder))
    old = load_checkpoint(folder).statistics
    fitted = runs.make_trainer(new_store, tmp_path / "fit", *base).statistics
    assert fitted.source_elements == ((29, 79),)
    keep = ("--init.references", "keep", "--init.new_sources", "gold=crystals")
    kept = runs.make_trainer(new_store, tmp_path / "keep", *base, *keep).statistics
    assert kept.source_elements == ((29, 47, 79),)
    assert kept.references[0][:2] == old.references[old.sources.index("crystals")]
    left, golds = [], []
    train = StructureDataset([new_store], "train", 4.0)
    for record in map(train.record, range(len(train))):
        numbers = record[keys.ATOMIC_NUMBERS]
        left.append((record[keys.ENERGY] - (numbers == 29).sum() * kept.references[0][0]) / len(numbers))
        golds.append((numbers == 79).mean())
    want = np.dot(golds, left) / np.dot(golds, golds)
    assert kept.references[0][2] == pytest.approx(want, rel=1e-9)
    for statistics in (fitted, kept):
        assert (statistics.output_scale, statistics.mean_neighbours) == (
            old.output_scale,
            old.mean_neighbours,
        )


def test_levels_of_theory(folder: Path, tmp_path: Path) -> None:
    """A checkpoint with one level gets a table of zeros; that of two gets a row for the third."""
    two = runs.write_gold(tmp_path / "two", [*runs.gold("EMT", "a"), *runs.gold("other", "b", seed=4)])
    first = runs.make_trainer(two, tmp_path / "first", "--init_from", str(folder), *DOUBLE)
    assert first.statistics.levels == ("EMT", "other")
    table = dict(first.potential.model.named_parameters())["level_embedding.weight"]
    assert table.shape == (2, 16)
    assert (table == 0).all()
    with torch.no_grad():
        table[0], table[1] = 1.0, 3.0
    first._save()
    first.checkpoints.wait()
    third = runs.write_gold(tmp_path / "third", runs.gold("new", "c"))
    for options, row in (((), 2.0), (("--init.new_levels", "new=other"), 3.0)):
        given = ("--init_from", str(first.last_path), "--init.weights", "model", *DOUBLE, *options)
        found = runs.make_trainer(third, tmp_path / "second", *given)
        assert found.statistics.levels == ("EMT", "other", "new")
        assert found.statistics.source_levels == ((2,),)
        table = dict(found.potential.model.named_parameters())["level_embedding.weight"]
        assert table.mean(1).tolist() == [1.0, 3.0, row]
        batch = next(found.train.batches())
        assert (batch[keys.LEVEL] == 2).all()


def test_new_rows_of_a_frozen_table_are_told(folder: Path, new_store: Path, tmp_path: Path) -> None:
    options = ("--init_from", str(folder), *FEW)
    frozen = ("--optim.freeze", "element_embedding")
    (told,) = runs.make_trainer(new_store, tmp_path / "a", *options, *frozen).told
    assert "element_embedding is frozen, so its rows of Au, " in told
    assert not runs.make_trainer(new_store, tmp_path / "b", *options).told


@pytest.mark.parametrize(
    "text", ["model = 3", '[model]\npreset = ["a"]', "loss = 3", '[loss]\npreset = ["a"]']
)
def test_a_section_that_is_none_is_told(text: str, folder: Path, tmp_path: Path) -> None:
    for first in ("", f'init_from = "{folder}"\n'):
        (tmp_path / "c.toml").write_text(first + text)
        with pytest.raises(ValueError, match=r"'(model|loss)(\.preset)?'"):
            run_config(tmp_path / "c.toml")


@pytest.mark.parametrize("implementation", ["own", "torch", "sharded", "bfloat16"])
def test_frozen_parts_and_rates(folder: Path, new_store: Path, tmp_path: Path, implementation: str) -> None:
    """Frozen parts keep their bits, with decay, and are in no norm; others move by their rates."""
    options = {
        "own": (),
        "torch": ("--optim.implementation", "torch"),
        "sharded": ("--parallel.zero_stage", "3"),
        "bfloat16": ("--train.dtype", "bfloat16"),
    }[implementation]
    # clipped gradients would give moments of another norm than the one that is logged
    begun = ("--init_from", str(folder), "--optim.clip_norm", "none", *options)
    frozen_parts = ("--optim.freeze", "element_embedding,layers.0")
    rates = ("--optim.rates.layers", "0.01", "--optim.weight_decay", "0.1", "--optim.ema_decay", "0.5")
    trainer = runs.make_trainer(new_store, tmp_path / "run", *FEW, *begun, *frozen_parts, *rates)
    before = {(p.name, p.kind): p.values.clone() for p in trainer._pieces() if p.kind in ("model", "average")}
    norms: list[float] = []
    original = trainer._log

    def log(loss: torch.Tensor, shares: Any, norm: torch.Tensor, *rest: Any) -> None:
        norms.append(float(norm))
        original(loss, shares, norm, *rest)

    trainer._log = log  # type: ignore[method-assign]
    trainer.config = dataclasses.replace(
        trainer.config, train=dataclasses.replace(trainer.config.train, log_every=1)
    )
    trainer.run()
    moved: dict[str, float] = {}
    for piece in trainer._pieces():
        if piece.kind not in ("model", "average"):
            if piece.name.startswith(("element_embedding", "layers.0")):
                assert (piece.values == 0).all(), f"{piece.kind} of {piece.name}"
            continue
        change = (piece.values - before[piece.name, piece.kind]).abs().max().item()
        if piece.name.startswith(("element_embedding", "layers.0")):
            assert change == 0, f"{piece.kind} of {piece.name}"
        elif piece.kind == "model":
            moved[piece.name] = change
    slow = [change for name, change in moved.items() if name.startswith("layers.1")]
    fast = [change for name, change in moved.items() if name.startswith("energy_head")]
    assert 0 < max(slow) < 0.05 * min(fast)
    free = runs.make_trainer(new_store, tmp_path / "free", *FEW, *begun)
    free._step(next(free.train.steps(0, 0)), MagicMock(), MagicMock(received=""))
    frozen = ("element_embedding", "layers.0")
    whole = sum(float(p.values.double().square().sum()) for p in free._pieces() if p.kind == "exp_avg")
    rest = sum(
        float(p.values.double().square().sum())
        for p in free._pieces()
        if p.kind == "exp_avg" and not p.name.startswith(frozen)
    )
    share = float(free.optimizer.param_groups[0]["betas"][0])
    assert norms[0] == pytest.approx(
        rest**0.5 / (1 - share), rel=1e-2 if implementation == "bfloat16" else 1e-4
    )
    assert whole > 1.01 * rest


def test_old_data_mixed_in(
    folder: Path, store: Path, new_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Old and new stores: old sources keep their references and count less, the new one is fitted."""
    both, out = f"{store},{new_store}", tmp_path / "run"
    options = ("--data.source_weights", "clusters=0.2,crystals=0.1", "--init.references", "keep")
    given = ("--init_from", str(folder), *FEW, *options)
    assert runs.train(Path(both), out, *given) == 0
    assert "references kept for clusters, crystals, fitted for others" in capsys.readouterr().err
    made = load_checkpoint(out / "checkpoints/last").statistics
    old = load_checkpoint(folder).statistics
    assert made.sources == ("clusters", "crystals", "gold")
    assert [row[:2] for row in made.references[:2]] == list(old.baseline())
    assert made.source_elements == ((29, 47), (29, 47), (29, 79))
    trainer = runs.make_trainer(Path(both), tmp_path / "other", *given)
    batch = next(trainer.train.batches())
    weight = torch.tensor([0.2, 0.1, 1.0])[batch[keys.SOURCE]]
    assert torch.allclose(batch[keys.WEIGHTS], weight[:, None].expand(-1, 3).to(batch[keys.WEIGHTS].dtype))
    assert main(["evaluate", str(out / "checkpoints/best"), str(store), str(new_store)]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in made.sources)
