"""Registers, memory and spills of every CUDA kernel, as ptxas tells them; fails where a kernel spills.

python tools/cuda_report.py                   builds the library, loads it, prints the table
python tools/cuda_report.py --write           and writes it to docs/results/cuda-kernels.md
python tools/cuda_report.py csrc/cuda/x.cu    only compiles the sources named, and prints their table

Needs nvcc and no GPU. The library is built as `pip install` would, with MEGAGNN_CUDA=1, and thrown away.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results" / "cuda-kernels.md"
ARCHS = ("80", "90", "100")
INTRODUCTION = """\
# What the CUDA kernels use

    python tools/cuda_report.py --write

Generated from what ptxas of nvcc {version} reports; the test command fails where a kernel spills registers.
Registers are per thread. Static shared memory of a block, stack of a thread and spilled bytes (stores and
loads) are the most of any architecture.

"""
LOAD = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("megagnn._C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
index, ptr = torch.tensor([0, 0]), torch.tensor([0, 2])
assert module.cuda_archs and torch.ops.megagnn.gather(torch.ones(1), index, ptr, None).sum() == 2
print(f"   CUDA kernels for {module.cuda_archs}, loaded by torch {torch.__version__}")
"""


class ReportError(Exception):
    """Why there is no report."""


@dataclass(frozen=True)
class Kernel:
    """What a kernel, or a device function that was not inlined, uses on one architecture; sizes in bytes."""

    source: str
    name: str
    arch: str
    registers: int
    shared: int  # static
    stack: int
    spills: int  # stores and loads


