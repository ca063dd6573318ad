"""How long a save holds training up, with and without a thread, and how long loading and verifying take.

    OMP_NUM_THREADS=1 python -m tools.bench.checkpoint --megabytes 400

Correct first: what is loaded is what was saved. Then medians over rounds, of both kinds of saves in turn.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megagnn.checkpoint.folder import open_folder
from megagnn.checkpoint.progress import Progress
from megagnn.checkpoint.single_file import WEIGHTS
from megagnn.checkpoint.writer import CheckpointStore
from megagnn.config import RunConfig
from megagnn.models.statistics import Statistics
from megagnn.optim.pieces import Piece
from megagnn.optim.rules import RULES
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.parameter import ParameterLayout

NUM_PARAMETERS = 50
KINDS = (*WEIGHTS, *RULES["adamw"].state)


def pieces_of_size(megabytes: float) -> list[Piece]:
    """Weights, average and moments of some matrices, float32, so large together."""
    rows = int(megabytes * 2**20 / 4 / len(KINDS) / NUM_PARAMETERS / 256)
    return [
        Piece(
            f"{k}",
            kind,
            ParameterLayout((rows, 256)),
            0,
            rows * 256,
            torch.randn(rows * 256),
            replicated=True,
        )
        for kind in KINDS
        for k in range(NUM_PARAMETERS)
    ]


def seconds(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=400.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: a temporary one)")
    arguments = parser.parse_args()
    pieces = pieces_of_size(arguments.megabytes)
    context = ParallelContext()
    nothing = Statistics((1,), ("none",), ("none",), ((1,),), ((0,),), ((0.0,),), (0.0,), 1.0, 1.0)
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        stores = {
            name: CheckpointStore(Path(temporary) / name, context, asynchronous=name == "thread")
            for name in ("thread", "no thread")
        }
        for step in range(1, arguments.rounds + 2):
            for name, store in stores.items():

                def save(store: CheckpointStore = store, step: int = step) -> None:
                    store.save(pieces, RunConfig(), nothing, Progress(step=step))

                held = seconds(save)
                waited = seconds(store.wait)
                if step > 1:  # the first makes the buffers
                    times.setdefault(f"save, {name}: training waits", []).append(held)
                    times.setdefault(f"save, {name}: until committed", []).append(held + waited)
        folder = Path(temporary) / "thread" / "last"
        before = [piece.values.clone() for piece in pieces]
        for piece in pieces:
            piece.values.zero_()
        for _ in range(arguments.rounds):
            times.setdefault("verify", []).append(seconds(lambda: open_folder(folder)))
            found = open_folder(folder)
            times.setdefault("load", []).append(seconds(lambda found=found: found.load(pieces)))
    same = all(torch.equal(p.values, b) for p, b in zip(pieces, before, strict=True))
    if not same:
        raise SystemExit("what is loaded is not what was saved")
    size = sum(p.values.nbytes for p in pieces) / 2**20
    print(f"{size:.0f} MiB, one process, {torch.get_num_threads()} thread(s)")
    for what, values in times.items():
        print(f"{what:32s} {statistics.median(values):7.3f} s   ({min(values):.3f} to {max(values):.3f})")


if __name__ == "__main__":
    main()
