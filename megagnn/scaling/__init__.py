"""Sweeps, laws and reports. Nothing is here yet."""
