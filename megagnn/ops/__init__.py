"""The operations megagnn brings its own kernels for, each beside its PyTorch reference.

Importing this without the compiled extension warns once; everything then runs on the reference.
"""

from megagnn.ops import extension
from megagnn.ops.adamw import adamw_, square_sum
from megagnn.ops.extension import backend, build_info
from megagnn.ops.scatter import gather_rows, scatter_add
from megagnn.ops.segment import Segments, gather, segment_max, segment_mean, segment_sum
from megagnn.ops.weighted import gather_weighted_sum

__all__ = [
    "Segments",
    "adamw_",
    "backend",
    "build_info",
    "gather",
    "gather_rows",
    "gather_weighted_sum",
    "scatter_add",
    "segment_max",
    "segment_mean",
    "segment_sum",
    "square_sum",
]

if extension.module is None:
    extension.warn_reference("any device")
