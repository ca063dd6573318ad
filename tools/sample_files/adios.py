"""Writes an ADIOS2 test folder in HydraGNN's layout: `python tools/sample_files/adios.py DIR`.

It needs adios2. HydraGNN's own `AdiosWriter` passes an MPI communicator, so it needs a build with MPI; the
variables and attributes here are those that it writes.
"""

import sys
from pathlib import Path

import adios2
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from hdf5 import conformations


def write(path: Path) -> None:
    """Methane and water, neutral and charged, on three sides of a split."""
    with adios2.Stream(str(path), "w") as file:
        total = 0
        for seed, (side, count) in enumerate((("trainset", 4), ("valset", 1), ("testset", 2))):
            rows: dict[str, list[np.ndarray]] = {}
            for k in range(count):
                numbers = [6, 1, 1, 1, 1] if k % 2 == 0 else [8, 1, 1]
                x, e, f = conformations(len(numbers), 1, 10 * seed + k)
                structure = {
                    "pos": x[0],
                    "atomic_numbers": np.array(numbers, dtype=float)[:, None],
                    "cell": np.eye(3),
                    "energy": e[:, None],
                    "forces": f[0],
                    "graph_attr": np.array([[1.0, 2.0]] if k % 2 else [[0.0, 1.0]]),
                }
                for key, value in structure.items():
                    rows.setdefault(key, []).append(value.astype(np.float32))
                rows.setdefault("pbc", []).append(np.zeros((1, 3), dtype=np.int32))
            for key, values in rows.items():
                put(file, f"{side}/{key}", values)
            file.write_attribute(f"{side}/ndata", np.array([count]))
            file.write_attribute(f"{side}/keys", list(rows))
            total += count
        file.write_attribute("total_ndata", np.array([total]))
        file.write_attribute("dataset_name", "springs")
    (path / "profiling.json").unlink(missing_ok=True)


def put(file: adios2.Stream, name: str, values: list[np.ndarray]) -> None:
    """A variable of all structures, with count and offset of each."""
    joined = np.ascontiguousarray(np.concatenate(values))
    file.write(name, joined, list(joined.shape), [0] * joined.ndim, list(joined.shape))
    counts = np.array([len(value) for value in values], dtype=np.int64)
    for what, column in (("count", counts), ("offset", np.cumsum(counts) - counts)):
        file.write(f"{name}/variable_{what}", np.ascontiguousarray(column), [len(counts)], [0], [len(counts)])
    file.write_attribute(f"{name}/variable_dim", np.array([0]))


if __name__ == "__main__":
    write(Path(sys.argv[1]) / "hydragnn.bp")
