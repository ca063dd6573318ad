"""Checkpoints of runs: sharded folders, single files, and what a resumed run needs."""