def find_nvcc() -> str:
    """nvcc as setup.py finds it: NVCC, then CUDA_HOME, then PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    for candidate in (os.environ.get("NVCC"), f"{home}/bin/nvcc", "nvcc"):
        if candidate and shutil.which(candidate):
            return candidate
    raise ReportError("nvcc was found neither through NVCC or CUDA_HOME nor on PATH")


def demangle(names: list[str]) -> dict[str, str]:
    """Names as in the sources, by mangled name; unchanged where there is no c++filt."""
    tool = shutil.which("c++filt")
    if not tool or not names:
        return {name: name for name in names}
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, done.stdout.splitlines(), strict=True))


def short(name: str) -> str:
    """`segment_sum_kernel<bf16, 8>` of `void megagnn::cuda::segment_sum_kernel<__nv_bfloat16, 8>(...)`."""
    name = name.replace("(anonymous namespace)::", "")
    depth = 0
    for i, character in enumerate(name):  # up to the arguments; those of templates may have brackets, too
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            name = name[:i]
            break
    template = name.find("<")
    head, arguments = (name, "") if template < 0 else (name[:template], name[template:])
    head = head.rpartition(" ")[2].rpartition("::")[2]
    arguments = re.sub(r"\((?:int|bool|unsigned int)\)|\b(?:\w+::)+", "", arguments)
    return head + arguments.replace("__nv_bfloat16", "bf16").replace("> >", ">>")


def parse(source: str, log: str) -> list[Kernel]:
    """Every kernel in what nvcc -Xptxas=-v printed for one source."""
    blocks = re.findall(
        r"Function properties for (\w+)\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads(?:\nptxas info\s*: Used (\d+) registers([^\n]*))?|for '(sm_\w+)'",
        log,
    )
    names = demangle(list(dict.fromkeys(name for name, *_ in blocks if name)))
    kernels, arch = [], ""
    for name, stack, stores, loads, registers, rest, compiled_for in blocks:
        if compiled_for:
            arch = compiled_for
            continue
        shared = re.search(r"(\d+) bytes smem", rest)
        kernels.append(
            Kernel(
                source=source,
                name=short(names[name]),
                arch=arch,
                registers=int(registers or 0),
                shared=int(shared[1]) if shared else 0,
                stack=int(stack),
                spills=int(stores) + int(loads),
            )
        )
    return kernels


def run(command: list[str], **options: object) -> str:
    """Runs a command; returns what it printed on stderr, or raises with it."""
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, **options)  # type: ignore[call-overload]
    if done.returncode != 0:
        raise ReportError(f"{command[0]} failed:\n{done.stderr}")
    return done.stderr


def compile_sources(sources: list[Path], folder: Path) -> list[Kernel]:
    """Compiles sources for every architecture, in one run of nvcc each."""
    nvcc = find_nvcc()
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    flags = ["-std=c++17", "-O3", "-Xptxas=-v", f"-I{ROOT / 'csrc'}", *codes]

    def compile_one(source: Path) -> list[Kernel]:
        target = folder / f"{source.stem}.o"
        log = run([nvcc, *flags, "-c", str(source.resolve()), "-o", str(target)])
        return parse(source.name, log)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [kernel for kernels in pool.map(compile_one, sources) for kernel in kernels]


def build_library(folder: Path) -> list[Kernel]:
    """Builds the library with every kernel and lets the torch that is here load it."""
    environment = {**os.environ, "MEGAGNN_CUDA": "1", "MEGAGNN_CUDA_ARCHS": ";".join(ARCHS)}
    temp, lib = folder / "temp", folder / "lib"
    build = [
        sys.executable,
        "setup.py",
        "--quiet",
        "build_ext",
        "--build-temp",
        str(temp),
        "--build-lib",
        str(lib),
    ]
    run(build, env=environment)
    (library,) = lib.glob("megagnn/_C.*.so")
    run([sys.executable, "-c", LOAD, str(library)])
    logs = sorted(temp.rglob("cuda-*.log"))
    return [
        kernel for log in logs for kernel in parse(log.stem.removeprefix("cuda-") + ".cu", log.read_text())
    ]


def table(kernels: list[Kernel]) -> str:
    """One row per kernel: registers on each architecture, and the most of anything else on any."""
    archs = sorted({kernel.arch for kernel in kernels}, key=lambda arch: int(re.sub(r"\D", "", arch)))
    rows: dict[tuple[str, str], dict[str, Kernel]] = {}
    for kernel in kernels:
        rows.setdefault((kernel.source, kernel.name), {})[kernel.arch] = kernel
    heads = ["source", "kernel", *(f"registers {arch}" for arch in archs), "shared", "stack", "spills"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for (source, name), by_arch in sorted(rows.items()):
        registers = [str(by_arch[arch].registers) if arch in by_arch else "-" for arch in archs]
        most = [max(getattr(k, what) for k in by_arch.values()) for what in ("shared", "stack", "spills")]
        lines.append("| " + " | ".join([source, f"`{name}`", *registers, *map(str, most)]) + " |")
    return "\n".join(lines) + "\n"


def page(kernels: list[Kernel]) -> str:
    """The document."""
    release = subprocess.run([find_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"release [\d.]+, V([\d.]+)", release)
    return INTRODUCTION.format(version=version[1] if version else "?") + table(kernels)


def main() -> int:
    """0, or 1 where a kernel spills or nothing could be compiled."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "sources", nargs="*", type=Path, help="only these sources, without building the library"
    )
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    arguments = parser.parse_args()
    if arguments.write and arguments.sources:
        parser.error("--write is for the report on all sources")
    try:
        with tempfile.TemporaryDirectory() as folder:
            if arguments.sources:
                kernels = compile_sources(arguments.sources, Path(folder))
            else:
                kernels = build_library(Path(folder))
        if not kernels:
            raise ReportError("ptxas reported no kernel")
    except ReportError as error:
        print(f"cuda_report: {error}", file=sys.stderr)
        return 1
    print(table(kernels))
    if arguments.write:
        PAGE.write_text(page(kernels))
    elif not arguments.sources and (not PAGE.exists() or PAGE.read_text() != page(kernels)):
        print(f"{PAGE.relative_to(ROOT)} is of other sources or another nvcc: run with --write")
    spilled = [kernel for kernel in kernels if kernel.spills]
    for kernel in spilled:
        print(f"SPILLS: {kernel.name} ({kernel.source}) on {kernel.arch}: {kernel.spills} bytes")
    print(f"{len({(k.source, k.name) for k in kernels})} kernels, {len(spilled)} spills")
    return 1 if spilled else 0


if __name__ == "__main__":
    raise SystemExit(main())
