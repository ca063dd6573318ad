"""The operations megagnn brings its own kernels for, each beside its PyTorch reference."""

from megagnn.ops.segment import Segments, gather, segment_sum

__all__ = ["Segments", "backend", "gather", "segment_sum"]


def backend() -> str:
    """'compiled' where the extension is loaded, else 'reference'."""
    return "reference"
