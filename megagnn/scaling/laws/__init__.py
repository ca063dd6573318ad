"""Scaling laws fitted to any table of runs."""
