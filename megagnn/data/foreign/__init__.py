"""Files that need a foreign C library, read in a child process; the modules here import little.

A reader yields a description of the file, then an item for each structure: a dictionary, or a string that
says why that one cannot be read. `megagnn/data/formats/published.py` has the keys of these dictionaries.
"""


class RefusedError(ValueError):
    """What a reader itself refuses of a file; any other error comes of a damaged file, or of a library."""
