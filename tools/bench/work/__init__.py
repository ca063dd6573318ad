"""The work that the benchmarks share: batches, models and their peers."""
