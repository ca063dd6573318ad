"""PaiNN: scalars and vectors on atoms, edges channel by channel (docs/model.md)."""
