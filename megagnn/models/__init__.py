"""The EGNN, its heads and its forces; no module here knows of ranks."""
