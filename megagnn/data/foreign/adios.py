"""HydraGNN's ADIOS2 files: which variables they have, and their structures as they stand there.

`AdiosWriter` of hydragnn/utils/datasets/adiosdataset.py lays all structures of a side of the split one after
another, in a variable for each key, with the place and length of each structure beside it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import adios2  # type: ignore[import-not-found,unused-ignore]
import numpy as np

from megagnn.data.foreign import RefusedError

SIDES = ("trainset", "valset", "testset")
GEOMETRY = ("pos", "atomic_numbers", "x", "cell", "pbc", "graph_attr")
UNSAID = (
    "eV and Å are taken, for the file does not say its units, nor whether energies of elements were taken "
    "away; HydraGNN's script for ANI-1x writes Ha: --units energy=Ha,forces=Ha/Å"
)
BLOCK = 1000
"""Structures that are read at a time."""


def structures(path: str, keys: Sequence[str]) -> Iterator[dict[str, Any] | str]:
    """Yield a description of a file, {"layout", "keys", "num_structures"}, then its structures.

    Args:
        path: the folder.
        keys: names of labels; those that the file lacks are left out of "values".

    Raises:
        RefusedError: variables that are missing, or of which structures do not follow one another.
    """
    with adios2.FileReader(path) as file:
        names = set(file.available_variables())
        sides = [side for side in SIDES if f"{side}/pos" in names]
        if not sides:
            shown = ", ".join(sorted(names)[:8]) or "nothing"
            raise RefusedError(
                f"this ADIOS2 file has no positions of a side of a split ({SIDES[0]}/pos) as HydraGNN's; "
                f"it has {shown}; convert it to extended XYZ"
            )
        sizes = {side: file.read(f"{side}/pos/variable_count") for side in sides}
        there = sorted({name.split("/")[1] for name in names if name.endswith("/variable_count")})
        labels = [name for name in there if name in keys]
        total = sum(map(len, sizes.values()))
        yield {"layout": "HydraGNN", "keys": labels, "num_structures": total}
        for side in sides:
            columns = {
                name: _Column(file, f"{side}/{name}", names)
                for name in dict.fromkeys((*GEOMETRY, *labels))
                if f"{side}/{name}" in names
            }
            for start in range(0, len(sizes[side]), BLOCK):
                stop = min(start + BLOCK, len(sizes[side]))
                blocks = {name: column.read(start, stop) for name, column in columns.items()}
                for k in range(stop - start):
                    values = {name: block[k] for name, block in blocks.items()}
                    yield _structure(values, labels, f"{side} {start + k}", side)


class _Column:
    """A variable of all structures, along whose first axis they follow one another."""

    def __init__(self, file: Any, name: str, names: set[str]) -> None:
        if not {f"{name}/variable_count", f"{name}/variable_offset"} <= names:
            raise RefusedError(f"{name} has no variable_count or variable_offset beside it")
        self.file, self.name = file, name
        self.counts, self.offsets = (file.read(f"{name}/variable_{what}") for what in ("count", "offset"))
        self.shape = tuple(int(n) for n in file.available_variables()[name]["Shape"].split(",") if n.strip())
        ends = np.cumsum(self.counts)
        if (
            len(self.offsets) != len(ends)
            or (self.offsets != ends - self.counts).any()
            or (self.counts < 0).any()
        ):
            raise RefusedError(f"structures of {name} do not follow one another; write the file again")
        if len(ends) and (not self.shape or ends[-1] != self.shape[0]):
            raise RefusedError(f"{name} has shape {self.shape}, its structures have {ends[-1]} rows")

    def read(self, start: int, stop: int) -> list[Any]:
        """Rows of each structure."""
        first, counts = int(self.offsets[start]), self.counts[start:stop]
        num_rows = int(counts.sum())
        if not num_rows:
            return [np.zeros((0, *self.shape[1:]))] * len(counts)
        rest = [0] * (len(self.shape) - 1)
        rows = self.file.read(self.name, [first, *rest], [num_rows, *self.shape[1:]])
        return np.split(rows, np.cumsum(counts)[:-1])


def _structure(values: dict[str, Any], labels: Sequence[str], where: str, side: str) -> dict[str, Any] | str:
    """Atomic numbers are floating point; without them the first column of the inputs `x` has them."""
    if "atomic_numbers" not in values and "x" not in values:
        return f"{where}: there is neither atomic_numbers nor x"
    numbers = values["atomic_numbers"].reshape(-1) if "atomic_numbers" in values else values["x"][:, 0]
    pbc = values["pbc"].reshape(-1) != 0 if values.get("pbc") is not None and values["pbc"].size else None
    info: dict[str, Any] = {"side": side}
    state = values.get("graph_attr")
    if state is not None and state.size == 2:
        info |= dict(zip(("charge", "spin"), state.reshape(-1).tolist(), strict=True))
    found = {name: values[name] for name in labels if values[name].size}
    return {
        "numbers": numbers,
        "positions": values["pos"],
        "cell": values["cell"].reshape(3, 3) if pbc is not None and pbc.any() and "cell" in values else None,
        "pbc": pbc,
        "values": {name: value.reshape(()) if value.size == 1 else value for name, value in found.items()},
        "info": info,
        "notes": (UNSAID,),
        "where": where,
    }
