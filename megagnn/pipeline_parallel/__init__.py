"""Layers split over ranks. Nothing is here yet."""
