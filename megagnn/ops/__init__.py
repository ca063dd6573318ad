"""The operations megagnn brings its own kernels for, each beside its PyTorch reference.

Importing this without the compiled extension warns once; everything then runs on the reference.
"""

from megagnn.ops import extension
from megagnn.ops.adamw import adamw_, square_sum
from megagnn.ops.edge_message import EdgeGraph, EdgeSpec, EdgeWeights, edge_message, edge_message_pair
from megagnn.ops.extension import backend, build_info
from megagnn.ops.segment import Segments, gather, segment_sum

__all__ = [
    "EdgeGraph",
    "EdgeSpec",
    "EdgeWeights",
    "Segments",
    "adamw_",
    "backend",
    "build_info",
    "edge_message",
    "edge_message_pair",
    "gather",
    "segment_sum",
    "square_sum",
]

if extension.module is None:
    extension.warn_reference("any device")
