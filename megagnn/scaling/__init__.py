"""Sweeps of runs, laws fitted to them, and reports."""
