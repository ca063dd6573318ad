"""Cartesian tensors up to l = 2 on atoms, edges channel by channel (docs/model.md)."""
