"""Pickles of torch_geometric's `Data`, read without that library and without running anything they name.

Tensors are read without torch, too, whose import would cost a child process seconds.
"""

import collections
import io
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C
"""What torch's own format of storages begins with."""
TYPES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}
"""Class of a storage -> type of its numbers."""


class Record(dict[str, Any]):
    """The attributes of a pickled `Data` object or of its storage, of either layout of torch_geometric.

    Up to 1.x they are the object's own; since 2.x they are in `_mapping` of the storage in its `_store`.
    """

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple):
            state = {**(state[0] or {}), **(state[1] or {})}
        state = state.get("_store", state)
        state = state.get("_mapping", state)
        self.update({k: v for k, v in state.items() if v is not None and not k.startswith("_")})


def load(content: bytes) -> Any:
    """The object of a pickle: records, numbers, text, and arrays in place of tensors.

    Raises:
        pickle.UnpicklingError: it names anything but the classes of data.
        Exception: whatever a damaged pickle leads to.
    """
    return _Unpickler(io.BytesIO(content)).load()


def _storage(content: bytes) -> Any:
    """The numbers of a storage, (n,): pickles of a magic number, a version, the machine, what is stored and
    its keys; then their count, int64, and the numbers."""
    file = io.BytesIO(content)
    magic, _, _, kind, keys = (_Unpickler(file).load() for _ in range(5))
    if magic != MAGIC or len(keys) != 1:
        raise pickle.UnpicklingError("a tensor in another format than torch.save's of before 1.6")
    count = int(np.frombuffer(file.read(8), "<i8")[0])
    numbers = np.frombuffer(file.read(), kind)
    if len(numbers) < count:
        raise pickle.UnpicklingError(f"a tensor of {count} numbers, of which {len(numbers)} are there")
    return numbers[:count]


def _tensor(storage: Any, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any) -> Any:
    """The array of a tensor: a view of its storage."""
    steps = [(n - 1) * step for n, step in zip(size, stride, strict=True)]
    if min((offset, *size, *stride)) < 0 or np.prod(size, dtype=float) > len(storage):
        raise pickle.UnpicklingError(f"a tensor of shape {tuple(size)} in a storage of {len(storage)}")
    if offset + sum(steps) >= len(storage) and 0 not in size:
        raise pickle.UnpicklingError(f"a tensor that ends beyond its storage of {len(storage)}")
    bytes_apart = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, bytes_apart).copy()


_ARRAY, _SCALAR = np.zeros(0).__reduce__()[0], np.float64(0).__reduce__()[0]
ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _ARRAY for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _SCALAR for core in ("core", "_core")},
    **{("builtins", kind.__name__): kind for kind in (bool, int, float, str, list, dict, tuple, set)},
    **{("torch", name): np.dtype(kind) for name, kind in TYPES.items()},
}
"""(module, name) -> what it stands for; nothing else is looked up."""
RECORDS = ("Data", "Batch", "GlobalStorage", "BaseStorage", "DataEdgeAttr", "DataTensorAttr")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "torch_geometric" and name in RECORDS:
            return Record
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        raise pickle.UnpicklingError(f"the pickle names {module}.{name}, which no data needs; it was not run")

    def persistent_load(self, key: Any) -> Any:
        """The type of the numbers of a storage, of ("storage", class, key, place, count, ...)."""
        return np.dtype(key[1])
