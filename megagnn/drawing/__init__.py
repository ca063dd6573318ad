"""Figures with captions, and pages of them in one file."""
