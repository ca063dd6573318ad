"""Structures labelled by real engines: molecules (GFN-xTB) and metal slabs (EMT), made by `megagnn label`."""
