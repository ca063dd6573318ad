"""Builds the extension megagnn._C from csrc/ against the installed torch; metadata are in pyproject.toml.

Environment: MEGAGNN_BUILD_OPS=0 leaves the extension out. MEGAGNN_CUDA=1 or 0 builds the CUDA kernels or not,
whatever torch was built for; with 1 a failure is an error (default: where torch has CUDA and nvcc is found).
MEGAGNN_CUDA_ARCHS="80;90" gives the GPU architectures. CXX, NVCC and CUDA_HOME name the compilers.

Where the extension cannot be built, the install goes through, says so in one sentence, and leaves it in
megagnn/ops/build_note.txt, which the warning at run time repeats: pip hides what a build prints. An isolated
build, which sees no torch, keeps the library of an earlier editable install if it is newer than its sources.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
NOTE = Path("ops") / "build_note.txt"
# Oldest release whose stable ABI the sources use (parallel_for); the library then runs on later ones as well.
TORCH_TARGET = (2, 10)
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# Products and sums round one by one, so that every SIMD level makes the same bits; square roots set no errno,
# so that they can be vectors.
FLAGS += ["-ffp-contract=off", "-fno-math-errno"]
SIMD_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}
# Kernels whose bits may differ between processors, as those of the matrix products beside them do.
CONTRACTED = ("edge_message.cpp", "activation.cpp", "node.cpp", "cartesian_edge.cpp", "cartesian_atoms.cpp")
CUDA_ARCHS = ("80", "90", "100")


class CannotBuildError(Exception):
    """Why the extension is left out, as the end of a sentence."""


class TorchNotSeenError(CannotBuildError):
    """torch is not installed where the build runs, which says nothing about where the package will run."""


def version() -> str:
    """The version in megagnn/__init__.py."""
    found = re.search(r'__version__ = "([^"]+)"', (ROOT / "megagnn" / "__init__.py").read_text())
    assert found
    return found[1]


def run(command: list[str]) -> str:
    """Runs a compiler; its messages, returned, are shown only where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise CannotBuildError(f"{command[0]} could not be run ({error.strerror})") from error
    if done.returncode != 0:
        print(shlex.join(command), done.stdout, done.stderr, sep="\n", file=sys.stderr)
        first = next(
            (line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200]
        )
        raise CannotBuildError(f"{command[0]} failed: {first}")
    return done.stderr


def compile_object(job: tuple[list[str], Path]) -> None:
    """Runs a compile command and keeps its messages beside the object: tools/cuda_report.py reads nvcc's."""
    command, target = job
    target.with_suffix(".log").write_text(run(command))


def find_compiler() -> list[str]:
    """The C++ compiler: CXX, else the one Python was built with, else g++, clang++ or c++."""
    if os.environ.get("CXX"):
        candidates = [os.environ["CXX"]]
    else:
        candidates = [sysconfig.get_config_var("CXX") or "g++", "g++", "clang++", "c++"]
    for candidate in candidates:
        command = shlex.split(candidate)
        if command and shutil.which(command[0]):
            return command
    raise CannotBuildError(f"no C++ compiler was found (looked for {', '.join(dict.fromkeys(candidates))})")


