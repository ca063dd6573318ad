"""Tools of this repository; benchmarks run as `python -m tools.bench.NAME` from its root."""
