"""Damaged files for every reader: `python tools/fuzz_readers.py --files 10000 --seed 0`.

Each file is a sample of tests/data/files with bytes changed, left out, repeated or cut off. A reader yields
structures or raises ValueError; anything else, or a file that takes too long, is printed as a fault, and the
exit code is 1.
"""

import argparse
import collections
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from megagnn.data.foreign import child
from megagnn.data.formats import ReadOptions, UnreadableError, read_structures

SAMPLES = Path(__file__).parents[1] / "tests" / "data" / "files"
SECONDS = 30.0
"""That a file may take."""


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The content with one to four kinds of damage."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        if not data:
            break
        at = rng.randrange(len(data))
        length = min(len(data) - at, 2 ** rng.randint(0, 9))
        kind = rng.choice(("flip", "set", "zero", "drop", "repeat", "swap", "cut"))
        if kind == "flip":
            data[at] ^= 1 << rng.randrange(8)
        elif kind == "set":
            data[at : at + min(length, 8)] = rng.randbytes(min(length, 8))
        elif kind == "zero":
            data[at : at + length] = bytes(length)
        elif kind == "drop":
            del data[at : at + length]
        elif kind == "repeat":
            data[at:at] = data[at : at + length]
        elif kind == "swap":
            other = rng.randrange(len(data))
            data[at], data[other] = data[other], data[at]
        else:
            del data[at:]
    return bytes(data)


def read(path: Path) -> str:
    """What comes of a file in one word: read, refused, or what went wrong."""
    told: list[UnreadableError] = []
    try:
        count = sum(1 for _ in read_structures(path, ReadOptions(on_unreadable=told.append)))
    except ValueError:
        return "refused"
    except Exception as error:  # a fault of the reader
        return f"{type(error).__name__}: {error}"
    if any("its library crashed" in str(error) for error in told):
        return "crashed in the child"
    return "read" if count else "refused"


def fuzz(num_files: int, seed: int, folder: Path) -> tuple[collections.Counter[str], list[str]]:
    """Outcomes with their numbers, and faults with the files that lead to them, which stay in the folder."""
    rng = random.Random(seed)
    samples = sorted(path for path in SAMPLES.rglob("*") if path.is_file())
    outcomes: collections.Counter[str] = collections.Counter()
    faults = []
    for number in range(num_files):
        sample = rng.choice(samples)
        content = damaged(sample.read_bytes(), rng)
        top = SAMPLES / sample.relative_to(SAMPLES).parts[0]
        path = folder / f"{number}{''.join(top.suffixes)}"
        if top.is_dir():
            shutil.copytree(top, path)
            (path / sample.relative_to(top)).write_bytes(content)
        else:
            path.write_bytes(content)
        began = time.monotonic()
        outcome = read(path)
        seconds = time.monotonic() - began
        if outcome in ("read", "refused", "crashed in the child") and seconds < SECONDS:
            outcomes[outcome] += 1
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        else:
            faults.append(f"{path} ({top.name}, {seconds:.1f} s): {outcome}")
    return outcomes, faults


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    child.TIME_LIMIT = SECONDS / 2
    folder = Path(tempfile.mkdtemp(prefix="fuzz_readers_"))
    began = time.monotonic()
    outcomes, faults = fuzz(arguments.files, arguments.seed, folder)
    seconds = time.monotonic() - began
    print(f"{arguments.files:,} files in {seconds:.0f} s: {dict(outcomes)}, {len(faults)} faults")
    print("\n".join(faults))
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
