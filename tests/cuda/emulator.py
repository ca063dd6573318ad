"""Builds CUDA sources for the processor, through emulation/emulation.h, and calls their launchers."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
CUDA = ROOT / "csrc" / "cuda"
CONTROL = Path(__file__).parent / "control.cpp"
EMULATION = Path(__file__).parent / "emulation"
# -fno-gnu-unique: each library has an emulation of its own. Without contraction, as the CPU kernels.
FLAGS = [
    *("-std=c++17", "-O1", "-g", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *("-ffp-contract=off", "-fno-gnu-unique", f"-I{CUDA.parent}", f"-I{EMULATION}"),
]
SANITIZE = ["-fsanitize=address,bounds,alignment", "-fno-sanitize-recover=bounds,alignment"]
VARIANTS = {
    "plain": [],
    "sanitized": SANITIZE,
    "races": ["-fsanitize=thread"],
    "ucontext": ["-DMEGAGNN_EMULATION_UCONTEXT"],
}
# On its many kernels the compiler takes a third of the time without optimisation.
UNOPTIMISED = {("sanitized", "cartesian_edge")}

ORDERS = ("forward", "reverse", "random")
SCALARS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
CTYPES = {
    "int": ctypes.c_int,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}


class LaunchError(RuntimeError):
    """What megagnn_cuda_error_string says of a launcher that does not return 0."""


def find_compiler() -> list[str] | None:
    """The compiler of the emulation, g++ where CXX names no other; None where there is none for it."""
    command = shlex.split(os.environ.get("CXX") or "g++")
    return command if sys.platform == "linux" and shutil.which(command[0]) else None


def preloaded(variant: str) -> dict[str, str]:
    """Environment in which a Python process can load a library of the variant sanitized, or races."""
    name = {"sanitized": "asan", "races": "tsan"}[variant]
    compiler = find_compiler()
    assert compiler

    def path(library: str) -> str:
        command = [*compiler, f"-print-file-name={library}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    # The second, which else comes with torch, so that the first finds where exceptions are thrown.
    libraries = f"{path(f'lib{name}.so')}:{path('libstdc++.so')}"
    options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1:history_size=4"}
    return {**os.environ, "LD_PRELOAD": libraries, **options}


def digest(command: list[str], source: Path) -> str:
    """Changes whenever the object would."""
    done = hashlib.sha256(repr(command).encode())
    done.update(subprocess.run([command[0], "--version"], capture_output=True).stdout)
    headers = (*CUDA.parent.glob("*.h"), *CUDA.rglob("*"), *EMULATION.rglob("*"))
    for path in [source, *sorted(path for path in headers if path.suffix in (".h", ".cuh"))]:
        done.update(path.read_bytes())
    return done.hexdigest()[:16]


def make(command: list[str], target: Path) -> Path:
    """Runs a compiler where its target is not there yet; an earlier version of the target goes."""
    if target.exists():
        return target
    for old in target.parent.glob(f"{target.name.rpartition('-')[0]}-*{target.suffix}"):
        old.unlink(missing_ok=True)
    unfinished = target.with_suffix(f".{os.getpid()}")
    done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr}")
    unfinished.replace(target)
    return target


def build(name: str, sources: list[Path], folder: Path, variant: str = "plain") -> Path:
    """The shared library of the sources, made in the folder unless it is there already."""
    compiler = find_compiler()
    assert compiler
    jobs = []
    for source in [CONTROL, *sources]:
        # From the root, so that messages name files as csrc/cuda/...
        flags = [*FLAGS, *VARIANTS[variant], *(["-O0"] if (variant, source.stem) in UNOPTIMISED else [])]
        command = [*compiler, *flags, "-x", "c++", "-c", os.path.relpath(source, ROOT)]
        jobs.append((command, folder / f"{variant}-{source.stem}-{digest(command, source)}.o"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(path) for path in pool.map(lambda job: make(*job), jobs)]
    contents = hashlib.sha256(repr(objects).encode()).hexdigest()[:16]
    command = [*compiler, "-shared", "-Wl,-Bsymbolic", *VARIANTS[variant], *objects]
    return make(command, folder / f"{variant}-lib{name}-{contents}.so")


def prototypes() -> dict[str, list[str]]:
    """Types of the arguments of each launcher that a header in csrc/cuda declares."""
    found = {}
    for header in sorted(CUDA.glob("*.h")):
        for name, arguments in re.findall(
            r"^int (megagnn_cuda_\w+)\(([^)]*)\);", header.read_text(), re.MULTILINE
        ):
            found[name] = [argument.strip().rpartition(" ")[0] for argument in arguments.split(",")]
    return found


class Emulator:
    """The launchers of a library."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.megagnn_emulation_set_order.argtypes = [ctypes.c_int, ctypes.c_uint64]
        for name, types in prototypes().items():
            if hasattr(self.library, name):
                argtypes = [ctypes.c_void_p if kind.endswith("*") else CTYPES[kind] for kind in types]
                getattr(self.library, name).argtypes = argtypes

    @contextmanager
    def order(self, order: str, seed: int = 0) -> Iterator[None]:
        """The order in which threads and blocks run while the context lasts: one of ORDERS."""
        self.library.megagnn_emulation_set_order(ORDERS.index(order), seed)
        yield
        self.library.megagnn_emulation_set_order(0, 0)

    def __call__(self, name: str, *arguments: torch.Tensor | float | None) -> None:
        """Calls a launcher. Tensors, contiguous, go as pointers, None as null, a missing stream likewise.

        Raises LaunchError with the emulation's message.
        """
        launcher = getattr(self.library, name)
        values: list[object] = []
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                assert argument.is_contiguous()
                values.append(ctypes.c_void_p(argument.data_ptr()))
            else:
                values.append(argument)
        stream = [None] * (len(launcher.argtypes or values) - len(values))
        error = launcher(*values, *stream)
        if error:
            text = self.library.megagnn_cuda_error_string
            text.restype = ctypes.c_char_p
            raise LaunchError(f"error {error}: {text(error).decode()}")


class Guarded:
    """A tensor inside a larger buffer, whose other elements a kernel must leave alone.

    Its first element lies `offset` elements beyond an address that is a multiple of 64 bytes.
    """

    MARGIN = 64

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0) -> None:
        size = torch.Size(shape).numel()
        self.buffer = torch.full((2 * self.MARGIN + size,), -7.0, dtype=dtype)
        self.inside = slice(self.MARGIN + offset, self.MARGIN + offset + size)
        self.buffer[self.inside] = float("nan")  # what a kernel does not write shows
        self.tensor = self.buffer[self.inside].view(shape)

    def check(self) -> torch.Tensor:
        """The tensor, after the elements around it were found as they were."""
        outside = torch.ones(self.buffer.numel(), dtype=torch.bool)
        outside[self.inside] = False
        assert (self.buffer[outside] == -7).all(), "written outside the tensor"
        return self.tensor


def at_offset(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """A copy whose first element lies offset elements beyond a multiple of 64 bytes."""
    buffer = tensor.new_empty(tensor.numel() + offset)
    return buffer[offset:].view(tensor.shape).copy_(tensor)
