"""The EGNN as others would write it, the same function as megagnn's: what benchmarks compare with."""