def find_nvcc() -> str | None:
    """nvcc: NVCC alone where that is set, else from CUDA_HOME, CUDA_PATH, PATH or its usual place."""
    if os.environ.get("NVCC"):
        return shutil.which(os.environ["NVCC"])
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [*(f"{home}/bin/nvcc" for home in homes if home), "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((path for path in map(shutil.which, candidates) if path), None)


def cuda_archs(nvcc: str) -> list[str]:
    """Architectures to build for: as asked, else those of CUDA_ARCHS that this nvcc knows."""
    if os.environ.get("MEGAGNN_CUDA_ARCHS"):
        return re.findall(r"\d+[a-f]?", os.environ["MEGAGNN_CUDA_ARCHS"])
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    return [arch for arch in CUDA_ARCHS if f"compute_{arch}" in known] or [CUDA_ARCHS[0]]


def cuda_asked() -> str:
    """MEGAGNN_CUDA: 0, 1 or auto."""
    asked = os.environ.get("MEGAGNN_CUDA") or "auto"
    if asked not in ("0", "1", "auto"):
        raise SystemExit(f"MEGAGNN_CUDA must be 0, 1 or auto, got {asked}")
    return asked


def wanted_nvcc(torch_cuda: str | None) -> str | None:
    """nvcc where the CUDA kernels are to be built, else None."""
    asked = cuda_asked()
    if asked == "0" or (asked == "auto" and torch_cuda is None):
        return None
    nvcc = find_nvcc()
    if nvcc is None and asked == "1":
        raise CannotBuildError("nvcc was found neither through NVCC or CUDA_HOME nor on PATH")
    if nvcc is None:
        print("megagnn: torch has CUDA but nvcc was not found, so only the CPU kernels are built", flush=True)
    fault = nvcc and torch_cuda and release_fault(nvcc, torch_cuda)
    if fault and asked == "1":
        raise CannotBuildError(fault)
    if fault:
        print(f"megagnn: {fault}; only the CPU kernels are built", flush=True)
        return None
    return nvcc


def release_fault(nvcc: str, torch_cuda: str) -> str | None:
    """What is wrong where nvcc and torch are of different major releases: their objects do not fit."""
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", told)
    if found is None or found[1] == torch_cuda.partition(".")[0]:
        return None
    return (
        f"torch was built for CUDA {torch_cuda}, and {nvcc} is of CUDA {found[1]}.{found[2]}: set NVCC or "
        f"CUDA_HOME to a CUDA {torch_cuda.partition('.')[0]}, or MEGAGNN_CUDA=0"
    )


class Build:
    """One build of the extension: the flags, the compile commands, the link."""

    def __init__(self, folder: Path) -> None:
        try:
            import pybind11
            import torch
        except ImportError as error:
            kind = TorchNotSeenError if error.name == "torch" else CannotBuildError
            raise kind(
                f"{error.name} is not installed where the build runs (use --no-build-isolation)"
            ) from error
        if tuple(int(x) for x in torch.__version__.split(".")[:2]) < TORCH_TARGET:
            raise CannotBuildError(
                f"torch is {torch.__version__}, and the sources need {TORCH_TARGET[0]}.{TORCH_TARGET[1]}"
            )
        self.folder = folder
        self.cxx = find_compiler()
        self.nvcc = wanted_nvcc(torch.version.cuda)
        self.archs = cuda_archs(self.nvcc) if self.nvcc else []
        self.simd = SIMD_FLAGS if platform.machine().lower() in ("x86_64", "amd64") else {"baseline": []}
        torch_root = Path(torch.__file__).parent
        self.torch_lib = torch_root / "lib"
        self.torch_version = torch.__version__
        includes = [CSRC, torch_root / "include", pybind11.get_include(), sysconfig.get_paths()["include"]]
        major, minor = TORCH_TARGET
        self.common = [f"-I{path}" for path in includes] + [
            f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000"
        ]
        self.common += ["-DMEGAGNN_X86"] if "avx2" in self.simd else []
        self.common += ["-DMEGAGNN_WITH_CUDA"] if self.nvcc else []

    def describe(self) -> list[str]:
        """Macros that tell megagnn._C how it was built."""
        compiler = subprocess.run(
            [*self.cxx, "--version"], capture_output=True, text=True
        ).stdout.splitlines()
        facts = {
            "VERSION": version(),
            "COMPILER": compiler[0] if compiler else self.cxx[0],
            "FLAGS": " ".join(FLAGS),
            "TORCH_VERSION": self.torch_version,
            "CUDA_ARCHS": ";".join(self.archs),
        }
        return [f'-DMEGAGNN_{name}="{value}"' for name, value in facts.items()]

    def jobs(self) -> list[tuple[list[str], Path]]:
        """Compile commands and the objects they make."""
        jobs = []

        def add(source: Path, name: str, flags: list[str]) -> None:
            target = self.folder / f"{name}.o"
            jobs.append(
                ([*self.cxx, *FLAGS, *self.common, *flags, "-c", str(source), "-o", str(target)], target)
            )

        add(CSRC / "module.cpp", "module", self.describe())
        add(CSRC / "cpu" / "simd.cpp", "cpu-simd", [])
        for source in sorted(CSRC.glob("*.cpp")):
            if source.name != "module.cpp":
                add(source, source.stem, [])
        for source in sorted((CSRC / "cpu").glob("*.cpp")):
            for level, flags in self.simd.items() if source.name != "simd.cpp" else ():
                contract = ["-ffp-contract=fast"] if source.name in CONTRACTED else []
                add(source, f"cpu-{source.stem}-{level}", [f"-DMEGAGNN_SIMD={level}", *flags, *contract])
        return jobs + (
            [self.cuda_job(source) for source in sorted((CSRC / "cuda").glob("*.cu"))] if self.nvcc else []
        )

    def cuda_job(self, source: Path) -> tuple[list[str], Path]:
        """nvcc command for one source: machine code for each architecture, PTX of the last for later ones."""
        assert self.nvcc
        target = self.folder / f"cuda-{source.stem}.o"
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in self.archs]
        codes.append(f"-gencode=arch=compute_{self.archs[-1]},code=compute_{self.archs[-1]}")
        flags = ["-std=c++17", "-O3", "-Xptxas=-v", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        flags += [f"-I{CSRC}", *codes]
        return [self.nvcc, *self.host_compiler(), *flags, "-c", str(source), "-o", str(target)], target

    def link(self, objects: list[Path], target: Path) -> list[str]:
        """Command that links the extension; nvcc adds its runtime, static, so that none need be installed."""
        if self.nvcc:
            kind = [self.nvcc, *self.host_compiler(), "-shared", "-cudart=static", "-Xlinker=--no-as-needed"]
        elif sys.platform == "darwin":
            kind = [*self.cxx, "-bundle", "-undefined", "dynamic_lookup"]
        else:
            kind = [*self.cxx, "-shared", "-Wl,--no-as-needed"]
        libraries = [f"-L{self.torch_lib}", "-ltorch", "-ltorch_cpu"]
        return [*kind, *map(str, objects), *libraries, "-o", str(target)]

    def host_compiler(self) -> list[str]:
        """Tells nvcc which C++ compiler to use, where the user named one."""
        return ["-ccbin", self.cxx[0]] if os.environ.get("CXX") else []

    def make(self, target: Path) -> None:
        """Compiles, in parallel, and links."""
        self.folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        jobs = self.jobs()
        with ThreadPoolExecutor(max(os.cpu_count() or 1, 1)) as pool:
            list(pool.map(compile_object, jobs))
        run(self.link([target for _, target in jobs], target))


class BuildOps(build_ext):
    """Builds the extension, or says why not and lets the install go on."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        note = target.parent / NOTE
        note.parent.mkdir(parents=True, exist_ok=True)
        note.unlink(missing_ok=True)
        target.unlink(missing_ok=True)
        try:
            self.make(target)
        except CannotBuildError as reason:
            if cuda_asked() == "1":
                raise SystemExit(f"MEGAGNN_CUDA=1 asks for the CUDA kernels, but {reason}") from reason
            earlier = self.earlier_library()
            if isinstance(reason, TorchNotSeenError) and earlier:
                shutil.copy2(earlier, target)
                print(f"megagnn keeps the compiled kernels it has: {reason}.", flush=True)
                return
            sentence = (
                f"megagnn is installed without compiled kernels and will run on PyTorch alone: {reason}."
            )
            note.write_text(sentence + "\n")
            print(sentence, flush=True)

    def source_library(self) -> Path:
        """Where an editable install has the library: in the package."""
        package = Path(self.get_finalized_command("build_py").get_package_dir("megagnn"))
        return package / Path(self.get_ext_filename("megagnn._C")).name

    def earlier_library(self) -> Path | None:
        """The library of an earlier editable install, where this is one, too, and no source is newer."""
        library = self.source_library()
        if not self.editable_mode or not library.exists():
            return None
        sources = [ROOT / "setup.py", *(path for path in CSRC.rglob("*") if path.is_file())]
        newest = max(path.stat().st_mtime for path in sources)
        return library if library.stat().st_mtime >= newest else None

    def make(self, target: Path) -> None:
        """Builds with CUDA where that is wanted, and where it fails, without."""
        if os.environ.get("MEGAGNN_BUILD_OPS") == "0":
            raise CannotBuildError("MEGAGNN_BUILD_OPS=0 leaves them out")
        folder = Path(self.build_temp).resolve()
        build = Build(folder)
        try:
            build.make(target)
        except CannotBuildError as reason:
            if not build.nvcc or cuda_asked() == "1":
                raise
            print(f"megagnn: the CUDA kernels are left out: {reason}", flush=True)
            os.environ["MEGAGNN_CUDA"] = "0"
            Build(folder).make(target)

    def copy_extensions_to_source(self) -> None:
        """Editable installs: takes over the library, or the note; what was there before goes."""
        library = self.source_library()
        for old in (library.parent / NOTE, library):
            old.unlink(missing_ok=True)
        super().copy_extensions_to_source()
        note = Path(self.build_lib) / "megagnn" / NOTE
        if note.exists():
            shutil.copy(note, library.parent / NOTE)


setup(ext_modules=[Extension("megagnn._C", sources=[], optional=True)], cmdclass={"build_ext": BuildOps})
