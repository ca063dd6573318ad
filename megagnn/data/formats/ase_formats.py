"""Which of ASE's formats a file has: by the user's word, its name, its content."""

from __future__ import annotations

import difflib
from pathlib import Path

from ase.io.formats import UnknownFileTypeError, filetype, ioformats, open_with_compression

from megagnn.data.formats.options import UnreadableError, cannot_read

SIGNATURES = {
    "aims-output": ("FHI-aims", "Self-consistency cycle converged", "| Number of spin channels"),
    "espresso-out": ("Program PWSCF",),
    "orca-output": ("O   R   C   A",),
    "gaussian-out": ("Entering Gaussian System",),
    "abinit-out": ("of ABINIT",),
    "nwchem-out": ("Northwest Computational Chemistry",),
    "gamess-us-out": ("GAMESS",),
    "gpaw-out": ("___ ___ ___ _ _ _",),
    "vasp-out": ("FREE ENERGIE OF THE ION-ELECTRON SYSTEM",),
    "vasp-xml": ("<modeling>",),
    "castep-castep": ("CASTEP version",),
    "lammps-dump-text": ("ITEM: TIMESTEP",),
    "lammps-data": ("xlo xhi",),
    "onetep-out": ("Linear-Scaling Ab Initio Total Energy Program",),
}
"""ASE's formats by words their files hold somewhere near the beginning, for messages."""
HEAD = 1 << 20


def ase_format(path: Path, given: str | None) -> str:
    """ASE's name of the format of a file.

    Where ASE knows neither name nor content, a first line that is a number means extended XYZ.

    Raises:
        ValueError: a name given that ASE does not know or cannot read.
        UnreadableError: a file of no known format, naming candidates.
    """
    if given is not None:
        if given not in ioformats or not ioformats[given].can_read:
            readable = [name for name, form in ioformats.items() if form.can_read and name != given]
            near = difflib.get_close_matches(given, readable, n=3) or ["extxyz", "vasp-out", "aims-output"]
            raise ValueError(
                f"--ase-format: ASE reads no format {given!r}; near are {', '.join(near)}, all are listed by "
                "`ase info --formats`"
            )
        return given
    try:
        name = filetype(str(path))
    except UnknownFileTypeError as error:
        if "Empty file" in str(error):
            raise UnreadableError(f"cannot read {path}, frame 0: the file is empty") from error
        name = ""
    except (OSError, EOFError) as error:
        raise cannot_read(path, 0, error) from error
    if name in ioformats:
        return name
    if _head(path).split("\n")[0].strip().isdigit():
        return "extxyz"
    raise UnreadableError(
        f"cannot read {path}, frame 0: ASE knows no such file by its name or content; name its format with "
        f"--ase-format{_candidates(path, name)}"
    )


def nothing_found(path: Path, name: str) -> UnreadableError:
    """The error of a file in which ASE's reader found no structure."""
    return UnreadableError(
        f"{path}: no structure found, read as ASE's format {name}; if the file is of another program, name "
        f"its format with --ase-format{_candidates(path, name)}"
    )


def _candidates(path: Path, but: str) -> str:
    """Formats whose words the file holds, in words."""
    head = _head(path)
    found = [
        name for name, words in SIGNATURES.items() if name != but and any(word in head for word in words)
    ]
    return f" (by its content perhaps {' or '.join(found)})" if found else " (as in --ase-format aims-output)"


def _head(path: Path) -> str:
    if path.is_dir():
        return ""
    try:
        with open_with_compression(str(path), "rb") as file:
            return bytes(file.read(HEAD)).decode("utf-8", errors="replace")
    except (OSError, EOFError):
        return ""
