"""Other programs trained on the same frames for the same processor time: examples/compare_peers.sh."""
