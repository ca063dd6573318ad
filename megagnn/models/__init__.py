"""Potentials: a model of some family, and the forces and stress that are made of its energy."""
