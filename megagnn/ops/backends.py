"""Back ends of the aggregation: our own kernels, or another library's, chosen by configuration.

A back end has `segment_sum`, `segment_mean`, `segment_max` and `gather`, with the arguments of megagnn.ops,
for float32, float64 and bfloat16 on any device the library serves. Each can be differentiated any number of
times. They differ in speed, and in the sum of bfloat16 (`sums_bfloat16_in`): where a library adds in
bfloat16, a row of some hundred terms keeps two digits.

The maximum of a row without entries is zero. At a tie the derivative goes to one of the largest entries or is
shared among them, as the library has it: any of these is a subgradient.
"""

import importlib
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from megagnn.ops import reference
from megagnn.ops.dispatch import linear_function
from megagnn.ops.segment import Segments, gather, segment_max, segment_mean, segment_sum


class AggregationBackend:
    """Base of all: gather by `index_select`, mean from the sum, maximum by `scatter_reduce`.

    Raises ValueError, when made, if its library is not installed.
    """

    name = ""
    library: str | None = None
    """Module that must be importable, if any."""
    sums_bfloat16_in: torch.dtype = torch.float32

    def __init__(self) -> None:
        if self.library is not None:
            self._load(self.library)

    def _load(self, library: str) -> None:
        try:
            importlib.import_module(library)
        except (ImportError, OSError) as error:  # OSError: built for another release of torch
            raise ValueError(
                f"aggregation back end '{self.name}': {library} must be installed, got "
                f"{type(error).__name__} ({error}); run pip install --no-build-isolation {library}, or set "
                "model.aggregation_backend = 'own'"
            ) from error

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return aggregation_backend, (self.name,)  # a copy of a model shares it; libraries cannot be copied

    def gather(self, values: Tensor, segments: Segments) -> Tensor:
        """The row of each entry: values (N, ...) to (E, ...)."""
        return values.index_select(0, segments.index)

    def segment_sum(self, values: Tensor, segments: Segments) -> Tensor:
        """Sum over the entries of each row: values (E, ...) to (N, ...)."""
        raise NotImplementedError

    def segment_mean(self, values: Tensor, segments: Segments) -> Tensor:
        """Mean over the entries of each row, zero where there are none: values (E, ...) to (N, ...)."""
        counts_N = segments.ptr.diff().clamp(min=1).to(values.dtype)
        return self.segment_sum(values, segments) / counts_N.view(-1, *[1] * (values.dim() - 1))

    def segment_max(self, values: Tensor, segments: Segments) -> Tensor:
        """Maximum over the entries of each row, zero where there are none: values (E, ...) to (N, ...)."""
        out = values.new_zeros((segments.num_rows, *values.shape[1:]))
        index = segments.index.view(-1, *[1] * (values.dim() - 1)).expand_as(values)
        return out.scatter_reduce(0, index, values, "amax", include_self=False)


class OwnBackend(AggregationBackend):
    """The kernels of this package."""

    name = "own"
    gather = staticmethod(gather)
    segment_sum = staticmethod(segment_sum)
    segment_mean = staticmethod(segment_mean)
    segment_max = staticmethod(segment_max)


class TorchBackend(AggregationBackend):
    """Plain PyTorch: `index_add` and `scatter_reduce`, the reference that also runs without the extension."""

    name = "torch"

    def segment_sum(self, values: Tensor, segments: Segments) -> Tensor:
        return reference.segment_sum(values, segments.index, segments.num_rows)


class TorchScatterBackend(AggregationBackend):
    """torch_scatter's `scatter`; its `segment_csr` loses second derivatives, and is slower on a CPU."""

    name = library = "torch_scatter"

    def __init__(self) -> None:
        super().__init__()
        self._library: Any = importlib.import_module("torch_scatter")

    def segment_sum(self, values: Tensor, segments: Segments) -> Tensor:
        out: Tensor = self._library.scatter_sum(values, segments.index, 0, dim_size=segments.num_rows)
        return out

    def segment_max(self, values: Tensor, segments: Segments) -> Tensor:
        out: Tensor = self._library.scatter_max(values, segments.index, 0, dim_size=segments.num_rows)[0]
        return out


class TorchSparseBackend(AggregationBackend):
    """torch_sparse's product of a sparse matrix of ones, rows by entries, with the values.

    Its own backward is no differentiable function (a second derivative would silently be zero), so sum and
    gather enter autograd as each other's transpose. Adds bfloat16 in bfloat16.
    """

    name = library = "torch_sparse"
    sums_bfloat16_in = torch.bfloat16

    def gather(self, values: Tensor, segments: Segments) -> Tensor:
        out: Tensor = _SparseGather.apply(values, segments)
        return out

    def segment_sum(self, values: Tensor, segments: Segments) -> Tensor:
        out: Tensor = _SparseSum.apply(values, segments)
        return out

    def segment_max(self, values: Tensor, segments: Segments) -> Tensor:
        if values.numel() == 0:  # the library divides by the size
            return values.new_zeros((segments.num_rows, *values.shape[1:])) + values.sum()
        flat_EK, columns = _flat(values), _columns(segments)
        with torch.no_grad():
            arg_NK = torch.ops.torch_sparse.spmm_max(segments.ptr, columns, None, flat_EK)[1]
        empty_NK = arg_NK >= columns.numel()  # how the library marks a row without entries
        largest_NK = flat_EK.gather(0, columns[arg_NK.masked_fill(empty_NK, 0)])
        return largest_NK.masked_fill(empty_NK, 0).view(-1, *values.shape[1:])


def _sparse_sum(values: Tensor, segments: Segments) -> Tensor:
    if values.numel() == 0:  # the library divides by the size
        return values.new_zeros((segments.num_rows, *values.shape[1:]))
    out_NK: Tensor = torch.ops.torch_sparse.spmm_sum(
        None, segments.ptr, _columns(segments), None, None, None, _flat(values.detach())
    )
    return out_NK.view(-1, *values.shape[1:])


_SparseSum: Any = linear_function("_SparseSum", _sparse_sum, lambda: _SparseGather)
_SparseGather: Any = linear_function(
    "_SparseGather", lambda values, segments: values.index_select(0, segments.index), lambda: _SparseSum
)


def _columns(segments: Segments) -> Tensor:
    """Column indices of the sparse matrix: the entries of row after row."""
    if segments.perm is not None:
        return segments.perm
    return torch.arange(segments.num_entries, device=segments.index.device)


def _flat(values: Tensor) -> Tensor:
    """(E, ...) as the contiguous matrix (E, K) that the library takes."""
    return values.reshape(values.shape[0], math.prod(values.shape[1:])).contiguous()


BACKENDS: dict[str, type[AggregationBackend]] = {
    backend.name: backend for backend in (OwnBackend, TorchScatterBackend, TorchSparseBackend, TorchBackend)
}
OWN = OwnBackend()


@cache
def aggregation_backend(name: str) -> AggregationBackend:
    """The back end of a name, `model.aggregation_backend`.

    Raises ValueError for an unknown name, or if the library behind it is not installed.
    """
    if name == OWN.name:
        return OWN
    if name not in BACKENDS:
        raise ValueError(f"aggregation back end: must be one of {list(BACKENDS)}, got '{name}'")
    return BACKENDS[name]()
