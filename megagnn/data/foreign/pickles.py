"""Pickles of torch_geometric's `Data`, read without that library and without running anything they name.

Tensors are read without torch, too, whose import would cost a child process seconds. Nothing of NumPy is
lent to a pickle either: its types and arrays take a state, by which bytes of a file could become pointers.
"""

import collections
import io
import math
import pickle
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megagnn.data.foreign import RefusedError

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
KIND = re.compile(r"[biufSU]\d+")
"""NumPy's names of types of numbers and text."""


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


class Kind:
    """What a pickle says of a `numpy.dtype`: the name of a type of numbers or text, and its byte order."""

    __slots__ = ("name", "order")

    def __init__(self, name: Any, *_: Any) -> None:
        if type(name) is not str or not KIND.fullmatch(name):
            raise RefusedError(f"an array of type {str(name)[:20]}, which is neither numbers nor text")
        self.name = name
        self.order: Any = "="

    def __setstate__(self, state: Any) -> None:
        _, order, *more = state
        if order not in ("<", ">", "|", "=") or len(more) != 6 or more[:3] != [None] * 3:
            raise RefusedError("an array of fields, or of a type with more to it than its byte order")
        self.order = order


class Array:
    """What a pickle makes of a `numpy.ndarray`, whose numbers come after it."""

    __slots__ = ("values",)

    def __init__(self) -> None:
        self.values: Any = None

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, in_columns, content = state
        self.values = _array(content, kind, shape, "F" if in_columns else "C")


class Function:
    """A function that a pickle may call but, unlike a bare one, not give other attributes."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def __call__(self, *arguments: Any) -> Any:
        return self.call(*arguments)

    def __setstate__(self, _: Any) -> None:
        raise RefusedError("the pickle changes a function, which no data needs")


def load(content: bytes) -> Any:
    """The object of a pickle: records, numbers, text, and arrays in place of tensors.

    Raises:
        RefusedError: it names anything but the classes of data, or an array of it holds neither numbers nor
            text, or does not fit its bytes.
        Exception: whatever a damaged pickle leads to.
    """
    found = _Unpickler(io.BytesIO(content)).load()
    if isinstance(found, dict):
        return {key: _values(value) for key, value in found.items()}
    return _values(found)


def _values(value: Any) -> Any:
    return value.values if isinstance(value, Array) else value


def _array(content: Any, kind: Any, shape: Any, order: Any) -> Any:
    """An array of the bytes of its numbers, copied if they are of a kind that the pickle can change."""
    if type(kind) is not Kind or type(content) not in (bytes, bytearray):
        raise RefusedError("an array that is not of a type and bytes")
    dtype = np.dtype(kind.name).newbyteorder(kind.order)
    return np.frombuffer(bytes(content), dtype).reshape(shape, order=order)


def _storage(content: bytes) -> Any:
    """The numbers of a storage, (n,): pickles of a magic number, a version, the machine, what is stored and
    its keys; then their count, int64, and the numbers."""
    file = io.BytesIO(content)
    magic, _, _, kind, keys = (_Unpickler(file).load() for _ in range(5))
    if magic != MAGIC or len(keys) != 1:
        raise RefusedError("a tensor in another format than torch.save's of before 1.6")
    if type(kind) is not str or kind not in TYPES.values():
        raise RefusedError(f"a tensor of {str(kind)[:20]}, which is no type of numbers")
    count = int(np.frombuffer(file.read(8), "<i8")[0])
    numbers = np.frombuffer(file.read(), kind)
    if not 0 <= count <= len(numbers):
        raise RefusedError(f"a tensor of {count} numbers, of which {len(numbers)} are there")
    return numbers[:count]


def _tensor(storage: Any, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any) -> Any:
    """The array of a tensor: numbers of its storage, picked by NumPy's own indexing, which checks bounds."""
    if type(storage) is not np.ndarray or storage.ndim != 1:
        raise RefusedError("a tensor without a storage")
    if any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
        raise RefusedError(f"a tensor of offset {offset}, shape {size} and strides {stride}")
    if math.prod(size) > len(storage):
        raise RefusedError(f"a tensor of shape {tuple(size)} in a storage of {len(storage)}")
    if 0 in size:
        return np.zeros(size, storage.dtype)
    if offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) >= len(storage):
        raise RefusedError(f"a tensor that ends beyond its storage of {len(storage)}")
    index = np.array(offset)
    for n, step in zip(size, stride, strict=True):
        index = index[..., None] + np.arange(n) * (step if n > 1 else 0)
    return storage[index]


def _scalar(kind: Any, content: Any) -> Any:
    return _array(content, kind, (), "C")[()]


ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): Function(_tensor),
    ("torch.storage", "_load_from_bytes"): Function(_storage),
    ("numpy", "dtype"): Function(Kind),
    ("numpy", "ndarray"): "numpy.ndarray",
    **{
        (f"numpy.{core}.multiarray", "_reconstruct"): Function(lambda *_: Array())
        for core in ("core", "_core")
    },
    **{(f"numpy.{core}.multiarray", "scalar"): Function(_scalar) for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): Function(_array) for core in ("core", "_core")},
    **{("builtins", kind.__name__): kind for kind in (bool, int, float, str, list, dict, tuple, set)},
    **{("torch", name): kind for name, kind in TYPES.items()},
}
"""(module, name) -> what it stands for; nothing else is looked up."""
RECORDS = ("Data", "Batch", "GlobalStorage", "BaseStorage", "DataEdgeAttr", "DataTensorAttr")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "torch_geometric" and name in RECORDS:
            return Record
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        raise RefusedError(f"the pickle names {module}.{name}, which no data needs; it was not run")

    def persistent_load(self, key: Any) -> Any:
        """The type of the numbers of a storage, of ("storage", class, key, place, count, ...)."""
        return key[1]
