"""The operations megagnn brings its own kernels for, each beside its PyTorch reference.

Importing this without the compiled extension warns once; everything then runs on the reference.
"""

from megagnn.ops import extension
from megagnn.ops.adamw import adamw_
from megagnn.ops.extension import backend, build_info
from megagnn.ops.segment import Segments, gather, segment_sum

__all__ = ["Segments", "adamw_", "backend", "build_info", "gather", "segment_sum"]

if extension.module is None:
    extension.warn_reference("any device")
