"""Benchmarks: `harness` times, one file a topic; the work in `work`, peers in `peers`, memory in `memory`."""
