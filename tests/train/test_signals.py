"""A signal ends a run at a step's end, with everything saved; a second one ends it at once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megagnn.checkpoint.single_file import load_checkpoint
from megagnn.train import signals
from megagnn.train.signals import StopSignals
from tests import runs

SHORT = ("--train.num_steps", "12", "--train.validate_every", "6", "--train.checkpoint_every", "12")


def interrupted(store: Path, out_dir: Path, monkeypatch: pytest.MonkeyPatch, step: int, name: str) -> int:
    """`megagnn train`, which signals itself in the middle of a step; returns the exit code."""
    from megagnn.train.trainer import Trainer

    original = Trainer._step

    def signalled(self: Trainer, *arguments: object) -> object:
        if self.progress.step == step - 1:
            signal.raise_signal(getattr(signal, name))
        return original(self, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", signalled)
        return runs.train(store, out_dir, *SHORT)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 0), ("SIGUSR1", 0), ("SIGINT", 130)])
def test_stop_save_and_resume(
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    name: str,
    code: int,
) -> None:
    """Between checkpoints, and where a validation is due, which the resumed run must not miss or repeat."""
    handlers = {number: signal.getsignal(number) for number in signals.WISHES}
    stop = 6 if name == "SIGTERM" else 4
    assert interrupted(store, tmp_path / "parts", monkeypatch, stop, name) == code
    assert {number: signal.getsignal(number) for number in signals.WISHES} == handlers
    last = tmp_path / "parts/checkpoints/last"
    shown = capfd.readouterr()
    assert f"{name}: stopping at the end of this step" in shown.err
    assert f"after step {stop} of 12; saved {last}. The same command with --resume" in shown.out
    assert load_checkpoint(last).progress.step == stop
    assert runs.train(store, tmp_path / "parts", *SHORT, "--resume") == 0
    assert runs.train(store, tmp_path / "whole", *SHORT) == 0
    same_end(tmp_path)


def same_end(folder: Path) -> None:
    """Of the run in parts and of the whole one."""
    for kind in ("last", "best"):
        a, b = (
            load_checkpoint(folder / d / "checkpoints" / kind, optimizer=True) for d in ("parts", "whole")
        )
        assert a.progress == b.progress
        assert all(torch.equal(a.tensors[key], tensor) for key, tensor in b.tensors.items())


@pytest.mark.parametrize("step", [6, 12])
def test_a_validation_is_broken_off_and_done_by_the_resumed_run(
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    step: int,
) -> None:
    """Also the one at the end; were it left out, the resumed run would have another best checkpoint."""
    from megagnn.models.potential import Potential
    from megagnn.train.trainer import Trainer

    seen, validate, forward = [], Trainer._validate, Potential.forward

    def signalled(self: Potential, batch: dict[str, torch.Tensor]) -> object:
        seen.append(batch)
        signal.raise_signal(signal.SIGTERM)
        return forward(self, batch)

    def watched(self: Trainer, *arguments: object) -> object:
        with monkeypatch.context() as patch:
            if self.progress.step == step:
                patch.setattr(Potential, "forward", signalled)
            return validate(self, *arguments)  # type: ignore[arg-type]

    small = (*SHORT, "--data.max_atoms", "40")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_validate", watched)
        assert runs.train(store, tmp_path / "parts", *small) == 0
    assert len(seen) == 1, "the second batch is not begun"
    assert f"stopped by SIGTERM after step {step} of 12" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "parts/checkpoints/last").progress.validation_due
    assert runs.train(store, tmp_path / "parts", *small, "--resume") == 0
    assert "best checkpoint: " in capsys.readouterr().out
    assert (tmp_path / "parts/checkpoints/best.safetensors").exists()
    assert runs.train(store, tmp_path / "whole", *small) == 0
    same_end(tmp_path)


def test_a_second_signal_is_the_former_handler_s(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    with StopSignals(speaks=False) as stop:
        assert stop.received == ""
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.received == "SIGUSR1"
        now[0] += 1.0
        os.kill(os.getpid(), signal.SIGINT)  # a launcher that hands on what we got, too
        now[0] += 5.0
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.received == "SIGUSR1"
    signal.signal(signal.SIGINT, before)


SLEEPER = """
import sys, time
from megagnn.train.signals import StopSignals
with StopSignals() as stop:
    print("ready", flush=True)
    for _ in range(600):
        time.sleep(0.1)
"""


def test_a_second_sigterm_ends_the_process() -> None:
    process = subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(signals.SAME_WISH_SECONDS + 0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == -signal.SIGTERM
    process.stdout.close()


def test_processes_that_read_data_outlive_the_signal(store: Path, tmp_path: Path) -> None:
    """The batch system signals them, too; without care the DataLoader finds its worker dead. They live on
    from epoch to epoch."""
    trainer = runs.make_trainer(
        store, tmp_path / "run", "--data.num_workers", "1", "--data.max_structures", "1"
    )
    batches = trainer.train.batches()
    first = next(batches)
    [child] = runs.readers()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(child, number)
    time.sleep(0.5)
    rest = list(batches)
    assert len(rest) + 1 == len(trainer.train.sampler.batches(0)) > 10
    assert first.keys() == rest[0].keys()
    again = trainer.train.batches(1)
    next(again)
    assert runs.readers() == [child]
    next(trainer.train.batches(2))
    with pytest.raises(RuntimeError, match="batches were asked for anew"):
        next(again)
    trainer.train.close()
    del batches, again
    assert runs.readers() == []
