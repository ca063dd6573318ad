#!/usr/bin/env bash
# Makes the Python environment and installs megagnn into it, or does nothing where that is already done.
#
#   source tools/setup_env.sh [EXTRA...]   then `python`, `torchrun`, `megagnn` are those of the environment
#   bash tools/setup_env.sh [EXTRA...]     only makes it
#
# Uses the active virtual or conda environment (conda's base is left alone), else .venv in the repository, made with
# $PYTHON or the first Python >= 3.10 found. A torch that is already there is kept; otherwise the one of
# tools/constraints-cpu.txt is installed. Installs again when the sources of the extension, the package's metadata,
# torch or the build's environment variables change. The extras are test, formats, labels, mpi and peers: the last, which
# benchmarks and the aggregation back ends use, builds torch_scatter and torch_sparse from source, once, in half an hour.

if [ -z "${BASH_VERSION:-}" ]; then
  echo "setup: this is for bash; in another shell run 'bash tools/setup_env.sh', then activate .venv" >&2
  return 1 2>/dev/null || exit 1
fi

_megagnn_find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python python3.13 python3.12 python3.11 python3.10; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      echo "$candidate"
      return 0
    fi
  done
  echo "setup: no Python >= 3.10 with the venv module was found; set PYTHON to one" >&2
  return 1
}

_megagnn_activate() { # repository
  local python
  if [ -z "${VIRTUAL_ENV:-}" ] && [ -n "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-}" != base ] &&
    [ -x "$CONDA_PREFIX/bin/python" ]; then
    VIRTUAL_ENV=$CONDA_PREFIX # for the scripts that source this one; not exported: conda does not set it
  fi
  if [ -z "${VIRTUAL_ENV:-}" ]; then
    if ! [ -x "$1/.venv/bin/python" ]; then
      python=$(_megagnn_find_python) || return 1
      echo "setup: making $1/.venv with $("$python" --version)"
      "$python" -m venv "$1/.venv" || return 1
    fi
    export VIRTUAL_ENV="$1/.venv"
  fi
  export PATH="$VIRTUAL_ENV/bin:$PATH"
  hash -r
}

# One line that changes whenever an install would give another result.
_megagnn_fingerprint() { # repository
  python - "$1" <<'PY'
import hashlib, os, sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

root = Path(sys.argv[1])
files = [root / name for name in ("setup.py", "pyproject.toml", "tools/constraints-cpu.txt", "megagnn/__init__.py")]
files += sorted(path for path in (root / "csrc").rglob("*") if path.is_file())
note = root / "megagnn/ops/build_note.txt"  # of another install since, whose build failed or saw no torch
files += [note] if note.exists() else []
digest = hashlib.sha256()
for path in files:
    digest.update(str(path).encode() + path.read_bytes())
try:
    torch = version("torch")
except PackageNotFoundError:
    torch = "none"
knobs = [os.environ.get(k, "") for k in ("MEGAGNN_BUILD_OPS", "MEGAGNN_CUDA", "MEGAGNN_CUDA_ARCHS", "CXX", "NVCC")]
digest.update(repr((sys.version, torch, knobs)).encode())
print(digest.hexdigest())
PY
}

_megagnn_has_library() { # repository; its path may hold characters that a pattern would take for its own
  local file
  for file in "$1"/megagnn/_C.*; do
    [ -e "$file" ] && return 0
  done
  return 1
}

_megagnn_current() { # repository stamp extras...: installed, built, and with all the extras?
  local root=$1 stamp=$2 extra
  shift 2
  [ -f "$stamp" ] || return 1
  _megagnn_has_library "$root" || [ -f "$root/megagnn/ops/build_note.txt" ] || return 1
  [ "$(head -n 1 "$stamp")" = "$(_megagnn_fingerprint "$root")" ] || return 1
  for extra in "$@"; do
    grep -qx "$extra" "$stamp" || return 1
  done
}

_megagnn_install() { # repository stamp extras...
  local root=$1 stamp=$2 constraints start=$SECONDS extras
  shift 2
  extras=$(IFS=,; echo "$*")
  constraints="$root/tools/constraints-cpu.txt"
  rm -f "$stamp"
  # Without compiling every module ahead: Python does so for the ones it loads, in a fraction of the time.
  local pip=(python -m pip install -qq --no-input --no-compile --disable-pip-version-check)
  local kept
  if kept=$(python -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null); then
    echo "setup: keeping torch $kept"
    constraints="$VIRTUAL_ENV/megagnn-constraints.txt"
    echo "torch==$kept" >"$constraints"
  else
    echo "setup: installing torch ($(grep '^torch' "$constraints"))"
    if ! command -v nvidia-smi >/dev/null && [ -z "${PIP_INDEX_URL:-}${PIP_EXTRA_INDEX_URL:-}" ]; then
      echo "setup: no GPU was found; the CPU build of torch saves gigabytes where pip would fetch another, see README, Install"
    fi
  fi
  "${pip[@]}" -c "$constraints" torch numpy 'setuptools>=77' wheel 'pybind11>=2.12' || return 1
  if [[ ",$extras," == *,peers,* ]] && ! python -c 'import torch_scatter, torch_sparse' 2>/dev/null; then
    echo "setup: torch_scatter and torch_sparse are built from source, which takes about half an hour"
  fi
  echo "setup: building and installing megagnn${extras:+ with the extras $extras}"
  "${pip[@]}" --no-build-isolation -c "$constraints" -e "$root${extras:+[$extras]}" || return 1
  { _megagnn_fingerprint "$root" && printf '%s\n' "$@"; } >"$stamp" || return 1
  if [ -f "$root/megagnn/ops/build_note.txt" ]; then
    echo "setup: $(cat "$root/megagnn/ops/build_note.txt")"
  else
    echo "setup: compiled kernels are in place"
  fi
  echo "setup: done in $((SECONDS - start)) s"
}

_megagnn_setup() {
  local root stamp argument extras=()
  for argument in "$@"; do
    case $argument in
      test | formats | labels | mpi | peers) extras+=("$argument") ;;
      *) # a script that is sourced without arguments sees those of its caller: they are not meant for it
        [ "${BASH_SOURCE[0]}" != "$0" ] || { echo "setup: no extra named $argument; there are test, formats, labels, mpi, peers" >&2; return 1; }
        ;;
    esac
  done
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || return 1
  _megagnn_activate "$root" || return 1
  stamp="$VIRTUAL_ENV/megagnn-setup-stamp"
  if _megagnn_current "$root" "$stamp" ${extras[@]+"${extras[@]}"}; then
    echo "setup: $VIRTUAL_ENV is up to date"
  else
    _megagnn_install "$root" "$stamp" ${extras[@]+"${extras[@]}"}
  fi
}

_megagnn_setup "$@"
