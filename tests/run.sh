#!/usr/bin/env bash
# Sets up the environment and runs every check: lint, format, types, spelling, CUDA compilation, tests.
# Arguments go to pytest: bash tests/run.sh tests/ops -k gather
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/tools/setup_env.sh" test labels || exit 1
cd "$root" || exit 1
# One thread: the tests are small, and ranks outnumber cores. Tests of threading set their own number.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Hundreds of processes load what the first one compiled: two seconds each.
unset PYTHONDONTWRITEBYTECODE

passed=() failed=()
check() { # name command...
  local name=$1 start=$SECONDS
  shift
  echo "== $name"
  if "$@"; then passed+=("$name"); else failed+=("$name"); fi
  echo "   $((SECONDS - start)) s"
}

clang_format() {
  find csrc tests/cuda/emulation -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs clang-format --dry-run -Werror
}

back_ends() {
  python -W ignore -c '
import torch
from megagnn import ops
from tests.ops.installed import installed_backends
print(f"   ops: {ops.backend()} {ops.build_info()}\n   torch {torch.__version__}, CUDA device: {torch.cuda.is_available()}")
tested, missing = installed_backends()
print("   aggregation back ends tested:", ", ".join(tested))
print("   aggregation back ends missing:", *missing.values() or ["none"], sep="\n     ")'
}

run_pytest() {
  local argument
  for argument in "$@"; do # a path replaces the default, so that one file can be run
    if [ -e "${argument%%::*}" ]; then
      python -m pytest "$@"
      return
    fi
  done
  # What needs one process runs on all cores; then what starts ranks of its own, one test after another.
  local failed=0
  python -m pytest tests --ignore=tests/distributed --numprocesses auto --maxprocesses 4 --dist loadfile "$@" || failed=1
  python -m pytest tests/distributed "$@" || failed=1
  return $failed
}

check "ruff check" ruff check .
check "ruff format" ruff format --check .
check "mypy" mypy megagnn
check "clang-format" clang_format
check "codespell" codespell
if command -v "${NVCC:-nvcc}" >/dev/null || [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]; then
  # The whole library with CUDA kernels, loaded by the torch that is here, with or without a GPU.
  check "CUDA kernels compile without spills and load" python tools/cuda_report.py
else
  echo "== CUDA kernels: not compiled, nvcc was not found"
fi
check "back ends" back_ends
check "pytest" run_pytest "$@"

echo
echo "tests/run.sh: passed: $(IFS=,; echo "${passed[*]}")"
if [ ${#failed[@]} -gt 0 ]; then
  echo "tests/run.sh: FAILED: $(IFS=,; echo "${failed[*]}")"
  exit 1
fi
