"""Layers over tensor-parallel ranks; two plans divide the edge operation (docs/tensor-parallel.md)."""
