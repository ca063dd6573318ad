"""megagnn: equivariant graph neural networks for atoms, from a laptop to many ranks, and scaling laws."""

__version__ = "0.1.0"
