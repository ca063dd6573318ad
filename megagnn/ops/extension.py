"""Loads the compiled operations, or remembers why they are not there."""

import importlib
import os
import sys
import warnings
from functools import cache
from pathlib import Path
from types import FrameType, ModuleType

import torch  # noqa: F401  (its libraries must be loaded before the extension that links to them)

_NOTE = Path(__file__).with_name("build_note.txt")
_PACKAGE = Path(__file__).parents[1]


def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("megagnn._C"), ""
    except ImportError as error:
        if _NOTE.exists():
            return None, _NOTE.read_text().strip()
        return None, f"megagnn._C could not be loaded ({error})."


module, why_not = _load()

# Where there are kernels of our own; tensors elsewhere take the reference.
has_cpu = module is not None
has_cuda = module is not None and bool(module.cuda_archs)


def _user_frame() -> FrameType:
    """The innermost frame that is neither in this package nor in what imports or runs modules."""
    package, frame = str(_PACKAGE) + os.sep, sys._getframe(1)
    while frame.f_back and (
        frame.f_code.co_filename.startswith(package) or "importlib" in frame.f_code.co_filename
    ):
        frame = frame.f_back
    return frame


@cache
def warn_reference(device: str) -> None:
    """Says, once per device type and on the first rank alone, that the PyTorch reference runs, and why."""
    if os.environ.get("RANK", "0") != "0":
        return
    reason = why_not or "They are built where torch and nvcc support the device; see setup.py."
    frame = _user_frame()
    warnings.warn_explicit(
        f"megagnn.ops: no compiled kernels for {device}, the slower PyTorch reference runs. {reason}",
        RuntimeWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
    )


def backend() -> str:
    """'compiled' where the extension is loaded, else 'reference'."""
    return "reference" if module is None else "compiled"


def build_info() -> dict[str, str]:
    """How the extension was built, and the SIMD level in use; empty without the extension."""
    if module is None:
        return {}
    names = ("version", "compiler", "flags", "torch_version", "cuda_archs")
    return {**{name: getattr(module, name) for name in names}, "simd": module.simd_level()}
